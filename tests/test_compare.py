"""vigor compare: statistics against the slow way, verdicts that claim no more than they may, campaigns that survive."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml
from helpers_trainer import save_tiny, write_jsonl
from test_report import Page

from vigor import recipes
from vigor.cli import main
from vigor.commands.compare import check_runs, read_settings
from vigor.compare import table
from vigor.compare.outcomes import TRAINING, Outcome, at_the_end, outcomes, scores
from vigor.compare.plan import METHODS, Plan, make_plan, slug
from vigor.compare.runs import check_settings, execute, finished, folder_of
from vigor.compare.statistics import Estimate, central_mass, estimate, paired_difference, t_quantile, verdict
from vigor.lab.evaluate import LabScore, pass_at_k

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("undrawn")]

ATTACK = '<script>alert("x")</script>|*_`'


# Statistics


def test_quantiles_against_the_published_table() -> None:
    published = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 120: 1.980}
    assert {n: round(t_quantile(n), 3) for n in published} == published
    assert t_quantile(4, 0.99) == pytest.approx(4.604, abs=5e-4)
    with pytest.raises(ValueError, match="degrees=0"):
        t_quantile(0)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8])
def test_the_distribution_against_an_integral_of_its_density(degrees: int) -> None:
    n, t = 20_000, 1.7
    scale = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    density = [scale * (1 + ((i + 0.5) * t / n) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(n)]
    assert central_mass(t, degrees) == pytest.approx(2 * t / n * math.fsum(density), abs=1e-8)


def test_the_interval_covers_as_often_as_it_says_where_a_bootstrap_does_not() -> None:
    """Three seeds: why the intervals are Student's t. All 27 resamples are enumerated."""
    rng = random.Random(0)
    n, covered, bootstrapped = 2000, 0, 0
    for _ in range(n):
        values = [rng.gauss(0.5, 0.1) for _ in range(3)]
        made = estimate(values)
        assert made.low is not None
        assert made.high is not None
        covered += made.low <= 0.5 <= made.high
        means = sorted(mean(drawn) for drawn in itertools.product(values, repeat=3))
        bootstrapped += means[0] <= 0.5 <= means[-1]  # the widest that a percentile bootstrap can be
    assert 0.935 <= covered / n <= 0.965
    assert bootstrapped / n < 0.85


def test_paired_differences_use_the_seeds_that_both_have() -> None:
    difference = paired_difference({0: 0.5, 1: 0.7, 2: 0.9, 3: 9.0}, {0: 0.4, 1: 0.5, 2: 0.6, 4: -9.0})
    assert difference is not None
    assert difference.n == 3
    assert difference.mean == pytest.approx(0.2)
    assert difference.half == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    with pytest.raises(ValueError, match="no value"):
        estimate([])


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (Estimate(0.12, 0.04, 3), "better than vigor: +0.12 [+0.08, +0.16]"),
        (Estimate(-0.12, 0.04, 3), "worse than vigor: -0.12 [-0.16, -0.08]"),
        (Estimate(0.12, 0.13, 3), "no difference from vigor shown: +0.12 [-0.01, +0.25]"),
        (Estimate(-0.12, 0.12, 3), "no difference from vigor shown: -0.12 [-0.24, +0.00]"),
        (Estimate(0.5, None, 1), "not decided: one seed has no interval (+0.50)"),
        (None, "no seed in common with vigor"),
    ],
)
def test_a_verdict_says_what_the_interval_shows(difference: Estimate | None, said: str) -> None:
    assert verdict(difference, "vigor", lambda x: f"{x:+.2f}") == said


def test_verdicts_are_rarely_wrong_where_nothing_differs() -> None:
    rng = random.Random(1)
    claims = 0
    for _ in range(1000):
        sides = [{seed: rng.gauss(0.5, 0.1) for seed in range(4)} for _ in range(2)]
        claims += not verdict(paired_difference(*sides), "other", str).startswith("no difference")
    assert 0.03 <= claims / 1000 <= 0.07


@pytest.mark.parametrize(("n", "right", "k"), [(4, 0, 2), (4, 1, 2), (5, 2, 3), (4, 4, 1), (6, 3, 4), (3, 1, 3)])
def test_pass_at_k_against_every_choice(n: int, right: int, k: int) -> None:
    choices = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    with pytest.raises(ValueError, match="k=7"):
        pass_at_k(6, 1, 7)


