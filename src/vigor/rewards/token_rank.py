"""Token rank: how far down the policy's list each sampled token stood.

Paper: none proposes it as a reward. Ranks see the order of the tokens only, not how much likelier one is than another.

    score(y) = -(1/T) Σ_t log(1 + ρ_t),   ρ_t = number of tokens likelier than y_t
    reward   = rank of the score within the group, mapped to [-1, 1]

The greedy completion scores 0, the best there is. Departures:
 1. None: the library's own definition.

Command: vigor train --config lab --reward_funcs token_rank
"""

from __future__ import annotations

import torch

from vigor.rewards.base import Reward, compose, negate, ranked
from vigor.rewards.tokens import of_tokens


def token_rank() -> Reward:
    """Rank, in the group, of minus the mean log-rank of the sampled tokens."""
    return compose("token_rank", {"token_stats", "rank"}, of_tokens("rank", each=torch.log1p), negate, shape=ranked())
