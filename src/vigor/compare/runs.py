"""Carries a plan out: a `vigor train` process a run, several at a time, each run kept, resumed or done again.

OUT/settings/NAME.yaml   what the run was started with
OUT/logs/NAME.log        what it printed
OUT/runs/NAME/           its run folder
OUT/runs/.NAME.lock      held by the process that writes the folder, inherited from whoever started it

A run is finished once results.json can be read. The lock belongs to the training process: one that survived the
death of its parent is waited for, never doubled.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from vigor.compare.plan import Run
from vigor.reading import ReadError, read_settings
from vigor.runfolder import RunFolder

POLL_S = 0.2
STOP_S = 30.0
"""Seconds that a process has to save its state and to end when the comparison is stopped."""
Command = Callable[[Path, Path, bool], list[str]]
"""(settings file, run folder, whether to resume) -> the command line of one run."""


@dataclass(frozen=True)
class Failed:
    """A run whose process ended with an error."""

    run: Run
    log: Path
    reason: str


@dataclass
class _Started:
    run: Run
    process: subprocess.Popen[bytes]
    lock: int
    resumed: bool
    since: float


def folder_of(out: Path, run: Run) -> RunFolder:
    """The run's folder, whether or not it is there."""
    return RunFolder(out / "runs" / run.name)


def finished(folder: RunFolder) -> bool:
    """True if the run has left results.json, whole, and metrics."""
    try:
        results = folder.read_json("results.json")
    except (OSError, ReadError):
        return False
    return "after" in results and bool(folder.read_metrics())


def check_settings(out: Path, runs: Sequence[Run]) -> None:
    """Refuses a folder in which a run of the same name was made with other settings.

    Raises:
        ValueError: with the settings that differ.
    """
    for run in runs:
        path = _settings(out, run)
        if not path.is_file() or not folder_of(out, run).path.exists():
            continue
        there = read_settings(path)
        if different := sorted(k for k in {*there, *run.settings} if there.get(k) != run.settings.get(k)):
            told = ", ".join(f"{k} {there.get(k)!r} there, {run.settings.get(k)!r} now" for k in different)
            raise ValueError(
                f"{folder_of(out, run).path} was made with other settings ({told}). Take another --output_dir, or "
                "remove that folder."
            )


def train_command(settings: Path, folder: Path, resume: bool) -> list[str]:
    """What runs one run: `vigor train` in this Python."""
    command = [sys.executable, "-m", "vigor", "train", "--config", str(settings), "--output_dir", str(folder)]
    return [*command, *(["--resume"] if resume else [])]


def execute(
    out: Path,
    runs: Sequence[Run],
    *,
    jobs: int,
    say: Callable[[str], None] = print,
    command: Command = train_command,
) -> list[Failed]:
    """Runs what is not finished, `jobs` processes at a time; returns those that failed.

    However this function is left, no process that it started goes on.
    """
    for name in ("settings", "logs", "runs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    waiting = deque(run for run in runs if not finished(folder_of(out, run)))
    if kept := len(runs) - len(waiting):
        say(f"{kept} of {len(runs)} runs are finished already.")
    active: list[_Started] = []
    failed: list[Failed] = []
    told: set[str] = set()
    total, done = len(waiting), 0
    try:
        while waiting or active:
            for _ in range(len(waiting)):
                if len(active) >= jobs:
                    break
                run = waiting.popleft()
                lock = _lock(out, run)
                if lock is None:
                    if run.name not in told:
                        say(f"{run.name} is being run by another process: waiting for it.")
                        told.add(run.name)
                    waiting.append(run)
                elif finished(folder_of(out, run)):  # by the process that held the lock
                    os.close(lock)
                    done += 1
                else:
                    active.append(_start(out, run, command, lock, resume=_can_resume(out, run)))
            time.sleep(POLL_S)
            for started in [started for started in active if started.process.poll() is not None]:
                active.remove(started)
                run = started.run
                if finished(folder_of(out, run)):
                    done += 1
                    say(f"[{done}/{total}] {run.name}  {time.monotonic() - started.since:.0f} s")
                    os.close(started.lock)
                elif started.resumed:
                    say(f"{run.name} could not be resumed ({_reason(out, run)}): starting it anew.")
                    active.append(_start(out, run, command, started.lock, resume=False))
                else:
                    failed.append(Failed(run, _log(out, run), _reason(out, run)))
                    say(f"{run.name} failed ({failed[-1].reason}): see {failed[-1].log}.")
                    os.close(started.lock)
    finally:
        _stop(active)
    return failed


def _can_resume(out: Path, run: Run) -> bool:
    return folder_of(out, run).last_checkpoint(hashes=False)[0] is not None


def _start(out: Path, run: Run, command: Command, lock: int, *, resume: bool) -> _Started:
    folder = folder_of(out, run)
    if not resume and folder.path.exists():
        shutil.rmtree(folder.path)
    _settings(out, run).write_text(yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True), "utf-8")
    with _log(out, run).open("ab" if resume else "wb") as log:
        process = subprocess.Popen(
            command(_settings(out, run), folder.path, resume),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            pass_fds=(lock,),
        )
    return _Started(run, process, lock, resume, time.monotonic())


def _lock(out: Path, run: Run) -> int | None:
    """A locked file descriptor, or None where another process has it."""
    descriptor = os.open(out / "runs" / f".{run.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _stop(active: Sequence[_Started]) -> None:
    for started in active:
        started.process.terminate()
    deadline = time.monotonic() + STOP_S
    for started in active:
        try:
            started.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            started.process.kill()
            started.process.wait()
        os.close(started.lock)


def _reason(out: Path, run: Run) -> str:
    """The last line of the log that says something."""
    lines = [line for line in _log(out, run).read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"


def _settings(out: Path, run: Run) -> Path:
    return out / "settings" / f"{run.name}.yaml"


def _log(out: Path, run: Run) -> Path:
    return out / "logs" / f"{run.name}.log"
