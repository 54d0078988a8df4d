"""The numbers of a probe: pure functions on (P, G) tensors, P prompts with G completions each, in float64.

NaN leaves a completion out. Intervals are 95 % percentile bootstrap intervals over prompts: completions of one prompt
are not independent, prompts are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROUNDS = 2000


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and the prompts that it rests on; all NaN where there is none."""

    value: float
    low: float
    high: float
    prompts: int

    def prompts_needed(self, half_width: float = 0.05) -> int | None:
        """How many such prompts would give an interval of ± `half_width`: the width shrinks with their square root."""
        if self.prompts < 2 or math.isnan(self.value):
            return None
        return max(2, math.ceil(self.prompts * ((self.high - self.low) / (2 * half_width)) ** 2))


def ratio(numerator_P: Tensor, denominator_P: Tensor, *, rounds: int = ROUNDS, seed: int = 0) -> Estimate:
    """Σ numerator / Σ denominator over prompts; those with denominator 0 (or NaN) have no say."""
    keep = (denominator_P > 0) & numerator_P.isfinite()
    top, bottom = numerator_P[keep].double(), denominator_P[keep].double()
    n = len(top)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    drawn = torch.randint(n, (rounds, n), generator=torch.Generator().manual_seed(seed))
    values = (top[drawn].sum(1) / bottom[drawn].sum(1)).sort().values
    low, high = values[round(0.025 * (rounds - 1))], values[round(0.975 * (rounds - 1))]
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), n)


def mean(values_P: Tensor) -> Estimate:
    """Mean over the prompts that have a value."""
    return ratio(values_P, (~values_P.isnan()).double())


def auc(
    scores_PG: Float[Tensor, "P G"], right_PG: Float[Tensor, "P G"], weights_PG: Float[Tensor, "P G"] | None = None
) -> Estimate:
    """Share of the (right, wrong) pairs of a prompt in which the right one scores higher, ties counting half.

    Args:
        scores_PG: higher is better.
        right_PG: 1 right, 0 wrong.
        weights_PG: how much a pair counts, by its wrong completion; None counts all alike.
    """
    valid = ~(scores_PG.isnan() | right_PG.isnan())
    weights = torch.ones_like(scores_PG) if weights_PG is None else weights_PG
    pairs_PGG = ((valid & (right_PG > 0))[:, :, None] & (valid & (right_PG <= 0))[:, None, :]) * weights[:, None, :]
    sign_PGG = _sign(scores_PG)
    return ratio((pairs_PGG * (0.5 + 0.5 * sign_PGG)).sum((1, 2)), pairs_PGG.sum((1, 2)))