# The plan


def test_a_recipe_alone_is_the_default_comparison() -> None:
    plan = make_plan("lab")
    assert [method.name for method in plan.methods] == list(METHODS)
    assert plan.baseline == "vigor"
    assert len(plan.runs) == 6 * 3
    assert {run.seed for run in plan.runs[:6]} == {0}, "seed by seed"
    for run in plan.runs:
        assert run.settings["reward_funcs"] == [run.method]
        assert run.settings["seed"] == run.seed
        assert run.settings["model_name_or_path"] == "lab"


def test_runs_differ_in_nothing_but_method_and_seed() -> None:
    runs = make_plan("lab", settings={"max_steps": 7}).runs
    rest = [{k: v for k, v in run.settings.items() if k not in ("reward_funcs", "seed")} for run in runs]
    assert all(settings == rest[0] for settings in rest)
    assert rest[0]["max_steps"] == 7


def test_methods_and_worlds_may_bring_settings(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    content = {
        "recipe": "lab",
        "settings": {"max_steps": 5},
        "methods": ["vigor", {"name": "warm", "reward_funcs": ["vigor"], "temperature": 1.2}],
        "worlds": ["lab", {"name": "other", "model_name_or_path": "lab-misaligned", "prompts": "lab:code"}],
        "seeds": [4],
    }
    path.write_text(yaml.safe_dump(content))
    runs = {(run.world, run.method): run for run in make_plan(str(path)).runs}
    assert runs["other", "warm"].settings["prompts"] == "lab:code"
    assert runs["other", "warm"].settings["temperature"] == 1.2
    assert "temperature" not in runs["lab", "vigor"].settings
    assert {run.name for run in runs.values()} == {
        "lab--vigor--4", "lab--warm--4", "other--vigor--4", "other--warm--4"
    }  # fmt: skip
    assert make_plan(str(path), seeds=[1, 2], methods=["vigor"], worlds=["lab"]).seeds == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["accuracy"]}, "--baseline vigor: choose one of the methods: accuracy"),
        ({"methods": ["vigor", "vigor"]}, "'vigor' stands there twice"),
        ({"methods": ["base"], "baseline": "base"}, "nothing would be trained"),
        ({"seeds": [1, 1]}, "each once"),
        ({"settings": {"output_dir": "x"}}, "output_dir is set by the comparison itself"),
        ({"methods": [{"reward_funcs": ["vigor"]}]}, "needs a `name`"),
        ({"methods": ["vigor", "vigor(ties=index)", "vigor_ties=index"]}, "would share the folder"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan("lab", **changes)


def test_unknown_keys_and_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("methods: [vigor]\nrecipes: lab\n")
    with pytest.raises(ValueError, match="unknown keys recipes"):
        make_plan(str(tmp_path / "c.yaml"))
    with pytest.raises(ValueError, match="lab-paper"):
        make_plan("no-such-recipe")


def test_lab_paper_has_the_structure_of_the_papers_table() -> None:
    assert recipes.comparisons() == ["lab-methods", "lab-paper", "lab-paper-bf16", "lab-reference"]
    plan = make_plan("lab-paper")
    assert [method.name for method in plan.methods][:4] == ["base", "labels", "Intuitor", "vigor"]
    assert len(plan.seeds) >= 5
    trained = {tuple(run.settings["reward_funcs"]) for run in plan.runs}
    assert {("accuracy",), ("self_certainty",), ("vigor",), ("vigor_no_sqrt",), ("vigor_zscore",), ("vigor_raw",),
            ("head_grad_norm",), ("vigor(ties=index)",)} <= trained  # fmt: skip


@pytest.mark.parametrize("name", ["lab-paper", "lab-paper-bf16"])
def test_every_run_of_lab_paper_passes_the_checks_of_train(name: str, tmp_path: Path) -> None:
    check_runs(tmp_path / "out", make_plan(name, seeds=[0], settings={"max_steps": 2}))
    assert not (tmp_path / "out").exists()


def test_flags_of_train_are_read_as_yaml() -> None:
    given = read_settings(["--max_steps", "5", "--learning_rate=1e-3", "--reward_weights", "1", "-0.5", "--use_cpu"])
    assert given == {"max_steps": 5, "learning_rate": "1e-3", "reward_weights": [1, -0.5], "use_cpu": True}
    with pytest.raises(ValueError, match="'5' stands without"):
        read_settings(["5"])


def test_slugs_are_file_names() -> None:
    assert slug("vigor(ties=index)") == "vigor_ties=index"
    assert slug("../Qwen/Qwen2.5-0.5B") == "Qwen_Qwen2.5_0.5B"
    assert slug("...") == "_"


# Runs: the campaign with a quick process in the place of training

WORKER = textwrap.dedent("""
    import json, pathlib, sys, time, yaml
    settings, folder, resume = yaml.safe_load(open(sys.argv[1])), pathlib.Path(sys.argv[2]), sys.argv[3] == "True"
    folder.mkdir(exist_ok=resume)
    with open(folder.parent.parent / "started.txt", "a") as stream:
        stream.write(folder.name + "\\n")
    method = settings["reward_funcs"][0]
    if method == "entropy":
        sys.exit("a reason to fail")
    time.sleep(settings.get("sleep", 0))
    (folder / "metrics.jsonl").write_text('{"step": 1, "time/step": 2.0}\\n')
    score = {"vigor": 0.5, "accuracy": 0.8}.get(method, 0.1) + 0.01 * (-1) ** settings["seed"]
    values = dict(sampled=score, greedy=1.0, entropy=0.5, repetition=0.0, mean_length=9.0,
                  pass_at_k={"1": score, "2": 0.9}, majority_at_k={"1": score, "2": 0.7})
    (folder / "environment.json").write_text(json.dumps(dict(
        commit="c", packages={"torch": "2"}, platform="p", cpu_count=2, gpus=[])))
    results = {"before": {"lab:math": {**values, "sampled": 0.4}}, "after": {"lab:math": values}}
    (folder / "results.json").write_text(json.dumps(results))
""")


def worker(settings: Path, folder: Path, resume: bool) -> list[str]:
    return [sys.executable, "-c", WORKER, str(settings), str(folder), str(resume)]


def small(methods: tuple[str, ...] = ("base", "vigor", "accuracy", "random"), seeds: int = 2, **settings: Any) -> Plan:
    return make_plan("lab", methods=methods, seeds=range(seeds), settings=settings)


def started(out: Path) -> list[str]:
    return (out / "started.txt").read_text().split()


def test_every_run_is_made_once_and_kept(tmp_path: Path) -> None:
    plan, said = small(), []
    assert execute(tmp_path, plan.runs, jobs=3, say=said.append, command=worker) == []
    assert sorted(started(tmp_path)) == sorted(run.name for run in plan.runs)
    assert all(finished(folder_of(tmp_path, run)) for run in plan.runs)
    more = small(seeds=3)
    check_settings(tmp_path, more.runs)
    assert execute(tmp_path, more.runs, jobs=3, say=said.append, command=worker) == []
    assert len(started(tmp_path)) == 9
    assert any("6 of 9 runs are finished already" in line for line in said)


def test_a_run_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    (run,) = small(("vigor",), 1).runs
    folder = folder_of(tmp_path, run).path
    folder.mkdir(parents=True)
    (folder / "rubbish").write_text("")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "results.json").write_text('{"before": {}, "aft')
    assert not finished(folder_of(tmp_path, run))
    assert execute(tmp_path, [run], jobs=1, say=lambda _: None, command=worker) == []
    assert finished(folder_of(tmp_path, run))
    assert not (folder / "rubbish").exists()


