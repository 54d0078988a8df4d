"""The report: one page that needs no network, shows what the run holds, and runs nothing that a model wrote."""

from __future__ import annotations

import re
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from helpers_report import empty_charts

from vigor.report import before_after, print_results, write_report
from vigor.report.plots import curves
from vigor.report.table import percent
from vigor.runfolder import RunFolder

ATTACK = '<script>alert("x")</script><img src="http://evil.example/x.png">'
SCORE = {
    "greedy": 0.5, "greedy_interval": [0.4, 0.6], "sampled": 0.25, "sampled_interval": [0.2, 0.3],
    "n_prompts": 100, "n_samples": 4, "entropy": 0.3, "repetition": 0.02, "mean_length": 25.0,
    "pass_at_k": {"1": 0.25}, "majority_at_k": {"1": 0.25},
}  # fmt: skip
BETTER = {**SCORE, "greedy": 0.7, "greedy_interval": [0.65, 0.75], "sampled": 0.28, "sampled_interval": [0.22, 0.33]}
WORSE = {**SCORE, "greedy": 0.1, "greedy_interval": [0.05, 0.15]}
REST = {"completions/mean_length": 20.0, "time/generation": 1.0, "time/update": 0.5}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close in order."""

    VOID = frozenset({"meta", "img", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], f"tags left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_run(
    folder: Path,
    *,
    results: dict[str, Any] | None = None,
    metrics: int = 3,
    accuracy: bool = True,
    group_size: int = 4,
    prompts: tuple[Any, Any] = (f"first prompt {ATTACK}", "second prompt"),
    completion: Any = lambda row: f"completion {row} {ATTACK}",
) -> RunFolder:
    run = RunFolder(folder)
    run.start({"prompts": "lab:math", "note": ATTACK, "num_generations": group_size})
    run.write_json("results.json", results or {"before": {}, "after": {}})
    names = ["vigor", *(["accuracy"] if accuracy else [])]
    (folder / "completions").mkdir()
    for step in range(1, metrics + 1):
        rewards = {f"rewards/{name}/mean": 0.1 * step for name in names}
        run.append_metrics(
            {
                "step": step, **rewards, "scores/vigor": step - 9.0, "entropy": 0.5,
                "completions/mean_length": 9.0,
                "completions/max_length": 40.0, "time/generation": 1.0, "time/reward": 0.5,
                "time/update": float("nan"),
            }
        )  # fmt: skip
        n = 2 * group_size
        pd.DataFrame(
            {
                "step": [step] * n,
                "prompt": [prompts[row // group_size] for row in range(n)],
                "completion": [completion(row) for row in range(n)],
                "vigor": [0.25] * n,
                **({"accuracy": [1.0, float("nan")] * group_size} if accuracy else {}),
                "advantage": [0.5] * n,
            }
        ).to_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
    return run


def page_of(run: RunFolder, *, drawn: bool = True) -> Page:
    with nullcontext() if drawn else empty_charts():
        write_report(run)
    return Page((run.path / "report.html").read_text("utf-8"))


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", results={"before": {"lab:math": SCORE}, "after": {"lab:math": BETTER}}))
    assert not page.named("script")
    assert not page.named("link")
    assert not page.named("iframe")
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert "//" not in (value or "") or name.startswith("xmlns"), (tag, name, value)
    assert not page.named("img")
    assert [attributes.get("role") for attributes in page.named("svg")].count("img") >= 5
    policies = [tag for tag in page.named("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}, "a clip path of the page itself, and nothing else"


def test_what_models_and_users_write_stays_text(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run<b>"))
    assert f"first prompt {ATTACK}" in page.text
    assert f"completion 0 {ATTACK}" in page.text
    assert f"note: {ATTACK}" in page.text.replace("'", "")
    assert "run<b>" in page.text


def test_the_curves_are_a_picture_of_their_own(tmp_path: Path) -> None:
    page_of(make_run(tmp_path / "run"))
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_results_are_shown_with_their_intervals_and_coloured_where_apart(tmp_path: Path) -> None:
    results = {
        "before": {"lab:math": SCORE, "lab:code": SCORE},
        "after": {"lab:math": BETTER, "lab:code": WORSE},
    }
    page = page_of(make_run(tmp_path / "run", results=results), drawn=False)
    assert "50.0 [40.0, 60.0]" in page.text
    assert "+20.0" in page.text
    assert "-40.0" in page.text
    classes = [attributes.get("class") for attributes in page.named("td")]
    assert classes.count("up") == 1
    assert classes.count("down") == 1


def test_without_scores_the_page_says_so(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", accuracy=False), drawn=False)
    assert "No held-out score" in page.text
    assert "Accuracy of the samples" not in page.text


def test_conversations_are_shown_as_their_contents(tmp_path: Path) -> None:
    prompts = tuple([{"role": "user", "content": f"question {i} {ATTACK}"}] for i in range(2))
    page = page_of(
        make_run(
            tmp_path / "run", prompts=prompts, completion=lambda row: [{"role": "assistant", "content": f"says {row}"}]
        ),
        drawn=False,
    )
    assert f"question 0 {ATTACK}" in page.text
    assert "says 3" in page.text
    assert "'role'" not in page.text


@pytest.mark.parametrize("group_size", [2, 4, 8, 12])
def test_groups_are_shown_whole_and_apart(tmp_path: Path, group_size: int) -> None:
    """A prompt's heading must not stand over another prompt's completions."""
    page = page_of(make_run(tmp_path / "run", group_size=group_size), drawn=False)
    first, second = page.text.split("Step 1")[1].split("Step 2")[0].split("Prompt")[1:]
    for shown, prompt, start in ((first, "first prompt", 0), (second, "second prompt", group_size)):
        assert shown.startswith(prompt)
        rows = [int(row) for row in re.findall(r"completion (\d+) <script>", shown)]
        assert rows == list(range(start, start + group_size))


def test_a_run_that_logged_nothing_has_a_page(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", metrics=0))
    assert "Environment" in page.text


def test_a_reward_without_any_opinion_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics=1)
    path = run.path / "completions" / "completions_00001.parquet"
    pd.read_parquet(path).assign(accuracy=float("nan")).to_parquet(path)
    assert "nan" in page_of(run).text


def test_curves_have_a_panel_a_reward_and_skip_missing_values() -> None:
    metrics = [
        {**REST, "step": i, "scores/vigor": -float(i), "rewards/accuracy/mean": None if i == 2 else 0.5}
        for i in (1, 2, 3)
    ]
    figure = curves(metrics, ["vigor", "accuracy"])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(titles) == 5
    assert titles[0] == "vigor: mean score"
    assert "accuracy" in titles[1]
    points = figure.axes[1].lines[0].get_xydata()
    assert [tuple(point) for point in points] == [(1.0, 0.5), (3.0, 0.5)]
    assert not figure.axes[2].lines


def test_the_thick_line_is_the_mean_of_the_last_five() -> None:
    figure = curves([{**REST, "step": i, "entropy": float(i)} for i in range(1, 8)], [])
    single, smooth = figure.axes[0].lines
    assert list(single.get_ydata()) == [1, 2, 3, 4, 5, 6, 7]
    assert list(smooth.get_ydata()) == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0]


def test_the_table_is_printed_with_intervals_and_the_way_to_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run = make_run(tmp_path / "run", results={"before": {"lab:math": SCORE}, "after": {"lab:math": BETTER}})
    print_results(run)
    out = capsys.readouterr().out
    assert "100 test prompts a task, 4 samples each, 95 % intervals" in " ".join(out.split())
    assert re.search(r"lab:math .* greedy .* 50\.0 \[40\.0, 60\.0\] .* 70\.0 \[65\.0, 75\.0\] .* \+20\.0", out)
    assert "Trained on lab:math" in out
    assert str(run.path) in out


def test_without_scores_only_the_folder_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    print_results(run)
    out = capsys.readouterr().out
    assert "before" not in out
    assert "Run folder:" in out


def test_rows_of_the_table() -> None:
    rows = before_after({"before": {"lab:math": SCORE}, "after": {"lab:math": BETTER}})
    assert [(row.task, row.decoding) for row in rows] == [("lab:math", "greedy"), ("lab:math", "sampled")]
    assert rows[0].change == pytest.approx(0.2)
    assert rows[0].apart
    assert not rows[1].apart
    assert before_after({"before": {}, "after": {}}) == []
    assert percent(0.4351, (0.4, 0.47)) == "43.5 [40.0, 47.0]"


def test_the_settings_are_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = page_of(run, drawn=False)
    settings = (run.path / "config.yaml").read_text("utf-8")
    assert settings in page.text
    assert yaml.safe_load(settings)["prompts"] == "lab:math"
