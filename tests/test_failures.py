"""Injected failures: a user's reward that goes wrong, a clock that jumps, a folder nobody may write, a dead process."""

from __future__ import annotations

import asyncio
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_distributed import forked
from helpers_trainer import same_weights, trainer, weights

from vigor import outside
from vigor.checkpoint import newest
from vigor.interrupt import Interrupt
from vigor.outside import RewardError, watched

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


# Rewards of the user's


def reward(give: Callable[[int], Any]) -> Callable[..., Any]:
    def brevity(completions: list[str], **_: Any) -> Any:
        return give(len(completions))

    return brevity


def _raises(n: int) -> Any:
    raise KeyError("solution \x1b[31m")


BAD: dict[str, tuple[Callable[[int], Any], str]] = {
    "raises": (_raises, r"raised KeyError at step 1: 'solution .*test_failures.py.*in _raises"),
    "nothing": (lambda n: None, r"gave back None at step 1: expected a list of 8 numbers"),
    "one number": (lambda n: 1.0, r"gave back 1.0 \(float\) at step 1"),
    "text": (lambda n: "1" * n, r"gave back '11111111' \(str\) at step 1"),
    "too few": (lambda n: [0.0] * (n - 1), r"gave back 7 values at step 1"),
    "too many": (lambda n: [0.0] * (n + 1), r"gave back 9 values at step 1"),
    "a text among them": (lambda n: [0.0, "high"] + [0.0] * (n - 2), r"gave back 'high' \(str\) for completion 1"),
    "lists": (lambda n: [[0.0]] * n, r"gave back \[0.0\] \(list\) for completion 0"),
    "a matrix": (lambda n: torch.zeros(n, 2), r"gave back \[0.0, 0.0\] \(list\) for completion 0"),
    "a generator": (lambda n: (0.0 for _ in range(n)), r"gave back <generator .* at step 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_reward_that_goes_wrong_is_named_and_moves_no_weight(tmp_path: Path, name: str) -> None:
    give, message = BAD[name]
    made = trainer(tmp_path, [reward(give)])
    before = weights(made.model)
    with pytest.raises(RewardError, match=re.compile(f"reward 'brevity' {message}", re.DOTALL)) as caught:
        made.train()
    assert isinstance(caught.value.__cause__, KeyError) == (name == "raises")
    assert same_weights(before, weights(made.model))


GOOD: dict[str, Callable[[int], Any]] = {
    "numbers": lambda n: [float(i) for i in range(n)],
    "whole numbers and truth values": lambda n: [i % 2 == 0 if i % 3 else i for i in range(n)],
    "an array": lambda n: np.arange(n),
    "numpy's scalars": lambda n: list(np.arange(n)),
    "a tensor": lambda n: torch.arange(n, dtype=torch.float32),
    "tensors": lambda n: list(torch.arange(n)),
    "no opinion on some": lambda n: [None if i == 0 else math.nan if i == 1 else 1.0 for i in range(n)],
    "a tuple": lambda n: tuple(range(n)),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_counts_as_numbers(name: str) -> None:
    found = watched(reward(GOOD[name]), lambda: 1)(completions=["x"] * 8)
    for value, given in zip(found, list(GOOD[name](8)), strict=True):
        assert type(value) is float
        assert value == float(given) if given is not None and not math.isnan(given) else math.isnan(value)


def test_async_functions_partials_and_objects_keep_their_names() -> None:
    async def slow(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    class Judge:
        def __call__(self, completions: list[str], **_: Any) -> list[float]:
            return [2.0]

    async def broken(completions: list[str], **_: Any) -> list[float]:
        raise OSError("no server")

    assert asyncio.run(watched(slow, lambda: 1)(completions=["x"])) == [1.0]
    assert asyncio.run(watched(partial(slow), lambda: 1)(completions=["x"])) == [1.0]
    assert watched(partial(slow), lambda: 1).__name__ == "slow"
    assert watched(Judge(), lambda: 1)(completions=["x"]) == [2.0]
    assert watched(Judge(), lambda: 1).__name__ == "Judge"
    with pytest.raises(RewardError, match="reward 'broken' raised OSError at step 7: no server"):
        asyncio.run(watched(broken, lambda: 7)(completions=["x"]))


def test_a_reward_that_hangs_is_named_while_it_does_and_by_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outside, "NOTICE_S", 0.05)
    interrupt = Interrupt(trainer(tmp_path))
    release = threading.Event()

    def stuck(completions: list[str], **_: Any) -> list[float]:
        with interrupt.catching():
            os.kill(os.getpid(), 2)
            release.wait(0.5)
        return [0.0] * len(completions)

    watched(stuck, lambda: 3)(completions=["x"])
    err = capsys.readouterr().err
    assert re.search(r"Waiting for the reward 'stuck' for \d+ s \(step 3, process \d+\)\. Ctrl-C twice", err)
    assert re.search(r"SIGINT: finishing this optimizer step which has been waiting for the reward 'stuck'", err)
    assert outside.running() == ""


# The clock


def test_a_clock_that_runs_backwards_misleads_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the wall clock is an hour earlier than the one before."""
    real, looks = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() - 3600.0 * next(looks))
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    made = trainer(tmp_path, "random", max_steps=4, **saves)
    made.train()
    for age, name in enumerate(("checkpoint-4", "checkpoint-3")):  # files as a clock that was set back dates them
        for path in (tmp_path / "checkpoints" / name).rglob("*"):
            os.utime(path, (10**9 * (age + 1), 10**9 * (age + 1)))
    path, rejected = newest(tmp_path / "checkpoints")
    assert path == tmp_path / "checkpoints" / "checkpoint-4"
    assert rejected == []
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    seconds = [v for log in made.state.log_history for k, v in log.items() if k.startswith(("time/", "step_time"))]
    assert all(value >= 0 for value in seconds)


# Folders


def test_a_read_only_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """On a file system that is mounted read-only, which stops root too."""
    program = textwrap.dedent(f"""
        from vigor.runfolder import RunFolder, RunFolderError
        for name in ("", "/new/run"):
            try:
                RunFolder.open({str(tmp_path)!r} + name)
            except RunFolderError as error:
                print(error)
    """)
    mount = f'mount -t tmpfs -o ro,size=64k none {tmp_path} && {sys.executable} -c "$PROGRAM"'
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "--user", "sh", "-c", mount],
        env={**os.environ, "PROGRAM": program}, capture_output=True, text=True,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.stdout.count(f"{tmp_path} cannot be written to: it is read-only") == 2, done.stderr
    assert "--output_dir" in done.stdout


# Another process


PAIR = """
import os, signal, socket, sys, time, traceback
import torch
torch.set_num_threads(1)
import vigor.trainer
from vigor.cli import main
run, victim = sys.argv[1], int(sys.argv[2])
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
flags = {"output_dir": run, "max_steps": 500, "per_device_train_batch_size": 8, "max_completion_length": 8,
         "lab_eval_prompts": 0, "ddp_backend": "gloo", "reward_funcs": "random", "watch_accuracy": "false"}
argv = ["train", "--config", "lab", *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]
children = []
for rank in range(2):
    child = os.fork()
    if child == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        status = 99
        try:
            status = main(argv)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    children.append(child)
while not os.path.exists(os.path.join(run, "metrics.jsonl")):
    time.sleep(0.05)
os.kill(children[victim], signal.SIGKILL)
status = os.waitpid(children[1 - victim], 0)[1]
print("the other ended with", os.waitstatus_to_exitcode(status))
"""


def test_the_death_of_a_process_ends_the_other_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "pair.py").write_text(PAIR)
    done = forked(str(tmp_path / "pair.py"), tmp_path / "run", 1, processes=1, timeout=300)
    assert "the other ended with 1" in done.stdout, done.stderr[-3000:]
    assert "vigor train: another process of this run has ended" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
