"""Kimi's length reward: among a prompt's completions, the short right ones gain and the long ones lose.

Paper: Kimi k1.5, arXiv 2501.12599, section 2.3.3 (length penalty); also `len_reward` in open-r1.

    λ(y) = 1/2 - (T - T_min) / (T_max - T_min)          T_min, T_max: shortest and longest of the group
    reward(y) = λ(y) if y is right, min(0, λ(y)) if it is wrong; 0 for all where T_max = T_min

T is the completion's length in tokens, EOS included. The paper adds it to the answer's own reward with a weight that
grows after a warm-up: `reward_weights_final` does that.

Departures from the paper and its code:
 1. open-r1 measures T in characters and over the whole batch of a process; here, as in the paper, it is the group.
 2. A row without a reference has no reward and no part in T_min and T_max.

The score under the shape, which the logs show, is -T for a right answer and -(T + 1/2) for a wrong one.

Command: vigor train --config lab --reward_funcs accuracy kimi_length --reward_weights 1 0 --reward_weights_final 1 1
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vigor.rewards.base import Reward
from vigor.rewards.compose import inner, verdicts
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

_WRONG = 0.5
"""Tells wrong from right in one number, which float32 holds exactly for any T below 2²²."""


def length_penalty(scores_PG: Tensor) -> Tensor:
    """(P, G) rewards from -T for right and -(T + 1/2) for wrong completions; NaN stays NaN.

    A score just below another, as `shaping.truncated_worst` makes them, counts as wrong and as long as that one.
    """
    lengths_PG = (-scores_PG).floor()
    right_PG = -scores_PG == lengths_PG
    shortest_P1 = lengths_PG.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)
    longest_P1 = lengths_PG.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
    span_P1 = longest_P1 - shortest_P1
    lambda_PG = 0.5 - (lengths_PG - shortest_P1) / span_P1
    rewards_PG = torch.where(right_PG, lambda_PG, lambda_PG.clamp(max=0.0))
    return torch.where(span_P1 > 0, rewards_PG, torch.zeros_like(rewards_PG)).masked_fill(scores_PG.isnan(), torch.nan)


def kimi_length(*, of: str | Reward = "accuracy") -> Reward:
    """The length penalty within the group, in [-0.5, 0.5].

    Args:
        of: a reward or its spec that says what is right; its values are 0 and 1.

    Raises:
        ValueError: no such reward, or one that is shaped within its group; when scoring, a value other than 0 and 1.
    """
    reward = inner(of, "kimi_length")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        right_B = verdicts(reward, "kimi_length", rollouts, policy)
        return -rollouts.lengths_B.float() - _WRONG * (1.0 - right_B)

    return replace(reward, name="kimi_length", score=score, shape=length_penalty)
