"""Two evaluations of the same problems, held against each other problem by problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vigor.evaluation.metrics import bootstrap, central
from vigor.evaluation.results import EXTRACTIONS, read, read_problems
from vigor.evaluation.suites import EvalError

DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """B minus A on one task and extraction; shares in [0, 1]."""

    task: str
    extraction: str
    problems: int
    first: float
    second: float
    low: float
    high: float
    """95 % interval of the difference: bootstrap over problems, both models' answers to a problem drawn together."""
    p: float
    """That such a difference, or a larger one, comes of chance."""
    test: str


def compare(first: Path, second: Path) -> list[Difference]:
    """All tasks and extractions that two results folders share.

    Raises EvalError where they share none, or where a task's problems differ.
    """
    a, b = read(first), read(second)
    shared = [name for name in a["tasks"] if name in b["tasks"]]
    if not shared:
        raise EvalError(
            f"nothing to compare: {first} has {', '.join(a['tasks'])}, and {second} has {', '.join(b['tasks'])}."
        )
    found = []
    for name in shared:
        if a["tasks"][name]["problems_sha256"] != b["tasks"][name]["problems_sha256"]:
            raise EvalError(
                f"{name}: the two folders hold other problems ({a['tasks'][name]['problems']} of "
                f"{a['tasks'][name]['source']}; {b['tasks'][name]['problems']} of {b['tasks'][name]['source']}). Run "
                "both with the same data and the same --limit."
            )
        rows = list(zip(read_problems(first, name), read_problems(second, name), strict=True))
        for key in EXTRACTIONS:
            if f"correct_{key}" in rows[0][0]:
                found.append(difference(name, key, [(x[f"correct_{key}"], y[f"correct_{key}"]) for x, y in rows]))
    return found


def difference(task: str, extraction: str, pairs: Sequence[tuple[Sequence[bool], Sequence[bool]]]) -> Difference:
    """From the verdicts on both models' samples, problem by problem.

    One sample each: McNemar's exact test. Several: the paired bootstrap, of differences that are centred on zero.
    """
    first = [sum(x) / len(x) for x, _ in pairs]
    second = [sum(y) / len(y) for _, y in pairs]
    each = [y - x for x, y in zip(first, second, strict=True)]
    n, mean = len(each), sum(each) / len(each)
    drawn = bootstrap([(value, 1.0) for value in each], DRAWS)
    if all(len(x) == len(y) == 1 for x, y in pairs):
        p, test = mcnemar(sum(value > 0 for value in each), sum(value < 0 for value in each)), "McNemar, exact"
    else:
        extreme = sum(abs(value - mean) >= abs(mean) - 1e-12 for value in drawn)
        p, test = min(1.0, (extreme + 1) / (DRAWS + 1)), "paired bootstrap"
    return Difference(task, extraction, n, sum(first) / n, sum(second) / n, *central(drawn), p, test)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test: under no difference, either model is the one that is right half the time.

    ``gained`` and ``lost`` count the problems on which only the second, only the first model is right.
    """
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


def table(differences: Sequence[Difference]) -> list[tuple[str, ...]]:
    """Header and rows, shares in percent."""
    head = ("task", "problems", "extraction", "A", "B", "B − A", "95 % interval", "p", "test")
    rows = [
        (
            d.task,
            str(d.problems),
            d.extraction,
            f"{100 * d.first:.1f}",
            f"{100 * d.second:.1f}",
            f"{100 * (d.second - d.first):+.1f}",
            f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]",
            f"{d.p:.3g}",
            d.test,
        )
        for d in differences
    ]
    return [head, *rows]


def markdown(first: Path, second: Path, differences: Sequence[Difference]) -> str:
    """The table as Markdown, with the two models' names."""
    head, *rows = table(differences)
    names: list[Any] = [read(folder)["model"]["name"] for folder in (first, second)]
    lines = [
        f"A: {names[0]} ({first}). B: {names[1]} ({second}). In percent.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