def crowd(clusters_PG: Int[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """How often each completion's answer occurs in its group; 1 where it has none (cluster -1)."""
    same_PGG = (clusters_PG[:, :, None] == clusters_PG[:, None, :]) & (clusters_PG[:, :, None] >= 0)
    return same_PGG.sum(-1).clamp(min=1).double()


def majority_member(clusters_PG: Int[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """1 for the completions with the group's most common answer, 0 for the others; NaN where no answer was given.

    Of equally common ones the first met, which is the label that `majority_vote` trains on.
    """
    found = torch.full(clusters_PG.shape, math.nan, dtype=torch.float64)
    for p, clusters_G in enumerate(clusters_PG):
        answered = clusters_G[clusters_G >= 0]
        if len(answered):
            found[p] = (clusters_G == answered.bincount().argmax()).double()  # clusters are numbered as they appeared
    return found


def kendall(x_PG: Float[Tensor, "P G"], y_PG: Float[Tensor, "P G"]) -> Float[Tensor, " P"]:
    """Kendall's tau-b of each group, which allows for ties; NaN where one of the two does not vary."""
    valid = ~(x_PG.isnan() | y_PG.isnan())
    pairs_PGG = valid[:, :, None] & valid[:, None, :]
    x_PGG, y_PGG = _sign(x_PG) * pairs_PGG, _sign(y_PG) * pairs_PGG
    below_P = (x_PGG.abs().sum((1, 2)) * y_PGG.abs().sum((1, 2))).sqrt()
    return (x_PGG * y_PGG).sum((1, 2)) / below_P.masked_fill(below_P == 0, math.nan)


def partial_kendall(x_PG: Tensor, y_PG: Tensor, given_PG: Tensor) -> Float[Tensor, " P"]:
    """Kendall's partial tau of x and y with a third quantity held fixed (Kendall 1942), by group.

    (τ_xy - τ_xz τ_yz) / sqrt((1 - τ_xz²)(1 - τ_yz²)); NaN where the third determines one of the two, or does not vary.
    """
    xy, xz, yz = kendall(x_PG, y_PG), kendall(x_PG, given_PG), kendall(y_PG, given_PG)
    below = ((1 - xz.square()) * (1 - yz.square())).clamp(min=0).sqrt()
    return (xy - xz * yz) / below.masked_fill(below == 0, math.nan)


def tie_rate(scores_PG: Float[Tensor, "P G"]) -> float:
    """Share of the pairs inside groups with equal scores; NaN where there are no pairs."""
    valid = ~scores_PG.isnan()
    pairs_PGG = (valid[:, :, None] & valid[:, None, :]).triu(1)
    ties = ((_sign(scores_PG) == 0) & pairs_PGG).sum()
    return float(ties / pairs_PGG.sum()) if pairs_PGG.any() else math.nan


def flips(scores_PG: Float[Tensor, "P G"], again_PG: Float[Tensor, "P G"]) -> float:
    """Share of the pairs with different scores whose order another computation of the same scores reverses."""
    first, second = _sign(scores_PG), _sign(again_PG)
    both = (first != 0) & ~second.isnan() & ~first.isnan()
    return float(((first * second < 0) & both).sum() / both.sum()) if both.any() else math.nan


def spread(scores_PG: Float[Tensor, "P G"]) -> float:
    """Median over groups of the standard deviation of the scores, relative to their mean size."""
    kept = [row[~row.isnan()].double() for row in scores_PG]
    values = [float(row.std() / row.abs().mean()) for row in kept if len(row) > 1 and float(row.abs().mean()) > 0]
    return float(torch.tensor(values).median()) if values else math.nan


def best_of(scores_PG: Float[Tensor, "P G"], right_PG: Float[Tensor, "P G"]) -> Estimate:
    """Accuracy of each prompt's highest-scored completion; equal ones share the place."""
    valid = ~(scores_PG.isnan() | right_PG.isnan())
    scores = scores_PG.masked_fill(~valid, -math.inf)
    first = (scores == scores.amax(1, keepdim=True)) & valid
    return mean((right_PG.nan_to_num(0.0).double() * first).sum(1) / first.sum(1).double())


def pass_at_k(right_PG: Float[Tensor, "P G"], k: int) -> Estimate:
    """The chance that one of k completions is right, without bias: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).

    arXiv 2107.03374. Prompts with fewer than k judged completions have no say.
    """
    values = []
    for row in right_PG:
        judged = row[~row.isnan()]
        n, c = len(judged), int((judged > 0).sum())
        values.append(1 - math.comb(n - c, k) / math.comb(n, k) if n >= k else math.nan)
    return mean(torch.tensor(values, dtype=torch.float64))


def majority_at_k(clusters_PG: Int[Tensor, "P G"], right_PG: Float[Tensor, "P G"], k: int) -> Estimate:
    """The chance that the most common of k answers is right; equally common ones share it.

    Over blocks of k completions in the order sampled, so that the estimate has no bias. A block without an answer is
    wrong.
    """
    values = []
    for clusters_G, right_G in zip(clusters_PG, right_PG, strict=True):
        if right_G.isnan().any():
            values.append(math.nan)
            continue
        blocks = []
        for start in range(0, len(clusters_G) - k + 1, k):
            block, right = clusters_G[start : start + k], right_G[start : start + k]
            names, counts = block[block >= 0].unique(return_counts=True)
            winners = names[counts == counts.max()].tolist() if len(names) else []
            blocks.append(sum(float(right[block == w].amax()) for w in winners) / max(len(winners), 1))
        values.append(sum(blocks) / len(blocks) if blocks else math.nan)
    return mean(torch.tensor(values, dtype=torch.float64))


def number(clusters: Sequence[Sequence[int | None]]) -> Int[Tensor, "P G"]:
    """Clusters as a tensor, -1 for none."""
    return torch.tensor([[-1 if k is None else k for k in group] for group in clusters])


def _sign(x_PG: Tensor) -> Tensor:
    return (x_PG[:, :, None].double() - x_PG[:, None, :].double()).sign()
