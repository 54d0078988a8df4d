"""What the completions of a run say that its logs do not: repetition, distinct answers, and rank bins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vigor.rewards.agreement import boxed_answer
from vigor.rewards.repetition import repeated_share

if TYPE_CHECKING:
    import pandas as pd

N_BINS = 4
_PIECES = re.compile(r"\w+|[^\w\s]")


def text_repetition(text: str) -> float:
    """Share of the 3-grams of words and signs that came before in the text; tokens are not on disk."""
    pieces: dict[str, int] = {}
    return repeated_share([pieces.setdefault(piece, len(pieces)) for piece in _PIECES.findall(text)], 3)


def measured(completions: pd.DataFrame) -> pd.DataFrame:
    """The completions with `repetition`, `answer` (what \\boxed{} holds, None without) and `bin` beside them.

    `bin` is the quarter of its group, by advantage, that a row falls into: 0 the lowest, 3 the highest. Rows of equal
    advantage share their mean place; rows without an advantage have no bin.
    """
    frame = completions.copy()
    frame["repetition"] = [text_repetition(text) for text in frame["completion"]]
    frame["answer"] = [boxed_answer(text) for text in frame["completion"]]
    if "advantage" in frame:
        place = frame.groupby(["step", "group"])["advantage"].rank(method="average")
        size = frame.groupby(["step", "group"])["advantage"].transform("count")
        frame["bin"] = ((place - 0.5) / size * N_BINS).apply("floor").clip(upper=N_BINS - 1)
    return frame


def by_step(frame: pd.DataFrame) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each measure of `measured` completions.

    "repetition": mean; "distinct": mean share of a group's completions that differ; "answers": mean number of different
    answers in a group, left out where no completion has one.
    """
    if not len(frame):
        return {}
    groups = frame.groupby(["step", "group"])
    found = {
        "repetition": frame.groupby("step")["repetition"].mean(),
        "distinct": (groups["completion"].nunique() / groups.size()).groupby("step").mean(),
    }
    if frame["answer"].notna().any():
        found["answers"] = groups["answer"].nunique().groupby("step").mean()
    return {name: [(int(step), float(value)) for step, value in values.items()] for name, values in found.items()}


def bins(frame: pd.DataFrame, columns: Sequence[str], steps: tuple[float, float]) -> dict[str, list[float | None]]:
    """Mean of each column in each rank bin, over the steps from `steps[0]` to `steps[1]`; None for an empty bin."""
    if "bin" not in frame:
        return {}
    part = frame[frame["step"].between(*steps)].groupby("bin")
    found: dict[str, list[float | None]] = {}
    for column in columns:
        if column in frame and frame[column].notna().any():
            means = part[column].mean().to_dict()
            found[column] = [None if means.get(i) != means.get(i) else means.get(i) for i in range(N_BINS)]
    return found
