"""The Model Collapse Step: its definition on numbers, and the destructive training that measures it."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from vigor.cli import main
from vigor.probe.collapse import CollapseError, Point, collapse_step, measure, point, settings

NAN = math.nan


def batch(votes: list[float], right: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"majority_vote": votes, "accuracy": right})


def test_reward_accuracy_by_hand() -> None:
    """Three of four known rows agree; the row without an answer does not count."""
    assert point(batch([1, 1, 0, 0, 1], [1, 0, 0, 0, NAN]), 3) == Point(3, 0.75, 0.25)
    assert point(batch([1, 1], [0, 0]), 0).reward_accuracy == 0.0
    with pytest.raises(ValueError, match="--answer_column"):
        point(batch([1.0], [NAN]), 0)


def test_the_step_is_the_first_below_one_per_cent() -> None:
    curve = [Point(i, value, 0.0) for i, value in enumerate([0.5, 0.01, 0.3, 0.009, 0.2])]
    assert collapse_step(curve) == 3
    assert collapse_step(curve[:3]) is None
    assert collapse_step(curve, threshold=0.4) == 1
    assert collapse_step([]) is None


def test_the_training_is_the_measures_own() -> None:
    """One prompt an update; what the recipe says of the model stays, what would change the measure does not."""
    recipe = {"reward_funcs": ["vigor"], "learning_rate": 1e-4, "max_steps": 7, "save_strategy": "steps"}
    found = settings(recipe, n_prompts=16, steps=5, prompts="p.jsonl", learning_rate=None, seed=3)
    assert found["learning_rate"] == 1e-4
    assert (found["prompts"], found["seed"]) == ("p.jsonl", 3)
    assert found["reward_funcs"] == ["majority_vote", "accuracy"]
    assert found["reward_weights"] == [1.0, 0.0]
    assert found["per_device_train_batch_size"] == found["num_generations"] == 8
    assert (found["steps_per_generation"], found["max_steps"]) == (16, 80)
    assert settings(recipe, n_prompts=1, steps=1, learning_rate=1e-6)["learning_rate"] == 1e-6


def stand_in(folder: Path, body: str) -> str:
    """A Python that runs `body` in place of `vigor train`; the run folder is the last argument."""
    script = folder / "python"
    script.write_text(
        "#!/usr/bin/env python3\nimport pathlib, shutil, sys, time\n"
        f"here = pathlib.Path({str(folder)!r})\n"
        "folder = pathlib.Path(sys.argv[-1]) / 'completions'\nfolder.mkdir(parents=True)\n" + body
    )
    script.chmod(0o755)
    return str(script)


def test_the_training_is_ended_once_the_collapse_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have gone on for a minute; a file that is still being written is read when it is whole."""
    batch([1, 0], [1, 0]).to_parquet(tmp_path / "good")
    batch([1, 1], [0, 0]).to_parquet(tmp_path / "bad")
    body = (
        "shutil.copy(here / 'good', folder / 'completions_00004.parquet')\n"
        "(folder / 'completions_00008.parquet').write_bytes(b'PAR1')\ntime.sleep(1.5)\n"
        "shutil.copy(here / 'bad', folder / 'completions_00008.parquet')\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path, body))
    said: list[Point] = []
    started = time.monotonic()
    curve = measure({"seed": 0}, tmp_path / "run", say=said.append)
    assert time.monotonic() - started < 30
    assert curve == said == [Point(0, 1.0, 0.5), Point(1, 0.0, 0.0)]
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == {"seed": 0}


def test_a_training_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path, "sys.exit('out of memory')\n"))
    with pytest.raises(CollapseError, match=r"status 1: out of memory .*run\.log"):
        measure({}, tmp_path / "run", say=print)


def test_the_command_measures_the_built_in_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the training may be ended before it can remove its files
    out = tmp_path / "found.json"
    arguments = ["--prompts", "lab:math", "--world", "lab-misaligned", "--n_prompts", "4", "--output_dir"]
    assert main(["probe", "--collapse_step", "2", *arguments, str(tmp_path / "run"), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [at["step"] for at in found["curve"]] == [0, 1]
    assert found["collapse_step"] is None
    assert 0 < found["curve"][0]["accuracy"] < 1
    assert found["settings"]["learning_rate"] == 1e-4
    shown = capsys.readouterr().out
    assert "none in 2 steps" in shown
    assert str(tmp_path / "run") in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--collapse_step", "0"], "--collapse_step 0"),
        (["--collapse_step", "--learning_rate", "-1"], "--learning_rate -1.0"),
        (["--collapse_step", "--signals", "vigor"], "--signals has no part"),
        (["--collapse_step", "--num_generations", "4"], "--num_generations has no part"),
        (["--collapse_step", "--config", "nowhere"], "--config nowhere"),
        (["--learning_rate", "1e-5"], "--learning_rate is for the training"),
        (["--collapse_step", "--out", "no/such/folder/x.json"], "there is no folder"),
        (["--collapse_step", "--prompts", "no.jsonl"], "no.jsonl"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    flags: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--output_dir", str(tmp_path / "run")] if "--collapse_step" in flags else []
    assert main(["probe", "--prompts", "lab:math", "--world", "lab", *flags, *folder]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
