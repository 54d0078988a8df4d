"""The weakest token: the lowest log-probability in the completion.

Paper: none proposes it under this name; a chain is as sure as its least sure link.

    score(y) = min_t log π(y_t|x, y_<t)
    reward   = rank of the score within the group, mapped to [-1, 1]

A minimum over more tokens is lower, so short completions gain. Departures:
 1. None: the library's own definition.

Command: vigor train --config lab --reward_funcs logprob_min
"""

from __future__ import annotations

from vigor.rewards.base import Reward, ranked
from vigor.rewards.tokens import token_reward


def logprob_min() -> Reward:
    """Rank of the lowest token log-probability."""
    return token_reward("logprob_min", "logps", reduce="min", shape=ranked())
