"""Shaping: pure functions from scores to rewards within the groups of a batch.

Every function takes and returns a (P, G) tensor: P prompts, G completions each. NaN means "no opinion": such rows take
no part in their group's ranks or moments and stay NaN. All arithmetic is float32 or wider.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Ties = Literal["average", "index"]


def rank(scores_PG: Float[Tensor, "P G"], *, ties: Ties = "average") -> Float[Tensor, "P G"]:
    """Ranks within the group, mapped to [-1, 1]: lowest score -1, highest 1.

    With n valid rows and 0-based rank ρ: r = 2ρ/(n-1) - 1, and 0 where n = 1. The map is that of the official VIGOR
    code (intuitor_trainer.py l.1490-1503).

    Args:
        scores_PG: higher is better; NaN rows are left out and stay NaN.
        ties: "average" gives equal scores their mean rank, so equal completions get equal rewards and a group of equal
            scores gets zeros. "index" gives the earlier row the lower rank, which is what the official code does.
    """
    scores = scores_PG.to(torch.promote_types(scores_PG.dtype, torch.float32))
    valid = ~scores.isnan()
    lower = scores[:, None, :] < scores[:, :, None]
    equal = scores[:, None, :] == scores[:, :, None]
    if ties == "average":
        ranks = lower.sum(-1) + (equal.sum(-1) - 1) / 2
    elif ties == "index":
        earlier = torch.ones_like(equal).tril(-1)
        ranks = (lower | (equal & earlier)).sum(-1)
    else:
        raise ValueError(f"rank: ties must be 'average' or 'index', got {ties!r}.")
    span = valid.sum(-1, keepdim=True) - 1
    shaped = torch.where(span > 0, 2 * ranks.to(scores.dtype) / span.clamp(min=1) - 1, torch.zeros_like(scores))
    return shaped.masked_fill(~valid, torch.nan)


def zscore(scores_PG: Float[Tensor, "P G"], *, eps: float = 1e-4) -> Float[Tensor, "P G"]:
    """(score - group mean) / (group std + eps), unbiased std; exactly 0 where a group's valid scores are all equal.

    eps = 1e-4 is that of TRL's GRPOTrainer and of the official VIGOR code.
    """
    scores = scores_PG.to(torch.promote_types(scores_PG.dtype, torch.float32))
    valid = ~scores.isnan()
    n = valid.sum(-1, keepdim=True)
    mean = scores.nanmean(-1, keepdim=True)
    centred = torch.where(valid, scores - mean, torch.zeros_like(scores))
    std = (centred.square().sum(-1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    shaped = torch.where(informative(scores)[:, None], centred / (std + eps), torch.zeros_like(scores))
    return shaped.masked_fill(~valid, torch.nan)


def minmax(scores_PG: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """(score - group minimum) / (group maximum - minimum), in [0, 1]; 0 where a group's valid scores are all equal.

    An infinite score has no place on such a scale: it becomes NaN, and so does its whole group where it is -inf.
    """
    scores = scores_PG.to(torch.promote_types(scores_PG.dtype, torch.float32))
    valid = ~scores.isnan()
    highest = scores.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    lowest = scores.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    shaped = torch.where(informative(scores)[:, None], (scores - lowest) / (highest - lowest), torch.zeros_like(scores))
    return shaped.masked_fill(~valid, torch.nan)


def leave_one_out(scores_PG: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Score less the mean of the group's other valid scores (Kool et al. 2019; Ahmadian et al. 2024): RLOO's baseline.

    Equals n/(n-1) times the score less the group mean; exactly 0 where a group's n valid scores are all equal, and for
    a score that is alone.
    """
    scores = scores_PG.to(torch.promote_types(scores_PG.dtype, torch.float32))
    valid = ~scores.isnan()
    n = valid.sum(-1, keepdim=True)
    centred = (scores - scores.nanmean(-1, keepdim=True)) * n / (n - 1).clamp(min=1)
    shaped = torch.where(informative(scores)[:, None], centred, torch.zeros_like(scores))
    return shaped.masked_fill(~valid, torch.nan)


