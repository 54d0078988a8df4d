"""What a reward is, and how one is composed from small pieces."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vigor.ema import TeacherPlan
from vigor.rollouts import Rollouts
from vigor.shaping import Ties, gate, rank
from vigor.signals import PolicyPass
from vigor.tokenstats import STATISTICS

Score = Callable[[Rollouts, PolicyPass], Tensor]
"""(rollouts, policy) -> (B,) float32, higher is better, NaN = no opinion. Looks at each row by itself, unless the
reward needs "group": then at the texts of whole groups, which the rollouts carry even where the rows are parts of
groups."""
Step = Callable[[Tensor, Rollouts], Tensor]
"""(scores (B,), rollouts) -> scores (B,): a per-row correction such as the length factor."""
Shape = Callable[[Tensor], Tensor]
"""(P, G) scores of whole groups -> (P, G) rewards."""

NEEDS = frozenset({"grad_norm", "full_norm", "token_stats", "reference_logps", "text", "group", "twin", *STATISTICS})
"""What a reward may read. With "grad_norm", "full_norm" says that it is the norm over all trainable parameters at the
policy's temperature; with "token_stats", the names of `vigor.tokenstats.STATISTICS` say which. "group": the texts of
whole groups; "twin": also those of the other wording of the prompt, which its first column pairs it with."""
Text = tuple[list[int], list[int]]
"""(context, text): token ids, of which the text's are scored."""
TEACHER = "teacher_completion"
"""The column with the texts of the EMA teacher, one a row."""
# Not reference_logps: a row without a reference has no opinion, and the scorer itself refuses a NaN of the policy's.
_POLICY = frozenset({"grad_norm", "token_stats"})


def unshaped(scores_PG: Tensor) -> Tensor:
    """The scores themselves: for rewards whose scale carries meaning."""
    return scores_PG


@dataclass(frozen=True)
class Auxiliary:
    """What a reward adds to the update's loss: -coefficient · log π(text | context), see `vigor.auxiliary`."""

    rows: Callable[[Rollouts, PolicyPass], list[Text | None]]
    """The text of each row; None where it has none."""
    coefficient: Shape
    """(P, G) scores of whole groups -> (P, G) coefficients, without gradient; NaN or 0 leaves a row out."""


@dataclass(frozen=True)
class Reward:
    """A reward: a score of each completion, then a shape within its group.

    The two halves are apart because a process may hold part of a group only: the trainer scores local rows, gathers the
    scores, and shapes whole groups. With whole groups at hand, calling the reward does both.
    """

    name: str
    needs: frozenset[str]
    """Of `NEEDS`: what it reads."""
    score: Score
    shape: Shape = unshaped
    columns: tuple[str, ...] = field(default=())
    """Data set columns that it reads."""
    teacher: TeacherPlan | None = None
    """The EMA teacher whose completions it reads; None where it reads none."""
    auxiliary: Auxiliary | None = None
    """A term of its own in the loss, which VigorTrainer adds; None where the reward is all."""

    def __post_init__(self) -> None:
        if unknown := self.needs - NEEDS:
            raise ValueError(f"reward {self.name!r}: unknown needs {sorted(unknown)}; choose from {sorted(NEEDS)}.")

    def __call__(self, rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        """(B,) float32 rewards of rollouts that hold whole groups.

        Raises:
            ValueError: the number of rows is not a multiple of the group size.
            FloatingPointError: see `nonfinite`.
        """
        if len(rollouts) % rollouts.group_size:
            raise ValueError(
                f"reward {self.name!r}: {len(rollouts)} rows are not whole groups of {rollouts.group_size}. "
                "Score parts of groups with .score, gather them, then apply .shape."
            )
        scores_B = self.score(rollouts, policy)
        if trouble := nonfinite(self, scores_B, rollouts):
            raise FloatingPointError(f"{trouble}. The policy has probably diverged: look at its weights and logits.")
        return self.shape(scores_B.view(-1, rollouts.group_size)).flatten()


def nonfinite(reward: Reward, scores_B: Tensor, rollouts: Rollouts) -> str | None:
    """What is wrong with scores that are infinite, or NaN where the policy's own numbers make them; None if nothing."""
    bad_B = scores_B.isinf()
    if reward.needs & _POLICY:
        bad_B |= scores_B.isnan() & (rollouts.lengths_B > 0)
    if not bad_B.any():
        return None
    row, count = int(bad_B.nonzero()[0]), int(bad_B.sum())
    return (
        f"reward {reward.name!r} is {scores_B[row].item()} for {count} of {len(scores_B)} completions (first: row "
        f"{row}, {int(rollouts.lengths_B[row])} tokens)"
    )


def compose(name: str, needs: str | Collection[str], signal: Score, *steps: Step, shape: Shape = unshaped) -> Reward:
    """A reward from a signal, per-row steps applied left to right, and a group shape."""

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        scores = signal(rollouts, policy)
        for step in steps:
            scores = step(scores, rollouts)
        return scores.float()

    return Reward(name=name, needs=frozenset({needs} if isinstance(needs, str) else needs), score=score, shape=shape)


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


def gated(shape: Shape, min_spread: float) -> Shape:
    """The shape, with 0 for the groups whose scores spread too little; see `vigor.shaping.gate`."""

    def gated_shape(scores_PG: Tensor) -> Tensor:
        return gate(shape(scores_PG), scores_PG, min_spread=min_spread)

    return gated_shape


def from_values(values: list[float | None], like: Rollouts) -> Tensor:
    """(B,) float32 from python numbers; None becomes NaN (no opinion)."""
    numbers = [float("nan") if value is None else float(value) for value in values]
    return torch.tensor(numbers, dtype=torch.float32, device=like.input_ids_BL.device)