def test_a_failure_is_told_and_stops_nothing_else(tmp_path: Path) -> None:
    plan = small(("vigor", "entropy", "random"), 1)
    (failed,) = execute(tmp_path, plan.runs, jobs=1, say=lambda _: None, command=worker)
    assert failed.run.method == "entropy"
    assert failed.reason == "a reason to fail"
    assert len(started(tmp_path)) == 3
    (made,) = table.make_tables(plan, outcomes(tmp_path, plan.runs, base=False))
    assert [row.verdict for row in made.rows if row.method == "entropy"] == ["no finished run"]


def test_other_settings_under_the_same_name_are_refused(tmp_path: Path) -> None:
    execute(tmp_path, small(("vigor",), 1).runs, jobs=1, say=lambda _: None, command=worker)
    with pytest.raises(ValueError, match=r"max_steps 100 there, 7 now.*--output_dir"):
        check_settings(tmp_path, small(("vigor",), 1, max_steps=7).runs)


PARENT = """
import signal, sys
from pathlib import Path
from vigor.commands import compare
from vigor.compare.plan import make_plan
from vigor.compare.runs import execute
signal.signal(signal.SIGTERM, compare._end)
runs = make_plan("lab", methods=["vigor"], seeds=[0], settings={{"sleep": {sleep}}}).runs
execute(Path({out!r}), runs, jobs=1, command=lambda *given: [sys.executable, "-c", {worker!r}, *map(str, given)])
"""


