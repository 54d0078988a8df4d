"""Mean collision probability: the chance that two draws of the next token agree.

Paper: none proposes it as a reward; Σ π² is exp(-H₂), H₂ the entropy of Rényi's order 2, as `entropy` is of order 1.

    score(y) = (1/T) Σ_t Σ_v π(v|x, y_<t)²
    reward   = rank of the score within the group, mapped to [-1, 1]

Departures:
 1. None: the library's own definition.

Command: vigor train --config lab --reward_funcs collision
"""

from __future__ import annotations

from vigor.rewards.base import Reward, ranked
from vigor.rewards.tokens import token_reward


def collision() -> Reward:
    """Rank of the mean of Σ π²."""
    return token_reward("collision", "collision", shape=ranked())
