"""Golden trajectories: every metric of the first lab steps of each method, and where another build first differs.

    OMP_NUM_THREADS=1 python benchmarks/trajectory.py record docs/results/trajectories.json
    OMP_NUM_THREADS=1 python benchmarks/trajectory.py compare docs/results/trajectories.json --methods vigor random

`compare` trains again what the file holds, and prints for each method the first step and metric that differ by more
than the tolerance, with both values; the exit status is 1 if there is any. On the machine and with the versions that
recorded it the tolerance may be 0. Elsewhere sums round differently, and after a first token that is sampled otherwise
two runs have nothing in common: the tolerance is for the steps before that.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from vigor.cli import main
from vigor.runfolder import RunFolder

METHODS = (
    "vigor",
    "vigor_zscore",
    "self_certainty",
    "entropy",
    "logprob",
    "majority_vote",
    "empo",
    "rlpr",
    "accuracy",
    "random",
)
STEPS = 20
TIMED = ("time/", "step_time", "train_")
SETTINGS = {
    "per_device_train_batch_size": 16, "max_completion_length": 32, "max_prompts": 64, "lab_eval_prompts": 0,
    "log_completions": False,
}  # fmt: skip
"""Beside the recipe `lab`: a quarter of its batch, and as many prompts however many steps are done."""


def trajectory(method: str, steps: int) -> list[dict[str, Any]]:
    """The metrics of each step, without what a clock says."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        run = Path(scratch) / "run"
        changes = {**SETTINGS, "max_steps": steps, "reward_funcs": method, "output_dir": run}
        if main(["train", "--config", "lab", *(part for k, v in changes.items() for part in (f"--{k}", str(v)))]):
            raise SystemExit(f"{method}: the run failed")
        records = RunFolder(run).read_metrics()
    return [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in records]


def first_difference(
    golden: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], tolerance: float
) -> tuple[int, str, Any, Any] | None:
    """(step, metric, golden value, value found) of the first that differ; None if none does.

    Args:
        golden, found: records of steps; the shorter list counts.
        tolerance: relative, and absolute for values below 1.
    """
    for before, now in zip(golden, found, strict=False):
        for name in [*before, *(name for name in now if name not in before)]:
            a, b = before.get(name, "not logged"), now.get(name, "not logged")
            numbers = all(isinstance(each, int | float) for each in (a, b))
            if a != b and not (numbers and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)):
                return before["step"], name, a, b
    return None


def record(path: Path, methods: Sequence[str], steps: int) -> int:
    """Writes the file."""
    content = {
        "recipe": "lab", "settings": SETTINGS, "steps": steps, "seed": 0, "date": str(date.today()),
        "made_on": {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__},
        "methods": {method: trajectory(method, steps) for method in methods},
    }  # fmt: skip
    path.write_text(
        json.dumps(content, indent=None, separators=(",", ":")).replace('{"step"', '\n{"step"') + "\n", "utf-8"
    )
    return 0


def compare(path: Path, methods: Sequence[str] | None, steps: int, tolerance: float) -> int:
    """Prints a line a method; returns 1 if one differs."""
    golden = json.loads(path.read_text("utf-8"))["methods"]
    differing = 0
    for method in methods or golden:
        found = trajectory(method, min(steps, len(golden[method])))
        difference = first_difference(golden[method], found, tolerance)
        if difference is None:
            print(f"{method}: {len(found)} steps, no metric differs by more than {tolerance:g}", flush=True)
        else:
            step, name, before, now = difference
            print(f"{method}: step {step} is the first that differs: {name} was {before!r}, is {now!r}", flush=True)
            differing = 1
    return differing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--methods", nargs="+", help="default: those of the file; to record, ten")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "record":
        sys.exit(record(args.file, args.methods or METHODS, args.steps))
    sys.exit(compare(args.file, args.methods, args.steps, args.tolerance))
