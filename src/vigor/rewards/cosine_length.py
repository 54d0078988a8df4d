"""Cosine length: right answers are worth more when short, wrong ones cost less when long.

Paper: "Demystifying Long Chain-of-Thought Reasoning in LLMs", arXiv 2502.03373, appendix C.1; bounds and form as in
open-r1 (`get_cosine_scaled_reward`) and TRL.

    reward(y) = b + (a - b)·(1 + cos(π·T/L)) / 2        from a at T = 0 to b at T = L
    right answer: a = 1, b = 0.5        wrong answer: a = -1, b = -0.5

T is the completion's length in tokens, EOS included.

Departures from the paper and its code:
 1. open-r1 measures T in characters; here, in the paper and in TRL, it is tokens.
 2. A completion longer than L is worth what one of length L is; in open-r1 the cosine turns round, and the paper gives
    such completions a penalty of their own.
 3. A row without a reference has no reward (NaN).

Command: vigor train --config lab --reward_funcs "cosine_length(max_length=72)"
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from vigor.rewards.base import Reward
from vigor.rewards.compose import inner, verdicts
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def cosine_length(
    *,
    of: str | Reward = "accuracy",
    max_length: int = 1000,
    right_short: float = 1.0,
    right_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
) -> Reward:
    """A value between the bounds of right or of wrong answers, by length; NaN where the row has no label.

    Args:
        of: a reward or its spec that says what is right; its values are 0 and 1.
        max_length: L in tokens; set it to max_completion_length.
        right_short: value of a right answer of no length.
        right_long: value of a right answer of L tokens.
        wrong_short: value of a wrong answer of no length.
        wrong_long: value of a wrong answer of L tokens.

    Raises:
        ValueError: L below 1, no such reward, or one that is shaped within its group; when scoring, a value other than
            0 and 1.
    """
    if max_length < 1:
        raise ValueError(f"cosine_length: max_length={max_length} must be at least 1 token.")
    reward = inner(of, "cosine_length")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        right_B = verdicts(reward, "cosine_length", rollouts, policy)
        progress_B = (rollouts.lengths_B.double() / max_length).clamp(max=1.0)
        near_B = (0.5 * (1.0 + (math.pi * progress_B).cos())).float()
        of_right_B = right_long + (right_short - right_long) * near_B
        of_wrong_B = wrong_long + (wrong_short - wrong_long) * near_B
        return torch.where(right_B == 1, of_right_B, of_wrong_B).masked_fill(right_B.isnan(), torch.nan)

    return replace(reward, name="cosine_length", score=score)
