"""Rows of the common table: agreement within the group (family F2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from rewards_table import BATCH, Completion, G, Row
from torch import nn

Judge = Callable[[Sequence[Completion], Sequence[Completion]], list[float]]
"""(one group, its twin) -> a score for each completion of the group."""

_TEXTS = (r"\boxed{72}", r"so \boxed{1} \boxed{72}", r"\boxed{}", r"\boxed{71}", r"\boxed{0.5}", r"\boxed{2}")
_TEXTS += (r"\boxed{ \frac12 }", r"\boxed{0.5}")
_TEACHER = (r"\boxed{71}", "none", r"\boxed{71}", r"\boxed{72}", r"\boxed{0.5}", r"\boxed{0.5}", "", r"\boxed{2}")
AGREEMENT = tuple(
    replace(c, text=text, columns={**c.columns, "pair": 3, "teacher_completion": teacher})
    for c, text, teacher in zip(BATCH, _TEXTS, _TEACHER, strict=True)
)
"""No group has two answers that are equally common, so that the order of its rows decides nothing."""
_VALUES = {r"\frac12": Fraction(1, 2), "0.5": Fraction(1, 2)}


def answer(text: str) -> str | None:
    if "\\boxed{" not in text:
        return None
    found = text.rsplit("\\boxed{", 1)[1].rsplit("}", 1)[0].strip()
    return found or None


def value(text: str) -> Fraction | None:
    found = answer(text)
    return None if found is None else _VALUES.get(found) or Fraction(found)


def most_common(texts: Sequence[str]) -> str | None:
    counts = Counter(found for text in texts if (found := answer(text)) is not None)
    return counts.most_common(1)[0][0] if counts else None


def grouped(judge: Judge) -> Callable[[nn.Module, Sequence[Completion]], list[float]]:
    def slow(model: nn.Module, batch: Sequence[Completion]) -> list[float]:
        groups = [batch[i : i + G] for i in range(0, len(batch), G)]
        return [x for k, group in enumerate(groups) for x in judge(group, groups[1 - k] if len(groups) > 1 else ())]

    return slow


def vote(group: Sequence[Completion], twin: Sequence[Completion]) -> list[float]:
    label = most_common([c.text for c in group])
    known = None if label is None else value(f"\\boxed{{{label}}}")
    return [float(value(c.text) is not None and value(c.text) == known) for c in group]


def share(group: Sequence[Completion], twin: Sequence[Completion]) -> list[float]:
    sizes = [sum(value(d.text) == value(c.text) for d in group) if value(c.text) is not None else 0 for c in group]
    return [n / len(group) if max(sizes) > 1 else 0.0 for n in sizes]


def twin_vote(group: Sequence[Completion], twin: Sequence[Completion]) -> list[float]:
    label = most_common([c.text for c in twin])
    return [float(answer(c.text) is not None and answer(c.text) == label) for c in group]


def teacher_vote(group: Sequence[Completion], twin: Sequence[Completion]) -> list[float]:
    label = most_common([c.columns["teacher_completion"] for c in group])
    return [float(answer(c.text) is not None and answer(c.text) == label) for c in group]


def first_two(scores: list[float]) -> list[float]:
    return [x if i % G < 2 else float("nan") for i, x in enumerate(scores)]


def _row(judge: Judge, **others: object) -> Row:
    return Row(grouped(judge), batch=AGREEMENT, whole_groups=True, **others)  # type: ignore[arg-type]


ROWS: dict[str, Row] = {
    "majority_vote": _row(vote),
    "majority_vote(trained=2)": _row(vote, shape=first_two, follows_rows=False),
    "empo": _row(share),
    "co_rewarding_1": _row(twin_vote),
    "co_rewarding_2": _row(teacher_vote),
}
