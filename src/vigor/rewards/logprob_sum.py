"""Likelihood of the whole completion, ranked: as `logprob` without the division by the length.

Paper: none proposes it under this name; `em_rl_sequence` has the same score without the rank.

    score(y) = log π(y|x) = Σ_t log π(y_t|x, y_<t)
    reward   = rank of the score within the group, mapped to [-1, 1]

Short completions win. Departures:
 1. None: the library's own definition.

Command: vigor train --config lab --reward_funcs logprob_sum
"""

from __future__ import annotations

from vigor.rewards.base import Reward, ranked
from vigor.rewards.tokens import token_reward


def logprob_sum() -> Reward:
    """Rank of the completion's log-probability."""
    return token_reward("logprob_sum", "logps", reduce="sum", shape=ranked())
