"""Throws bad and good input at the command, in this process, and counts what must not happen.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --inputs 10000 --seed 0 --out docs/results/fuzz.md

Each input is a command line and the files that it names (benchmarks/fuzz_inputs.py). It is in order if `vigor.cli.main`
comes back within the time limit with status 0 or 2 (1 for `replay`: not reproduced), no exception passes, a refusal
says something, on one screen, nothing that is printed holds a control character, and no file has been made or changed
other than those asked for. No model is loaded: what is valid ends at `--dry_run`, or where the weights are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fuzz_inputs import KINDS, Case, World
from hypothesis import HealthCheck, Phase, given, seed, settings

from vigor.cli import main

LIMIT_S = 20
MEMORY = 16 * 2**30
"""Of address space: an input that makes the command take all there is must not take the machine with it."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LINES, CHARACTERS = 60, 40_000
"""Of a refusal: usage and message."""


class TooLong(BaseException):
    """The time limit has passed; no `except Exception` takes it."""


@dataclass
class Tally:
    """What became of the inputs."""

    kinds: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, Case]] = field(default_factory=list)
    slowest: float = 0.0


# What the inputs start from -------------------------------------------------------------------------------------------


def make_world(root: Path) -> World:
    """A model without weights, and a run of two steps with a checkpoint, a dump and a comparison made from it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from vigor.lab.tokenizer import save_tokenizer

    model, full = root / "model", root / "full"
    for folder in (model, full):
        folder.mkdir()
        save_tokenizer(folder)
    size = len(AutoTokenizer.from_pretrained(model))
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    config.save_pretrained(model)
    LlamaForCausalLM(config).save_pretrained(full)
    (root / "p.jsonl").write_text('{"prompt": "Q:1+1\\nA:", "answer": "2"}\n' * 4)
    run = root / "run"
    flags = {
        "prompts": root / "p.jsonl",
        "model_name_or_path": full,
        "output_dir": run,
        "num_generations": 4,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_checkpointing": False,
        "reward_funcs": "logprob",
        "report_to": "none",
    }
    with _quiet():
        if main(["train", *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]):
            raise SystemExit("the run that the inputs start from failed")
    for name in ("results.json", "curves.png", "report.html"):
        (run / name).unlink()
    kept = ("step", "loss", "entropy", "rewards/logprob/mean", "time/step")  # a chart each
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({k: r[k] for k in kept}) + "\n" for r in lines))
    return World(model, run, _dump(root, run), _comparison(root, run))


def _dump(root: Path, run: Path) -> Path:
    """A dump as far as its reader looks before it loads a model."""
    folder = root / "dump"
    folder.mkdir()
    about = {
        "step": 1,
        "why": "the loss is nan",
        "grad_norm": "nan",
        "processes": 1,
        "settings": {"temperature": 1.0},
        "steps_per_generation": 1,
        "vllm_weights": False,
        "base_model": str(run / "model"),
        "process_id": 1,
    }
    (folder / "dump.json").write_text(json.dumps(about))
    torch.save({"batches": [], "losses": []}, folder / "batch-0.pt")
    return folder


def _comparison(root: Path, run: Path) -> Path:
    import shutil

    folder = root / "comparison"
    shutil.copytree(run, folder / "runs" / "a", ignore=shutil.ignore_patterns("checkpoints", "model"))
    estimate = {"mean": 0.5, "half": 0.1, "n": 2, "low": 0.4, "high": 0.6}
    row = {
        "method": "vigor",
        "n_seeds": 2,
        "metrics": {"sampled": estimate},
        "difference": estimate,
        "verdict": "better",
    }
    content = {
        "worlds": {"lab": {}},
        "runs": [{"world": "lab", "method": "vigor", "seed": 0, "folder": "runs/a", "tasks": {}}],
        "tables": [{"world": "lab", "task": "lab:math", "baseline": "vigor", "rows": [row]}],
    }
    (folder / "compare.json").write_text(json.dumps(content))
    return folder


# One input ------------------------------------------------------------------------------------------------------------


def judge(case: Case, tally: Tally) -> str | None:
    """Runs a case in an empty folder; returns what is wrong with how the command took it."""
    before = dict(os.environ), os.getcwd(), list(sys.path), list(warnings.filters)
    out, err = io.StringIO(), io.StringIO()
    tally.kinds[case.kind] += 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        case.prepare(folder)
        os.chdir(folder)
        seen = _files(folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limit():
                status: Any = main(list(case.argv))
        except SystemExit as stopped:
            status = stopped.code or 0
        except TooLong:
            return f"hang: no end within {LIMIT_S} s"
        except BaseException as error:
            return f"traceback: {''.join(traceback.format_exception_only(error))[:300]}{_where(error)}"
        finally:
            tally.slowest = max(tally.slowest, time.monotonic() - began)
            os.chdir(before[1])
            os.environ.clear()
            os.environ.update(before[0])
            sys.path[:], warnings.filters[:] = before[2], before[3]
        changed = _files(folder).items() ^ seen.items()
    told = out.getvalue() + err.getvalue()
    tally.outcomes["accepted" if status == 0 else "refused"] += 1
    if status not in ((0, 1, 2) if case.argv[:1] == ("replay",) else (0, 2)):
        return f"status {status}: {told[-300:]}"
    asked = ("r/report.html",) if case.argv[:1] == ("report",) and status == 0 else ()
    if left := sorted({str(path) for path, _ in changed if str(path) not in asked}):
        return f"half-written: {left[:5]} after status {status}"
    if found := CONTROL.search(told):
        return f"control character {found[0]!r} printed: {told[max(0, found.start() - 80) : found.end() + 20]!r}"
    if status == 2 and not told.strip():
        return "refused without a word"
    if status and (err.getvalue().count("\n") > LINES or len(err.getvalue()) > CHARACTERS):
        return f"more than a screen: {len(err.getvalue())} characters"
    if "Traceback (most recent call last)" in told:
        return f"traceback printed: {told[-300:]}"
    return None


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def stop(*_: Any) -> NoReturn:
        raise TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _files(folder: Path) -> dict[Path, str]:
    """Every name below a folder, with the hash of a regular file's contents."""
    found = {}
    for path in folder.rglob("*"):
        regular = path.is_file() and not path.is_symlink()
        found[path.relative_to(folder)] = hashlib.sha256(path.read_bytes()).hexdigest() if regular else "other"
    return found


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/vigor/" in f.filename][-1:]
    return " @ " + " <- ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in [frames[-1], *ours])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# All of them ----------------------------------------------------------------------------------------------------------