def _campaign(out: Path, sleep: float) -> subprocess.Popen[bytes]:
    code = PARENT.format(out=str(out), sleep=sleep, worker=WORKER)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "started.txt").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    return process


def test_what_survives_a_killed_campaign_is_waited_for_and_not_doubled(tmp_path: Path) -> None:
    parent = _campaign(tmp_path, sleep=4.0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    said: list[str] = []
    plan = small(("vigor",), 1, sleep=4.0)
    assert execute(tmp_path, plan.runs, jobs=1, say=said.append, command=worker) == []
    assert any("another process" in line for line in said)
    assert started(tmp_path) == ["lab--vigor--0"]
    assert finished(folder_of(tmp_path, plan.runs[0]))


def test_a_terminated_campaign_leaves_no_process_behind(tmp_path: Path) -> None:
    parent = _campaign(tmp_path, sleep=600.0)
    parent.terminate()
    parent.wait(timeout=60)
    said: list[str] = []
    plan = small(("vigor",), 1, sleep=0.0)  # would wait for ten minutes if the first run still held its lock
    assert execute(tmp_path, plan.runs, jobs=1, say=said.append, command=worker) == []
    assert started(tmp_path) == ["lab--vigor--0"] * 2
    assert not any("another process" in line for line in said)


# The table


def test_the_table_of_a_campaign(tmp_path: Path) -> None:
    plan = small(seeds=3)
    execute(tmp_path, plan.runs, jobs=4, say=lambda _: None, command=worker)
    found = outcomes(tmp_path, plan.runs, base=True)
    (made,) = table.make_tables(plan, found)
    rows = {row.method: row for row in made.rows}
    assert list(rows) == ["base", "vigor", "accuracy", "random"]
    assert rows["base"].metrics["sampled"] == Estimate(0.4, None, 3)
    assert rows["vigor"].metrics["sampled"].mean == pytest.approx(mean([0.51, 0.49, 0.51]))
    assert rows["vigor"].verdict == "the baseline"
    assert rows["accuracy"].verdict.startswith("better than vigor: +30.0 [")
    assert rows["random"].verdict.startswith("worse than vigor: -40.0 [")
    assert rows["base"].verdict.startswith("worse than vigor: -10.3 [")
    assert table.cells(made)[0] == [
        "method", "sampled", "greedy", "pass@2", "majority@2", "entropy", "length", "repetition", "seconds", "seeds",
        "verdict",
    ]  # fmt: skip
    assert rows["vigor"].metrics["seconds"].mean == 2.0
    assert "3 intervals are looked at" in table.note([made])
    again = table.from_dict(json.loads(json.dumps(table.as_dict(made))))
    assert again == made


def _attacked() -> table.Table:
    plan = make_plan("lab", methods=["vigor", {"name": ATTACK, "reward_funcs": ["random"]}], seeds=[0, 1])
    found = [
        Outcome("lab", name, seed, {"lab:math": {"sampled": 0.5 + 0.1 * seed}}, None)
        for name in ("vigor", ATTACK)
        for seed in (0, 1)
    ]
    return table.make_tables(plan, found)[0]


def test_names_stay_text_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    made = _attacked()
    page = Page(table.html([made]))
    assert not page.named("script")
    assert ATTACK in page.text
    line = next(line for line in table.markdown([made]).splitlines() if "alert" in line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 5, "a cell ends where a name says so"
    Console(width=200).print(table.terminal(made))
    assert ATTACK in capsys.readouterr().out


def test_the_terminal_table_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    values = {"sampled": 0.5, "greedy": 0.6, "pass@4": 0.7, "majority@4": 0.6, "entropy": 0.4, "length": 25.0,
              "repetition": 0.03, "seconds": 100.0}  # fmt: skip
    plan = make_plan("lab", methods=["vigor", "self_certainty"], seeds=[0, 1])
    found = [
        Outcome("lab", method, seed, {"lab:math": {k: v * (1 + 0.1 * seed) for k, v in values.items()}}, None)
        for method in ("vigor", "self_certainty")
        for seed in (0, 1)
    ]
    Console(width=80).print(table.terminal(table.make_tables(plan, found)[0]))
    out = capsys.readouterr().out
    assert "…" not in out
    assert "52.5 ± 31.8" in out
    assert "self_certainty" in out


def test_scores_are_those_of_the_labs_evaluation() -> None:
    score = LabScore(
        task="lab:math", n_prompts=2, n_samples=2, greedy=0.5, sampled=0.25, majority=0.5, entropy=0.1, boxed=1.0,
        mean_length=7.0, repetition=0.02, pass_at_k={1: 0.25, 2: 0.5}, majority_at_k={1: 0.25, 2: 0.5},
        greedy_interval=(0.0, 1.0), sampled_interval=(0.0, 1.0),
    )  # fmt: skip
    assert scores(json.loads(json.dumps(score.as_dict()))) == {
        "sampled": 0.25, "greedy": 0.5, "entropy": 0.1, "repetition": 0.02, "length": 7.0,
        "pass@1": 0.25, "pass@2": 0.5, "majority@1": 0.25, "majority@2": 0.5,
    }  # fmt: skip


def test_without_held_out_scores_the_last_tenth_of_the_steps_counts() -> None:
    metrics = [
        {"step": i, "rewards/accuracy/mean": None if i == 200 else float(i > 180), "entropy": i / 100}
        for i in range(1, 201)
    ]
    assert at_the_end(metrics) == {"sampled": 1.0, "entropy": pytest.approx(1.905)}


# The command


def test_a_dry_run_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compare", "--config", "lab", "--dry_run", "--seeds", "0", "--output_dir", str(out)]) == 0
    assert "runs      6" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--jobs", "0"], "--jobs 0"),
        (["--baseline", "nobody"], "--baseline nobody"),
        (["--methods", "vigor", "no_such_reward"], "no_such_reward"),
        (["--no_such_setting", "1"], "no_such_setting"),
    ],
)
def test_what_cannot_work_is_refused_before_any_run(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compare", "--config", "lab", "--output_dir", str(out), "--max_steps", "2", *argv]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_campaign_of_real_runs_ends_in_table_json_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Q:{a}+{b}\nA:", "answer": str(a + b)} for a in range(3, 7) for b in (4, 15)]
    content = {
        "model_name_or_path": str(save_tiny(tmp_path / "base")), "use_cpu": True, "gradient_checkpointing": False,
        "prompts": str(write_jsonl(tmp_path / "prompts.jsonl", rows)), "save_strategy": "no", "max_steps": 2,
        "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 8,
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    command = ["compare", "--config", str(tmp_path / "mine.yaml"), "--jobs", "2", "--methods", "vigor", "random"]
    monkeypatch.setenv("COLUMNS", "100")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main([*command, "--seeds", "3", "--output_dir", str(tmp_path / "out")]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    assert content["seeds"] == [3]
    assert [run["method"] for run in content["runs"]] == ["vigor", "random"]
    assert list(content["runs"][0]["tasks"]) == [TRAINING]
    assert (tmp_path / "out" / content["runs"][0]["folder"] / "model" / "model.safetensors").is_file()
    (made,) = content["tables"]
    assert made["rows"][1]["verdict"].startswith("not decided: one seed")
    markdown = (tmp_path / "out" / "compare.md").read_text("utf-8")
    assert "| method | sampled | entropy | length | seconds | seeds | verdict |" in markdown
    page = Page((tmp_path / "out" / "report.html").read_text("utf-8"))
    assert "not decided: one seed" in page.text
    first = {
        name: (tmp_path / "out" / "runs" / f"{name}" / "completions" / "completions_00001.parquet")
        for name in (run["folder"].removeprefix("runs/") for run in content["runs"])
    }
    import pandas as pd

    vigor, other = (pd.read_parquet(path) for path in first.values())
    assert list(vigor["completion"]) == list(other["completion"]), "same base, same prompts, same first samples"
    (tmp_path / "again").mkdir()
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "again" / "page.html")]) == 0
    again = Page((tmp_path / "again" / "page.html").read_text("utf-8"))
    assert "not decided: one seed" in again.text
