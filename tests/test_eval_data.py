"""Reference answers score 100 % and altered ones 0 %, through the command itself; only the model is another.

On the data sets in $VIGOR_DATA_DIR a sample of each, or with VIGOR_EVAL_ALL=1 every problem.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from helpers_eval import PROBLEMS, evaluate_with, perturbed, right, write_problems, wrong

from vigor.evaluation import data, results

SAMPLE = 12
WITH_GOLD = [name for name in PROBLEMS if name != "ifeval"]
LAB = ["lab:math", "lab:math-hard", "lab:code"]

DATA = os.environ.get(data.VARIABLE)
pytestmark = pytest.mark.usefixtures("bubblewrap")
needs_data = pytest.mark.skipif(DATA is None, reason=f"{data.VARIABLE} names no folder with the data sets")


def shares(content: dict[str, Any], name: str) -> dict[str, float]:
    measures = content["tasks"][name]["measures"]
    return {key: measure["value"] for by in measures.values() for key, measure in by.items()}


def failing(folder: Path, name: str, expected: bool) -> list[str]:
    rows = results.read_problems(folder / "out", name)
    return [row["id"] for row in rows if any(verdict != expected for verdict in row["correct_strict"])]


def sampled(folder: Path, names: list[str]) -> Path:
    """The data sets, or a sample of each."""
    chosen: dict[str, list[Any]] = {}
    for name in names:
        lines = (Path(str(DATA)) / data.SOURCES[name].file).read_text("utf-8").split("\n")
        rows = [row for row in map(json.loads, filter(None, lines)) if data.SOURCES[name].keep(row)]
        everything = os.environ.get("VIGOR_EVAL_ALL") == "1"
        chosen[name] = rows if everything else random.Random(0).sample(rows, SAMPLE)
    return write_problems(folder, chosen)


def test_right_answers_score_everything_and_wrong_ones_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_problems(tmp_path / "data")
    for answer, share in ((right, 1.0), (wrong, 0.0)):
        if answer is right:
            monkeypatch.setitem(PROBLEMS["livecodebench"][0], "private_test_cases", [])
            monkeypatch.setitem(PROBLEMS["livecodebench"][1], "private_test_cases", [])
            write_problems(folder)
        names = [*WITH_GOLD, *LAB]
        content = evaluate_with(answer, names, tmp_path / answer.__name__, monkeypatch, folder, "--limit", "2")
        for name in names:
            assert set(shares(content, name).values()) == {share}, (
                name,
                failing(tmp_path / answer.__name__, name, True),
            )


@needs_data
@pytest.mark.parametrize("name", WITH_GOLD)
def test_data_sets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sampled(tmp_path / "data", [name])
    for answer, share in ((right, 1.0), (wrong, 0.0)):
        content = evaluate_with(answer, [name], tmp_path / answer.__name__, monkeypatch, folder)
        found = set(shares(content, name).values())
        assert found == {share}, failing(tmp_path / answer.__name__, name, bool(share))


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "math500", "amc", "aime24", "aime25"])
def test_an_answer_without_a_box_counts_in_the_flexible_column_only(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sampled(tmp_path / "data", [name])
    for form, share in ((lambda gold: gold, 1.0), (perturbed, 0.0)):
        content = evaluate_with(
            lambda name, doc, form=form: f"We add 2 and 3. The answer is ${form(doc['gold'])}$.",
            [name],
            tmp_path / str(share),
            monkeypatch,
            folder,
            "--samples",
            "1",
        )
        accuracy = content["tasks"][name]["measures"]["accuracy"]
        assert (accuracy["strict"]["value"], accuracy["flexible"]["value"]) == (0.0, share)