def fuzz(world: World, inputs: int, start: int, kinds: Sequence[str] = tuple(KINDS)) -> Tally:
    """Tries so many inputs; goes on after a failure, so that all kinds of them are seen."""
    tally = Tally()
    for kind in kinds:
        share, strategy = KINDS[kind]
        wanted = round(inputs * share / sum(KINDS[k][0] for k in kinds))

        @seed(start)
        @settings(
            max_examples=wanted,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy(world))
        def try_one(case: Case) -> None:
            if (problem := judge(case, tally)) is not None:
                tally.failures.append((problem, case))

        try_one()
    return tally


def report(tally: Tally, args: argparse.Namespace, seconds: float) -> str:
    """The result as a page."""
    lost = Counter(problem.split(":")[0] for problem, _ in tally.failures)
    named = ("traceback", "hang", "half-written")
    machine = f"{os.cpu_count()} vCPUs ({platform.machine()}) shared with other work, one thread"
    lines = [
        "# Results: bad input\n",
        f"`benchmarks/fuzz.py --inputs {args.inputs} --seed {args.seed}` on {date.today()}: {machine}, Python "
        f"{platform.python_version()}, {seconds:.0f} s in all, the slowest input {tally.slowest:.1f} s.\n",
        "| | |\n|---|---:|",
        f"| inputs | {sum(tally.kinds.values()):,} |",
        *(f"| of them {kind}s | {count:,} |" for kind, count in sorted(tally.kinds.items())),
        *(f"| {name} | {tally.outcomes[name]:,} |" for name in ("accepted", "refused")),
        *(f"| {name} | {lost[name]} |" for name in named),
        f"| anything else out of order | {sum(lost.values()) - sum(lost[name] for name in named)} |",
    ]
    return "\n".join(lines) + "\n"


def _distinct(failures: Sequence[tuple[str, Case]]) -> dict[str, tuple[Case, int]]:
    """The first case of each problem, told apart by where an exception came from, and how many there are."""
    found: dict[str, tuple[str, Case, int]] = {}
    for problem, case in failures:
        key = problem.split(" @ ")[-1] if " @ " in problem else problem[:40]
        first, example, count = found.get(key, (problem, case, 0))
        found[key] = first, example, count + 1
    return {problem: (case, count) for problem, case, count in found.values()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--out", type=Path, help="write the result as a page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as scratch:
        made = make_world(Path(scratch))
        began = time.monotonic()
        found = fuzz(made, args.inputs, args.seed, args.kinds)
    page = report(found, args, time.monotonic() - began)
    print(page)
    for problem, (case, count) in _distinct(found.failures).items():
        print(f"{count} × {problem}\n    {' '.join(case.argv)[:300]!r}\n    {case.what[:300]}", flush=True)
    if args.out:
        args.out.write_text(page, "utf-8")
    sys.exit(bool(found.failures))
