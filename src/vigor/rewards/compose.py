"""Rewards made of other rewards, and weights that change while a run lasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal, get_args

from torch import Tensor

from vigor import rewards
from vigor.rewards.base import Reward, unshaped
from vigor.rollouts import BatchTexts, Rollouts
from vigor.signals import PolicyPass

Schedule = Literal["linear", "cosine"]


def resolve(reward: str | Reward) -> Reward:
    """A reward from its spec, such as "accuracy" or "random(p=0.3)"; a reward stays itself.

    Raises:
        ValueError: unknown name or option.
    """
    return reward if isinstance(reward, Reward) else rewards.get(reward)


def inner(reward: str | Reward, wrapper: str) -> Reward:
    """The reward that a wrapper reads row by row.

    Raises:
        ValueError: unknown name or option, or a reward that is only defined within its group (a ranked one).
    """
    found = resolve(reward)
    if found.shape is not unshaped:
        raise ValueError(
            f"{wrapper}: {found.name!r} is shaped within its group, and {wrapper} reads each completion's own value. "
            "Choose a reward such as accuracy, format or unit_tests."
        )
    return found


def verdicts(reward: Reward, wrapper: str, rollouts: Rollouts, policy: PolicyPass) -> Tensor:
    """(B,) float32: the scores of a reward that says 0, 1 or nothing (NaN).

    Raises:
        ValueError: another value.
    """
    scores_B = reward.score(rollouts, policy)
    other = ~((scores_B == 0) | (scores_B == 1) | scores_B.isnan())
    if other.any():
        row = int(other.nonzero()[0])
        raise ValueError(
            f"{wrapper}: {reward.name!r} gave {scores_B[row].item():g} for row {row}; {wrapper} takes rewards whose "
            "values are 0 and 1, such as accuracy or format."
        )
    return scores_B


def column_of(rollouts: Rollouts | BatchTexts, column: str, reward: str) -> Sequence[Any]:
    """(B,) the data set column that a reward reads.

    Raises:
        ValueError: the rollouts have no such column.
    """
    if column not in rollouts.columns:
        listed = ", ".join(sorted(rollouts.columns)) or "none"
        raise ValueError(f"reward {reward!r}: the rollouts have no column {column!r} (columns: {listed}).")
    return rollouts.columns[column]


def imported(path: str, reward: str) -> Callable[..., Any]:
    """The function that a dotted path names.

    Raises:
        ValueError: there is none.
    """
    module, _, attribute = path.rpartition(".")
    try:
        function: Callable[..., Any] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward {reward!r}: cannot import {path!r} ({error}).") from error
    return function


def annealed_weights(
    first: Sequence[float], last: Sequence[float], progress: float, schedule: Schedule = "linear"
) -> list[float]:
    """Each reward's weight at a point of the run: w = last + (first - last)·s.

    s = 1 - progress (linear) or (1 + cos(π·progress))/2 (cosine): 1 at the start, 0 at the end.

    Args:
        first: weights at the start.
        last: weights at the end, one for each of `first`.
        progress: share of the optimizer steps that are done; values outside [0, 1] count as the nearer end.
        schedule: "linear" or "cosine".

    Raises:
        ValueError: lists of different lengths, or another schedule.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"annealed_weights: schedule={schedule!r} must be one of {', '.join(get_args(Schedule))}.")
    done = min(max(progress, 0.0), 1.0)
    left = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return [b + (a - b) * left for a, b in zip(first, last, strict=True)]
