"""L1-Max: right answers are worth more the further they stay below the length that was asked for.

Paper: "L1: Controlling How Long A Reasoning Model Thinks With Reinforcement Learning" (LCPO), arXiv 2503.04697,
equation 2.

    reward(y) = A(y)·clip(α·(n - T) + δ, 0, 1)

A is 1 for a right answer and 0 for a wrong one, n the length that the prompt allows, T the completion's tokens, EOS
included; α = 0.0003, δ = 0.5: a right answer of exactly n tokens is worth δ.

Departures from the paper and its code:
 1. None in the paper's formula. The code (cmu-l3/l1 `math_reward.py`, `get_delta_score_linear_both`) computes
    A·(clip(α·(n - T), -1, 1) + 1)/2, whose slope is half as steep: that is alpha=α/2 here.

Command: vigor train --prompts my.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B --reward_funcs l1_max
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.compose import column_of, inner
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def l1_max(
    *, of: str | Reward = "accuracy", column: str = "target_length", alpha: float = 0.0003, delta: float = 0.5
) -> Reward:
    """Correctness times a share that falls with the length; NaN where the row has no target or no label.

    Args:
        of: A, a reward or its spec.
        column: data set column with n, in tokens.
        alpha: α, the share that a token costs, not negative.
        delta: δ, the share at exactly n tokens, in [0, 1].

    Raises:
        ValueError: a negative α, a δ outside [0, 1], no such reward, or one that is shaped within its group.
    """
    if alpha < 0 or not 0 <= delta <= 1:
        raise ValueError(f"l1_max: alpha={alpha} must not be negative, and delta={delta} must lie in [0, 1].")
    reward = inner(of, "l1_max")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        targets_B = from_values(list(column_of(rollouts, column, "l1_max")), rollouts)
        share_B = (alpha * (targets_B - rollouts.lengths_B) + delta).clamp(0.0, 1.0)
        return reward.score(rollouts, policy) * share_B

    columns = tuple(dict.fromkeys((*reward.columns, column)))
    return replace(reward, name="l1_max", score=score, columns=columns)