def length_power(scores_PG: Float[Tensor, "P G"], lengths_PG: Int[Tensor, "P G"], power: float) -> Float[Tensor, "P G"]:
    """Score times T^power, T = counted tokens, at least 1: 1/2 is VIGOR's factor, -1 makes a mean of a sum."""
    scores = scores_PG.to(torch.promote_types(scores_PG.dtype, torch.float32))
    return scores * lengths_PG.clamp(min=1).to(scores.dtype) ** power


def clip(scores_PG: Float[Tensor, "P G"], low: float, high: float) -> Float[Tensor, "P G"]:
    """Scores limited to [low, high]; NaN stays NaN.

    Raises:
        ValueError: low > high, or one of them is NaN.
    """
    if not low <= high:
        raise ValueError(f"clip: low ({low}) must not exceed high ({high}).")
    return scores_PG.to(torch.promote_types(scores_PG.dtype, torch.float32)).clamp(low, high)


def spread(scores_PG: Float[Tensor, "P G"]) -> Float[Tensor, " P"]:
    """Unbiased std / |mean| of each group's valid scores: how much they differ, in units of their size.

    Exactly 0 where they are all equal; infinite where they differ round a mean of 0.
    """
    scores = scores_PG.to(torch.promote_types(scores_PG.dtype, torch.float32))
    valid = ~scores.isnan()
    mean = scores.nanmean(-1)
    centred = torch.where(valid, scores - mean[:, None], torch.zeros_like(scores))
    std = (centred.square().sum(-1) / (valid.sum(-1) - 1).clamp(min=1)).sqrt()
    return torch.where(informative(scores), std / mean.abs(), torch.zeros_like(std))


def gate(
    rewards_PG: Float[Tensor, "P G"], scores_PG: Float[Tensor, "P G"], *, min_spread: float
) -> Float[Tensor, "P G"]:
    """Rewards, with those of groups whose scores spread by less than `min_spread` set to 0.

    Ranks and z-scores forget how much the scores differed: a group whose norms differ by 1 % is ranked as firmly as one
    whose norms differ tenfold. See `spread`; NaN rewards stay NaN.
    """
    keep_P = spread(scores_PG) >= min_spread
    return torch.where(keep_P[:, None] | rewards_PG.isnan(), rewards_PG, torch.zeros_like(rewards_PG))


def informative(scores_PG: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """True for the groups whose valid scores differ: only these can teach anything."""
    highest = scores_PG.nan_to_num(nan=-torch.inf).amax(-1)
    lowest = scores_PG.nan_to_num(nan=torch.inf).amin(-1)
    return highest > lowest


def truncated_worst(scores_PG: Float[Tensor, "P G"], truncated_PG: Bool[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Puts truncated rows just below the lowest complete row of their group, and level with each other.

    A group with no complete row keeps no order: all its rows get the same score.
    """
    valid = ~scores_PG.isnan()
    complete = valid & ~truncated_PG
    lowest = scores_PG.masked_fill(~complete, torch.inf).amin(-1, keepdim=True)
    floor = torch.nextafter(lowest, torch.full_like(lowest, -torch.inf))
    floor = torch.where(complete.any(-1, keepdim=True), floor, torch.zeros_like(floor))
    return torch.where(truncated_PG & valid, floor.expand_as(scores_PG), scores_PG)


def share_between_identical(scores_PG: Float[Tensor, "P G"], keys_PG: Int[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Gives rows with equal keys the score of the first of them in their group.

    Identical completions scored in different batches or processes can differ in the last bits; ranking would turn that
    noise into different rewards.
    """
    same = keys_PG[:, None, :] == keys_PG[:, :, None]
    first = same.int().argmax(-1)
    return scores_PG.gather(-1, first)
