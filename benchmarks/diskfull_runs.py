"""Runs of benchmarks/diskfull.py: one whose N-th call fails or whose disk is small, what it left, and the next one."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import torch

import vigor.trainer  # noqa: F401 - once, for all forks
from vigor import checkpoint
from vigor.cli import main
from vigor.lab.tokenizer import save_tokenizer
from vigor.report import charts
from vigor.runfolder import RunFolder

TIMED = re.compile(r"time/|step_time|train_")
UNCOMPARED = {"environment.json", "run.lock", "report.html", "curves.png", "trainer_state.json", "training_args.bin",
              "manifest.json", "COMMITTED", "results.json"}  # fmt: skip
"""Files that hold times or versions of a process, or hashes of such files; that they are there is compared."""
PAGE = 4096
WHOLE, REFUSED, SAVE = "all of it", "refused before it began", "a checkpoint"


@dataclass(frozen=True)
class Call:
    """One line of the log of diskfull.c."""

    number: int
    kind: str
    size: int
    path: str
    verdict: int


@dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    way: str
    at: int
    """The call or the bytes."""
    what: str
    """The call that failed first: kind and file."""
    status: int
    first: bool
    """No checkpoint was whole: made again rather than resumed."""
    problems: tuple[str, ...]


def infinite(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    """A reward that is infinite in the first step, so that the guard writes a dump and leaves the update out."""
    return [float("inf") if trainer_state.global_step == 0 else 0.0] * len(completions)


def settings(run: Path, model: Path) -> list[str]:
    flags = {
        "model_name_or_path": model, "prompts": "lab:math", "output_dir": run, "max_steps": 2, "save_strategy": "steps",
        "save_steps": 1, "save_total_limit": 1, "num_generations": 4, "per_device_train_batch_size": 8,
        "max_completion_length": 8, "lab_eval_prompts": 0, "learning_rate": 1e-3, "use_cpu": "true", "dtype": "float32",
        "gradient_checkpointing": "false", "max_skipped_updates": 1, "watch_accuracy": "false",
    }  # fmt: skip
    lists = {"reward_funcs": ["vigor", "co_rewarding_2", "diskfull_runs.infinite"], "reward_weights": ["1", "0", "0.5"]}
    argv = ["train", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
    return [*argv, *(part for name, values in lists.items() for part in (f"--{name}", *values))]


def save_base(folder: Path) -> Path:
    """A model of two layers with random weights, and the lab's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir()
    save_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def forked(argv: list[str], log: Path, before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Runs a command in a fork of this process; returns its exit status and what it printed."""
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = 99
        try:
            before()
            status = main(argv)
        except BaseException:
            traceback.print_exc()
        log.with_suffix(".modules").write_text("\n".join(sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, log.read_text("utf-8", errors="replace")


def arm(run: Path, number: int, stays: bool, log: Path) -> Callable[[], None]:
    """Lets the calls of this process be counted, and the one of this number fail; 0 for none."""

    def armed() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        library = ctypes.CDLL(os.environ["VIGOR_DISKFULL"])
        library.diskfull_arm(str(run).encode(), ctypes.c_long(number), int(stays), descriptor)

    return armed


def read_calls(log: Path) -> list[Call]:
    lines = [line.split("\t") for line in log.read_text("utf-8").splitlines()]
    return [Call(int(n), kind, int(size), path, int(verdict)) for n, kind, size, path, verdict in lines]


def fingerprint(run: Path) -> dict[str, Any]:
    """{file: what must be the same in two runs}, without what a clock says; dumps are an extra."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        if name.startswith("dumps/"):
            continue
        if path.suffix == ".parquet":
            try:
                found[name] = pd.read_parquet(path).to_json()
            except pa.ArrowInvalid as error:
                found[name] = str(error)
        elif name == "metrics.jsonl":
            records = RunFolder(run).read_metrics()
            found[name] = [{k: v for k, v in each.items() if not TIMED.match(k)} for each in records]
        elif path.name.startswith("vigor_state_"):
            state = torch.load(path, weights_only=True)
            state["metrics"] = {k: v for k, v in state["metrics"].items() if not TIMED.match(k)}
            found[name] = repr(state)
        else:
            uncompared = path.name in UNCOMPARED
            found[name] = "" if uncompared else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def whole(run: Path) -> list[int]:
    root = run / "checkpoints"
    found = [path for path in root.glob("checkpoint-*") if checkpoint.fault(path) is None]
    return sorted(map(checkpoint.step_of, found))


@dataclass(frozen=True)
class Straight:
    """The undisturbed run."""

    calls: list[Call]
    states: dict[int, dict[str, Any]]
    """Of each step, the fingerprint of its checkpoint."""
    final: dict[str, Any]
    size: int
    """Bytes of the folder on the disk."""

    def committed(self, number: int) -> int:
        """The step of the newest checkpoint that was whole before a call; 0 for none."""
        names = [Path(call.path) for call in self.calls if call.number < number and call.kind == "rename"]
        return max((checkpoint.step_of(path.parent) for path in names if path.name == checkpoint.MARKER), default=0)


class Campaign:
    """A folder, its undisturbed run, and the runs that are compared with it."""

    def __init__(self, scratch: Path) -> None:
        charts._finished = lambda *_: ""
        self.disk, self.log, self.calls = scratch / "disk", scratch / "log", scratch / "calls"
        self.run = self.disk / "run"
        self.disk.mkdir()
        self.argv = settings(self.run, save_base(scratch / "base"))
        self.straight = self._undisturbed()

    def _undisturbed(self) -> Straight:
        def ended(*flags: str) -> None:
            status, said = forked([*self.argv, *flags], self.log, arm(self.run, 0, False, self.calls))
            if status:
                raise SystemExit(f"the undisturbed run ended with {status}:\n{said[-4000:]}")
            for name in self.log.with_suffix(".modules").read_text().split():
                with contextlib.suppress(ImportError):  # made up by a library
                    importlib.import_module(name)
            gc.freeze()

        ended("--save_total_limit", "9")
        states = {step: fingerprint(self.run / "checkpoints" / f"checkpoint-{step}") for step in whole(self.run)}
        assert list(states) == [1, 2], states
        self.remove()
        ended()
        calls = read_calls(self.calls)
        self._refuse_unseen(calls)
        final = fingerprint(self.run)
        size = sum(path.lstat().st_blocks * 512 for path in self.run.rglob("*"))
        self.remove()
        return Straight(calls, states, final, size)

    def _refuse_unseen(self, calls: list[Call]) -> None:
        """Every byte of every file must have been written by a call that was counted."""
        written = Counter[tuple[str, str]]()
        for call in calls:
            written[place(call.path)] += call.size * (call.kind in ("write", "extend"))
        for path in self.run.rglob("*"):
            size, seen = path.stat().st_size, written[place(str(path))]
            if path.is_file() and size > seen:
                raise SystemExit(f"{path} has {size} bytes, of which {seen} were seen being written")

    def remove(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)

    def fail_at(self, number: int, stays: bool) -> Outcome:
        """One run whose N-th call fails, and the one after it."""
        status, said = forked(self.argv, self.log, arm(self.run, number, stays, self.calls))
        failed = next(call for call in read_calls(self.calls) if call.verdict)
        what = f"{failed.kind} {group(os.path.relpath(failed.path, self.run))}"
        return self._finish("stays" if stays else "once", number, what, status, said, self.straight.committed(number))

    def fit_into(self, size: int) -> Outcome:
        """One run on a tmpfs of so many bytes, and the one after it, with room."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(self.disk)], check=True)
        try:
            status, said = forked(self.argv, self.log)
            subprocess.run(["mount", "-o", "remount,size=64m", str(self.disk)], check=True)
            named = re.search(rf"{re.escape(str(self.run))}/(\S+?)[\s:.]* cannot be written|step \d+ could not", said)
            what = WHOLE if status == 0 else REFUSED if status == 2 else group(named[1]) if named and named[1] else SAVE
            return self._finish("sizes", size, what, status, said, 0)
        finally:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)

    def _finish(self, way: str, at: int, what: str, status: int, said: str, least: int) -> Outcome:
        problems = [*self._told(status, said), *self._left(status, least)]
        again = bool(whole(self.run))
        if status != 0:
            if not again:
                self.remove()
            resumed, told = forked([*self.argv, *(["--resume"] if again else [])], self.log)
            if resumed:
                problems.append(f"the next run ended with {resumed}: {told.strip()[-600:]}")
        final = fingerprint(self.run)
        newest = max(whole(self.run), default=0)
        older = tuple(f"checkpoints/checkpoint-{step}/" for step in whole(self.run) if step < newest)  # compared above
        problems += differences(self.straight.final, {k: v for k, v in final.items() if not k.startswith(older)})
        self.remove()
        return Outcome(way, at, what, status, not again, tuple(problems))

    def _told(self, status: int, said: str) -> list[str]:
        """What is wrong with the way in which the run ended."""
        if status == 0:
            return []
        found = [] if status in (1, 2) else [f"exit status {status}"]
        told = said[said.find("vigor train: ") :] if "vigor train: " in said else ""
        if "Traceback" in said or not told:
            return [*found, f"no message, but: {said.strip()[-600:]}"]
        if told.count("\n") > 40:
            found.append("a message of more than a screen")
        remedy = "--resume" if whole(self.run) else "--output_dir"
        for needed in (str(self.run), "No space left|a write failed|free space", "Make space", remedy):
            if not re.search(needed, told):
                found.append(f"the message does not say {needed!r}: {told.strip()[:400]}")
        return found

    def _left(self, status: int, least: int) -> list[str]:
        """What is wrong with what the run left behind."""
        found = []
        steps = whole(self.run)
        if max(steps, default=0) < least:
            found.append(f"checkpoint-{least} was whole and is lost; there is {steps}")
        for step in steps:
            state = fingerprint(self.run / "checkpoints" / f"checkpoint-{step}")
            found += [f"checkpoint-{step}: {each}" for each in differences(self.straight.states[step], state)]
        if (model := self.run / "model").exists():
            full = {k.removeprefix("model/"): v for k, v in self.straight.final.items() if k.startswith("model/")}
            found += [f"model/ is not whole: {each}" for each in differences(full, fingerprint(model))]
        for dump in (self.run / "dumps").glob("step-*"):
            names = {path.name for path in dump.iterdir()}
            if not {"model", "batch-0.pt", "dump.json"} <= names:
                found.append(f"{dump.name} holds {sorted(names)} only")
        if (self.run / "config.yaml").exists():
            code, told = forked(["report", str(self.run), "--out", str(self.log.with_name("page.html"))], self.log)
            if code == 99 or "Traceback" in told:
                found.append(f"`vigor report` fails on it: {told.strip()[-600:]}")
        if status and whole(self.run):
            hidden = [path.name for path in (self.run / "checkpoints").iterdir() if path.name.startswith(".")]
            found += [f"checkpoints/{name} keeps its space" for name in hidden]
        return found


def place(path: str) -> tuple[str, str]:
    """Folder and name of a file. Safetensors are written beside their place, and renamed without the C library."""
    folder, name = os.path.split(group(path))
    return folder, "*.safetensors" if name.endswith(".safetensors") else name


def group(name: str) -> str:
    """The file without what differs between steps."""
    name = re.sub(r"(checkpoint|(?<=/)\.?step)-\d+", r"\1-N", name)
    name = re.sub(r"(^|/)\.(step-N|model)(?=/|$)", r"\1\2", name)
    name = re.sub(r"_\d{5}\.parquet", "_N.parquet", name)
    name = re.sub(r"(^|/)\.([^/]+)\.new$", r"\1\2", name)
    name = re.sub(r"(^|/)\.tmp\w{6}$", r"\1*.safetensors", name)
    return name.replace(".writing/", "")


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    lines = [f"{name} is missing" for name in expected.keys() - found.keys()]
    lines += [f"{name} is left over" for name in found.keys() - expected.keys()]
    lines += [f"{name} differs" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    return sorted(lines)
