"""Tiers: a graded reward in a few steps, so that small differences do not count and large ones do.

Paper: "SSL: Sweet Spot Learning for Differentiated Guidance in Agentic Optimization", arXiv 2601.22491. Its formulas
have not been read; summaries say that reasoning tasks use quarters of progress (K = 4 zones).

    reward(y) = floor(K·X(y)) / K,   X(y) in [0, 1]

Departures from the paper:
 1. The worth of each tier: even steps are ours. The abstract says that rewards grow towards the goal, not by how much;
    `power` above 1 makes the upper steps larger: reward = (floor(K·X)/K)^power.
 2. The Gaussian zones for clicks on a screen are left out.

Command: vigor train --prompts my.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B --reward_funcs tiers
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from vigor.rewards.base import Reward
from vigor.rewards.compose import inner
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def tier(grades_B: Tensor, levels: int, power: float) -> Tensor:
    """(B,) rewards from grades in [0, 1]; NaN stays NaN."""
    # A grade of 3/4 may arrive as the float32 just below: it belongs to the tier that it stands for.
    return ((grades_B * levels + 1e-5).floor() / levels) ** power


def tiers(*, of: str | Reward = "keyword_chain", levels: int = 4, power: float = 1.0) -> Reward:
    """The tier that a graded reward reaches, in {0, 1/K, … 1}^power; NaN where it has no opinion.

    Args:
        of: X, a reward with values in [0, 1], or its spec.
        levels: K.
        power: of the tier's height, positive; 1 is even steps.

    Raises:
        ValueError: fewer than 1 level, a power that is not positive, no such reward, or one that is shaped within its
            group; when scoring, a grade outside [0, 1].
    """
    if levels < 1 or not power > 0:
        raise ValueError(f"tiers: levels={levels} must be at least 1, and power={power} positive.")
    reward = inner(of, "tiers")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        grades_B = reward.score(rollouts, policy)
        if ((grades_B < 0) | (grades_B > 1)).any():
            low, high = grades_B.nan_to_num(0.0).aminmax()
            raise ValueError(
                f"tiers: {reward.name!r} gave values from {low.item():g} to {high.item():g}; tiers takes grades in "
                "[0, 1], such as those of keyword_chain or unit_tests."
            )
        return tier(grades_B, levels, power)

    return replace(reward, name="tiers", score=score)
