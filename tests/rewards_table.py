"""The common table's types: a batch of completions, a row of promises, and slow references.

Adding a method to the table = one entry `"spec": Row(...)` in the file of its family:
    rows_intrinsic.py   rows_agreement.py   rows_reference.py   rows_verifiable.py
tests/test_rewards_common.py then runs it through every test.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from models import EOS, PAD, Sample, Side, naive_logps, naive_norm, padded, qwen2
from torch import Tensor, nn

from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

G = 4
TEMPERATURE = 0.9


@dataclass(frozen=True, eq=False)
class Completion:
    """A completion with everything that some method reads."""

    sample: Sample
    text: str
    right: bool = False
    """What accuracy should say of it."""
    prompt: str = ""
    columns: Mapping[str, Any] = field(default_factory=lambda: {"answer": "72"})
    """This row's value in each data set column."""


HALF = {"answer": "0.5"}
BATCH = (
    Completion(Sample([5, 9, 3], [7, 8, 30, 2, EOS]), r"\boxed{72}", right=True),
    Completion(Sample([5, 9, 3], [PAD, 6, EOS, PAD, 11, 12, 36]), "so it is 72"),
    Completion(Sample([5, 9, 3], [17]), r"\boxed{}"),
    Completion(Sample([5, 9, 3], [7, 8, 9, 10, 11, 12], holes=(1, 2, 4)), r"\boxed{71}"),
    Completion(Sample([4], [2, 2, 2, EOS]), r"\boxed{\frac{1}{2}}", right=True, columns=HALF),
    Completion(Sample([4], [20, 21, 22, 23]), r"\boxed{2}", columns=HALF),
    Completion(Sample([4], [6]), r"\boxed{0.5} or \boxed{0.50}", right=True, columns=HALF),
    Completion(Sample([4], [31, 3, 31, 3, 31, 3]), "", columns=HALF),
)
"""Two groups of G: one-token completions, uncounted tokens in the middle, PAD and EOS as real tokens."""

Slow = Callable[[nn.Module, Sequence[Completion]], list[float]]
"""(model, batch) -> the score of every row before the group's shape, in float64, written from the formula."""


def by_row(score: Callable[[nn.Module, Completion], float], *, empty: float = math.nan) -> Slow:
    """The reference of a method that looks at each row by itself; `empty` is the score of an empty completion."""

    def slow(model: nn.Module, batch: Sequence[Completion]) -> list[float]:
        return [score(model, completion) if completion.sample.completion else empty for completion in batch]

    return slow


def unshaped(scores: list[float]) -> list[float]:
    return scores


def in_groups(shape: Callable[[list[float]], list[float]]) -> Callable[[list[float]], list[float]]:
    """Applies the shape of one group of valid scores to each group of a batch; NaN stays NaN."""

    def shaped(scores: list[float]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(scores), G):
            group = scores[start : start + G]
            values = iter(shape([x for x in group if not math.isnan(x)]))
            found += [math.nan if math.isnan(x) else next(values) for x in group]
        return found

    return shaped


@in_groups
def average_ranks(group: list[float]) -> list[float]:
    positions = [sum(y < x for y in group) + (sum(y == x for y in group) - 1) / 2 for x in group]
    return [2 * position / (len(group) - 1) - 1 if len(group) > 1 else 0.0 for position in positions]


@dataclass(frozen=True)
class Row:
    """What is promised of one method."""

    slow: Slow
    shape: Callable[[list[float]], list[float]] = unshaped
    """From the scores of a batch of whole groups to its rewards."""
    batch: tuple[Completion, ...] = BATCH
    """Two groups of G completions, the first of some length; a method with other data brings its own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of PolicyPass, such as a tokenizer."""
    tolerance: float = 1e-6
    """Of the comparison with the slow reference, relative and absolute."""
    bfloat16: float = 0.0
    """Largest change of a score when the weights are rounded to bfloat16, as a share of the batch's largest score."""
    follows_rows: bool = True
    """Whether a completion keeps its score when it moves to another row."""
    whole_groups: bool = False
    """Whether a row's score depends on the other rows of its group."""


def with_first(row: Row, **changes: Any) -> tuple[Completion, ...]:
    """The row's batch with its first completion changed."""
    return (replace(row.batch[0], **changes), *row.batch[1:])


def emptied(completion: Completion) -> Completion:
    """Without any token."""
    return replace(completion, sample=Sample(completion.sample.prompt, []), text="", right=False)


def rollouts_of(
    *batch: Completion, side: Side = "right", extra: int = 0, group_size: int = G, **others: Any
) -> Rollouts:
    return Rollouts(
        *padded([c.sample for c in batch], side, extra=extra),
        group_size=group_size,
        prompts=[c.prompt for c in batch],
        completions=[c.text for c in batch],
        columns={name: [c.columns[name] for c in batch] for name in batch[0].columns},
        **others,
    )


@cache
def built(make: Callable[[], nn.Module] = qwen2) -> nn.Module:
    """One model for all tests that leave it as it is."""
    return make()


def policy_of(row: Row, rollouts: Rollouts, model: nn.Module | None = None, **others: Any) -> PolicyPass:
    options = {"temperature": TEMPERATURE, **row.options, **others}
    return PolicyPass(built() if model is None else model, rollouts, **options)


# Slow references --------------------------------------------------------------------------------------------------


@cache
@torch.no_grad()
def slow_logps(model: nn.Module, completion: Completion) -> list[Tensor]:
    """The (V,) float64 log-probabilities from which each counted token was sampled."""
    return naive_logps(copy.deepcopy(model).double().eval(), completion.sample, TEMPERATURE)


def slow_tokens(model: nn.Module, completion: Completion) -> list[float]:
    """The float64 log-probability of each counted token."""
    sample = completion.sample
    distributions = slow_logps(model, completion)
    return [float(logp[sample.ids[t]]) for logp, t in zip(distributions, sample.counted, strict=True)]


@cache
def slow_norm(model: nn.Module, completion: Completion) -> float:
    """‖∇ mean NLL‖ in float64."""
    return naive_norm(model, completion.sample, TEMPERATURE)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
