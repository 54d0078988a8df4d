"""A resumed run is the uninterrupted one: every later metric, table and weight, bit for bit; or it is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_trainer import PROMPTS, dataset, same_weights, save_tiny, table, trainer, weights, write_jsonl
from safetensors.torch import load_file

from vigor.checkpoint import CheckpointError, about, commit
from vigor.cli import main
from vigor.resume import FIXED, differences

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("undrawn")]

EIGHT = [*PROMPTS, "Q:8-8\nA:", "Q:6*7\nA:", "Q:1+1\nA:", "Q:20-3\nA:"]


def noise(completions: list[str], **_: Any) -> list[float]:
    """A reward function of the user's that draws from the process's own generator."""
    return torch.randn(len(completions)).tolist()


def history(made: Any, after: int) -> list[dict[str, Any]]:
    """The logs after a step, without what a clock says."""
    timed = ("time/", "step_time", "train_")
    logs = [log for log in made.state.log_history if log["step"] > after and "loss" in log]
    return [{k: v for k, v in log.items() if not k.startswith(timed)} for log in logs]


def make(folder: Path, reward_funcs: Any = "vigor", steps: int = 5, **settings: Any) -> Any:
    """A run over four batches of two prompts an epoch that saves each step."""
    saves = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1, "shuffle_dataset": True}
    return trainer(folder, reward_funcs, data=dataset(EIGHT), **{**saves, **settings})


def resume(folder: Path, checkpoint: Path, **settings: Any) -> Any:
    """Goes on from a checkpoint, in a folder of its own."""
    made = make(folder, **settings)
    torch.manual_seed(12345)  # what the process has drawn so far must not matter
    made.train(resume_from_checkpoint=str(checkpoint))
    return made


def both(tmp_path: Path, at: int, **settings: Any) -> tuple[Any, Any]:
    """A run in one go, and one that goes on from its step `at`."""
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    return whole, resume(tmp_path / "resumed", tmp_path / "whole" / "checkpoints" / f"checkpoint-{at}", **settings)


CASES: dict[str, dict[str, Any]] = {
    "keep": {"fused": "keep"},
    "retain": {"fused": "retain"},
    "mid-rollouts": {"per_device_train_batch_size": 4, "steps_per_generation": 4},
    "mid-rollouts and iterations, accumulating": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
    },
    "between logs": {"logging_steps": 4, "per_device_train_batch_size": 4, "steps_per_generation": 2},
    "own noise, warm-up": {
        "reward_funcs": ["vigor", noise, "random"],
        "reward_weights": [1.0, 0.3, 0.2],
        "fused": "off",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
    },
    "teacher and annealing": {
        "reward_funcs": ["co_rewarding_2", "vigor"],
        "reward_weights": [1.0, 0.0],
        "reward_weights_final": [0.5, 1.0],
    },
    "kl": {"beta": 0.05},
}


@pytest.mark.parametrize("name", CASES)
def test_what_follows_is_the_same_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Eight prompts, two an optimizer step: step 3 is in the middle of the first epoch."""
    settings = {**CASES[name]}
    if "beta" in settings:  # the reference model is loaded by name
        settings["model"] = str(save_tiny(tmp_path / "model"))
    whole, resumed = both(tmp_path, 3, **settings)
    assert history(whole, 3) == history(resumed, 3)
    assert len(history(resumed, 3)) > 0
    assert same_weights(weights(whole.model), weights(resumed.model))
    for step in (log["step"] for log in history(whole, 3)):
        first, second = (table(tmp_path / folder, step) for folder in ("whole", "resumed"))
        assert repr(first.to_dict("list")) == repr(second.to_dict("list"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ten steps: two epochs of four, and two more."""
    made = make(tmp_path_factory.mktemp("whole"), steps=10)
    made.train()
    return made


@pytest.mark.parametrize("at", [4, 5, 8, 9])
def test_at_and_after_the_boundary_of_an_epoch(whole: Any, tmp_path: Path, at: int) -> None:
    folder = Path(whole.args.output_dir)
    resumed = resume(tmp_path, folder / "checkpoints" / f"checkpoint-{at}", steps=10)
    assert history(whole, at) == history(resumed, at)
    assert same_weights(weights(whole.model), weights(resumed.model))
    for step in range(at + 1, 11):
        assert table(folder, step)["prompt"].tolist() == table(tmp_path, step)["prompt"].tolist()


def test_epochs_differ_in_their_order(whole: Any) -> None:
    """Else the test above could not fail."""
    folder = Path(whole.args.output_dir)
    orders = [[table(folder, step)["prompt"].tolist() for step in steps] for steps in ((1, 2), (5, 6), (9, 10))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_resumed_run_can_be_resumed(tmp_path: Path) -> None:
    in_one_go, _ = both(tmp_path, 2, num_iterations=2)
    again = resume(tmp_path / "again", tmp_path / "resumed" / "checkpoints" / "checkpoint-3", num_iterations=2)
    assert history(in_one_go, 3) == history(again, 3)
    assert same_weights(weights(in_one_go.model), weights(again.model))


# Refusals


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, data=dataset(EIGHT), max_steps=2, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoints" / "checkpoint-1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed: 42 → 4"),
        ({"num_iterations": 2}, "num_iterations: 1 → 2"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 → 2"),
        ({"optim": "sgd"}, "optim: .*adamw.* → .*sgd"),
        ({"data": dataset(EIGHT[:6])}, "number of prompts: 8 → 6"),
        ({"data": dataset(EIGHT[::-1])}, r"prompts \(hash\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    saved: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    made = trainer(tmp_path, **{"data": dataset(EIGHT), "max_steps": 2, **changes})
    before = weights(made.model)
    with pytest.raises(CheckpointError, match=rf"written with other settings: .*{message}.*model_name_or_path"):
        made.train(resume_from_checkpoint=str(saved))
    assert same_weights(before, weights(made.model))


def test_another_number_of_processes_is_refused(saved: Path, tmp_path: Path) -> None:
    staged = tmp_path / ".writing" / "checkpoint-1"
    shutil.copytree(saved, staged)
    for own in ("manifest.json", "COMMITTED"):
        (staged / own).unlink()
    path = commit(tmp_path, "checkpoint-1", {**about(saved), "processes": 4})
    made = trainer(tmp_path / "run", data=dataset(EIGHT), max_steps=2)
    with pytest.raises(CheckpointError, match=r"by 4 processes, this run has 1: .*with 4 processes"):
        made.train(resume_from_checkpoint=str(path))


def test_differences_are_listed_old_and_new() -> None:
    assert differences({"a": 1, "b": None, "c": 0}, {"a": 1, "b": 2, "d": 3}) == [
        "b: None → 2",
        "c: 0 → None",
        "d: None → 3",
    ]


def test_the_settings_that_must_agree_exist(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    assert set(FIXED) <= set(vars(made.args))


# The command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("base")
    rows = [{"prompt": text, "answer": "7"} for text in EIGHT]
    return {
        "prompts": str(write_jsonl(folder / "prompts.jsonl", rows)),
        "model_name_or_path": str(save_tiny(folder / "model")),
        "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 8, "learning_rate": 1e-3,
        "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "use_cpu": True, "gradient_checkpointing": False,
    }  # fmt: skip


def vigor(base: dict[str, Any], run: Path, *argv: str, **changes: Any) -> int:
    path = run.parent / "settings.yaml"
    path.write_text(yaml.safe_dump({**base, **changes}))
    return main(["train", "--config", str(path), "--output_dir", str(run), *argv])


@pytest.fixture(scope="module")
def finished(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert vigor(base, run) == 0
    return run


def copy(run: Path, folder: Path, *without: str) -> Path:
    shutil.copytree(run, folder / "run")
    for name in without:
        path = folder / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / "run"


def test_the_command_goes_back_to_the_newest_whole_checkpoint(
    base: dict[str, Any], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(finished, tmp_path, "model", "report.html", "results.json", "checkpoints/checkpoint-2/COMMITTED")
    with (run / "checkpoints" / "checkpoint-3" / "model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    assert vigor(base, run, "--resume") == 0
    err = capsys.readouterr().err
    assert "checkpoint-3 is not used: model.safetensors has 100 bytes instead of" in err
    assert "checkpoint-2 is not used: it has no COMMITTED, so that it was never finished" in err
    ends = [load_file(folder / "model" / "model.safetensors") for folder in (finished, run)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_cut_off_after_its_last_step_is_finished(base: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    run = copy(finished, tmp_path, "model", "report.html", "results.json")
    lines = (run / "metrics.jsonl").read_text()
    assert vigor(base, run, "--resume") == 0
    assert (run / "metrics.jsonl").read_text() == lines, "it must not train on"
    ends = [load_file(folder / "model" / "model.safetensors") for folder in (finished, run)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert (run / "report.html").is_file()
    assert json.loads((run / "results.json").read_text()) == {"before": {}, "after": {}}
    assert vigor(base, run, "--resume") == 2


def test_changes_are_listed_where_they_do_no_harm_and_refused_where_they_do(
    base: dict[str, Any], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(finished, tmp_path, "model")
    assert vigor(base, run, "--resume", "--max_steps", "4", "--learning_rate", "0.002", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "Resuming with other settings than before: learning_rate: 0.001 → 0.002, max_steps: 3 → 4." in out
    for flag, value in (("--seed", "9"), ("--max_prompts", "6"), ("--per_device_train_batch_size", "16")):
        assert vigor(base, run, "--resume", "--max_steps", "4", flag, value) == 2
        err = capsys.readouterr().err
        assert "was started with other settings: " + flag[2:] in err
        assert "new run from its weights" in err


def test_a_run_whose_folder_is_in_use_is_refused_and_touches_nothing(
    base: dict[str, Any], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(finished, tmp_path, "report.html")
    program = (
        "import sys; from pathlib import Path; from vigor.checkpoint import locked\n"
        "with locked(Path(sys.argv[1]), 'run.lock'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        assert vigor(base, run, "--resume", "--max_steps", "4") == 2
        assert f"is being written to by process {holder.pid}" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
