"""What a reward is, and how one is composed from small pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vigor.rollouts import Rollouts
from vigor.shaping import Ties, rank
from vigor.signals import PolicyPass

Score = Callable[[Rollouts, PolicyPass], Tensor]
"""(rollouts, policy) -> (B,) float32, higher is better, NaN = no opinion. Looks at each row by itself."""
Step = Callable[[Tensor, Rollouts], Tensor]
"""(scores (B,), rollouts) -> scores (B,): a per-row correction such as the length factor."""
Shape = Callable[[Tensor], Tensor]
"""(P, G) scores of whole groups -> (P, G) rewards."""

NEEDS = frozenset({"grad_norm", "token_stats", "reference_logps", "text"})


def unshaped(scores_PG: Tensor) -> Tensor:
    """The scores themselves: for rewards whose scale carries meaning."""
    return scores_PG


@dataclass(frozen=True)
class Reward:
    """A reward: a score of each completion, then a shape within its group.

    The two halves are apart because a process may hold part of a group only: the trainer scores local rows, gathers the
    scores, and shapes whole groups. With whole groups at hand, calling the reward does both.
    """

    name: str
    needs: frozenset[str]
    """Of {"grad_norm", "token_stats", "reference_logps", "text"}: what it reads."""
    score: Score
    shape: Shape = unshaped
    columns: tuple[str, ...] = field(default=())
    """Data set columns that it reads."""

    def __post_init__(self) -> None:
        if unknown := self.needs - NEEDS:
            raise ValueError(f"reward {self.name!r}: unknown needs {sorted(unknown)}; choose from {sorted(NEEDS)}.")

    def __call__(self, rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        """(B,) float32 rewards of rollouts that hold whole groups.

        Raises:
            ValueError: the number of rows is not a multiple of the group size.
        """
        if len(rollouts) % rollouts.group_size:
            raise ValueError(
                f"reward {self.name!r}: {len(rollouts)} rows are not whole groups of {rollouts.group_size}. "
                "Score parts of groups with .score, gather them, then apply .shape."
            )
        return self.shape(self.score(rollouts, policy).view(-1, rollouts.group_size)).flatten()


def compose(name: str, needs: str, signal: Score, *steps: Step, shape: Shape = unshaped) -> Reward:
    """A reward from a signal, per-row steps applied left to right, and a group shape."""

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        scores = signal(rollouts, policy)
        for step in steps:
            scores = step(scores, rollouts)
        return scores.float()

    return Reward(name=name, needs=frozenset({needs}), score=score, shape=shape)


def times_length(power: float) -> Step:
    """Multiplies a score by T^power, T = counted tokens; √T undoes the 1/√T decay of a mean's gradient norm."""

    def step(scores_B: Tensor, rollouts: Rollouts) -> Tensor:
        return scores_B * rollouts.lengths_B.clamp(min=1).to(scores_B.dtype) ** power

    return step


def negate(scores_B: Tensor, rollouts: Rollouts) -> Tensor:
    """Turns "lower is better" into "higher is better"."""
    return -scores_B


def ranked(ties: Ties = "average") -> Shape:
    """Ranks within the group, in [-1, 1]."""

    def shape(scores_PG: Tensor) -> Tensor:
        return rank(scores_PG, ties=ties)

    return shape


def from_values(values: list[float | None], like: Rollouts) -> Tensor:
    """(B,) float32 from python numbers; None becomes NaN (no opinion)."""
    numbers = [float("nan") if value is None else float(value) for value in values]
    return torch.tensor(numbers, dtype=torch.float32, device=like.input_ids_BL.device)
