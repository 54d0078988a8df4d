"""Two processes (gloo, CPU): one checkpoint, one decision to stop or to leave out, and the same run after a resume.

This file is also the program of the two: `python tests/test_checkpoint_distributed.py FOLDER`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_distributed import forked
from helpers_trainer import dataset, table, trainer, weights

from vigor import checkpoint
from vigor.checkpoint import CheckpointError
from vigor.commands.train import leave_process_group
from vigor.guard import NonFiniteError
from vigor.interrupt import Interrupt

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EIGHT = [f"Q:{a}+2\nA:" for a in range(8)]


def make(folder: Path, **settings: Any) -> Any:
    """A generation serves two updates, so that a checkpoint after an odd step lies between them."""
    steps = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "shuffle_dataset": True}
    return trainer(
        folder, "vigor", data=dataset(EIGHT), per_device_train_batch_size=4, ddp_backend="gloo", **{**steps, **settings}
    )


def result(made: Any) -> dict[str, Any]:
    """What a process ends with."""
    logs = [
        {key: value for key, value in log.items() if not key.startswith(("step_time", "time/", "train_"))}
        for log in made.state.log_history
        if "loss" in log
    ]
    return {"step": made.state.global_step, "weights": weights(made.accelerator.unwrap_model(made.model)), "logs": logs}


def resumed(root: Path, rank: int) -> dict[str, Any]:
    whole = make(root / "whole")
    whole.train()
    again = make(root / "again")
    torch.manual_seed(rank)
    again.train(resume_from_checkpoint=str(root / "whole" / "checkpoints" / "checkpoint-3"))
    return {"whole": result(whole), "again": result(again)}


def interrupted(root: Path, rank: int) -> dict[str, Any]:
    """Only the second process gets the signal."""
    made = make(root / "interrupted", save_strategy="no")
    interrupt = Interrupt(made)
    made.add_callback(interrupt)
    real = made._get_grad_norm

    def norm(*args: Any, **kwargs: Any) -> Any:
        if rank == 1 and made.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    made._get_grad_norm = norm
    with interrupt.catching():
        made.train()
    return {"interrupted": result(made), "stopped_by": interrupt.stopped_by}


def guarded(root: Path, rank: int) -> dict[str, Any]:
    """Only the second process has bad rewards: in the first generation one update is left out, and the next stops."""
    made = make(root / "guarded", save_strategy="no", max_skipped_updates=1)
    before = weights(made.accelerator.unwrap_model(made.model))
    real = made._guard.new_rollouts

    def new_rollouts() -> None:
        real()
        if rank == 1:
            made._guard.reward_trouble(f"reward is {math.inf}")

    made._guard.new_rollouts = new_rollouts
    try:
        made.train()
        message = ""
    except NonFiniteError as error:
        message = str(error)
    return {"before": before, "guarded": result(made), "message": message}


def refused(root: Path, rank: int) -> dict[str, Any]:
    """Every process hears of what the first one found."""
    made = make(root / "refused", save_strategy="no", seed=1)
    try:
        made.train(resume_from_checkpoint=str(root / "whole" / "checkpoints" / "checkpoint-3"))
        return {"refused": ""}
    except CheckpointError as error:
        return {"refused": str(error)}


def late(root: Path, rank: int) -> dict[str, Any]:
    """The second process still writes and renames files of its own when the first has written all of its."""
    made = make(root / "late", max_steps=1)
    real = made._save_rng_state

    def slowly(folder: str) -> None:
        real(folder)
        for number in range(200 * rank):
            (Path(folder) / f".tmp-{number}").write_bytes(b"x")
            time.sleep(0.01)
            os.replace(Path(folder) / f".tmp-{number}", Path(folder) / f"{number}.bin")

    made._save_rng_state = slowly
    made.train()
    return {"late": result(made)}


def work(root: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    for part in (resumed, interrupted, guarded, refused, late):
        found.update(part(root, rank))
    torch.save(found, root / f"found-{rank}.pt")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("two")
    done = forked(__file__, root, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return root, [torch.load(root / f"found-{rank}.pt", weights_only=True) for rank in (0, 1)]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_holds_both_processes_and_is_whole(ran: Any) -> None:
    root, _ = ran
    path, rejected = checkpoint.newest(root / "whole" / "checkpoints")
    assert path is not None
    assert path.name == "checkpoint-5"
    assert rejected == []
    assert checkpoint.about(path)["processes"] == 2
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "vigor_state_0.pt", "vigor_state_1.pt"} <= set(files)


def test_a_process_that_writes_later_is_waited_for(ran: Any) -> None:
    """Files are made durable once all have written theirs: a walk would meet names that are renamed under it."""
    root, found = ran
    assert [each["late"]["step"] for each in found] == [1, 1]
    path, _ = checkpoint.newest(root / "late" / "checkpoints")
    assert path is not None
    assert {f"{number}.bin" for number in range(200)} <= set(json.loads((path / "manifest.json").read_text())["files"])


def test_a_resumed_run_is_the_same_bit_for_bit(ran: Any) -> None:
    root, found = ran
    for each in found:
        assert equal(each["whole"]["weights"], each["again"]["weights"])
    assert found[0]["whole"]["logs"][3:] == found[0]["again"]["logs"][3:]
    assert len(found[0]["again"]["logs"]) == 5
    for step in (4, 5):
        tables = [table(root / name, step).to_dict("list") for name in ("whole", "again")]
        assert repr(tables[0]) == repr(tables[1])


def test_a_signal_to_one_process_stops_both_at_the_same_step(ran: Any) -> None:
    root, found = ran
    assert [each["stopped_by"] for each in found] == [signal.SIGTERM, signal.SIGTERM]
    assert [each["interrupted"]["step"] for each in found] == [2, 2]
    assert checkpoint.newest(root / "interrupted" / "checkpoints")[0] is not None


def test_trouble_in_one_process_keeps_both_from_updating(ran: Any) -> None:
    root, found = ran
    for each in found:
        assert "step 2: reward is inf (process 1 of 2). The weights are untouched." in each["message"]
        assert each["guarded"]["step"] == 1
        assert equal(each["before"], each["guarded"]["weights"])
    names = {path.name for path in (root / "guarded" / "dumps" / "step-2").iterdir()}
    assert names == {"batch-0.pt", "batch-1.pt", "dump.json", "model"}


def test_a_step_of_two_processes_is_computed_again_by_one(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from vigor.cli import main

    root, _ = ran
    assert main(["replay", str(root / "guarded" / "dumps" / "step-2")]) == 0
    assert capsys.readouterr().out.endswith("reproduced\n")


def test_a_refusal_reaches_both(ran: Any) -> None:
    _, found = ran
    for each in found:
        assert "seed: 42 → 1" in each["refused"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    leave_process_group()
