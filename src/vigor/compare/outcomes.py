"""What finished runs came to: numbers by task, read from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from vigor.compare.plan import BASE, Run
from vigor.compare.runs import finished, folder_of
from vigor.runfolder import RunFolder

TRAINING = "training prompts"
"""Stands for a task where no held-out one is scored: the samples of the last tenth of the steps."""


@dataclass(frozen=True)
class Outcome:
    """One (world, method, seed): metric by task, such as {"lab:math": {"sampled": 0.81, "pass@4": 0.93, …}}."""

    world: str
    method: str
    seed: int
    tasks: dict[str, dict[str, float]]
    folder: Path | None
    """None for the base, whose numbers every run of the world and seed has."""


def outcomes(out: Path, runs: Sequence[Run], *, base: bool) -> list[Outcome]:
    """The finished runs, and with `base` the untrained model of each (world, seed) as the first of its runs saw it."""
    found: list[Outcome] = []
    for run in runs:
        folder = folder_of(out, run)
        if not finished(folder):
            continue
        results, metrics = folder.read_json("results.json"), folder.read_metrics()
        seen = any((o.method, o.world, o.seed) == (BASE, run.world, run.seed) for o in found)
        if base and not seen and results["before"]:
            before = {task: scores(score) for task, score in results["before"].items()}
            found.append(Outcome(run.world, BASE, run.seed, before, None))
        seconds = sum(record["time/step"] for record in metrics)
        after = {task: scores(score) for task, score in results["after"].items()} or {TRAINING: at_the_end(metrics)}
        tasks = {task: {**numbers, "seconds": seconds} for task, numbers in after.items()}
        found.append(Outcome(run.world, run.method, run.seed, tasks, folder.path))
    return found


def scores(score: dict[str, Any]) -> dict[str, float]:
    """The metrics of a `LabScore` as results.json holds it."""
    flat = {name: score[name] for name in ("sampled", "greedy", "entropy", "repetition")}
    flat["length"] = score["mean_length"]
    for name in ("pass", "majority"):
        flat.update({f"{name}@{k}": share for k, share in score[f"{name}_at_k"].items()})
    return flat


def at_the_end(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the last tenth of the steps, ten at least; what the run could not know is left out."""
    last = metrics[-max(10, len(metrics) // 10) :]
    named = {"sampled": "rewards/accuracy/mean", "entropy": "entropy", "length": "completions/mean_length"}
    values = {name: [r[key] for r in last if r.get(key) is not None] for name, key in named.items()}
    return {name: mean(given) for name, given in values.items() if given}


def environments(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The different (commit, packages) that the runs were made with; more than one is worth a warning."""
    kinds: list[dict[str, Any]] = []
    for outcome in found:
        if outcome.folder is not None:
            written = RunFolder(outcome.folder).read_json("environment.json")
            kind = {name: written[name] for name in ("commit", "packages", "platform", "cpu_count", "gpus")}
            if kind not in kinds:
                kinds.append(kind)
    return kinds
