"""Length-normalised likelihood: the mean log-probability of the completion's tokens. The rival to beat.

Paper: none proposes it under this name; it is the likelihood whose gradient norm VIGOR (arXiv 2605.09920) takes.

    score(y) = (1/T) Σ_t log π(y_t|x, y_<t)
    reward   = rank of the score within the group, mapped to [-1, 1]

The shape is VIGOR's, so that a comparison between the two is one of signals; the rank of the perplexity is the same.
One forward pass where VIGOR takes a backward pass more. Departures:
 1. None: the library's own definition.

Command: vigor train --config lab --reward_funcs logprob
"""

from __future__ import annotations

from vigor.rewards.base import Reward, ranked
from vigor.rewards.tokens import token_reward


def logprob() -> Reward:
    """Rank of the mean log-probability."""
    return token_reward("logprob", "logps", shape=ranked())
