"""Mean margin: by how much the likeliest token leads the second.

Paper: none proposes it as a reward; the margin is that of active learning (Scheffer et al., "Active Hidden Markov
Models for Information Extraction", 2001), token by token.

    score(y) = (1/T) Σ_t [π_(1) - π_(2)],   π_(1) ≥ π_(2) the two largest of π(·|x, y_<t)
    reward   = rank of the score within the group, mapped to [-1, 1]

Departures:
 1. None: the library's own definition.

Command: vigor train --config lab --reward_funcs margin
"""

from __future__ import annotations

from vigor.rewards.base import Reward, ranked
from vigor.rewards.tokens import token_reward


def margin() -> Reward:
    """Rank of the mean difference between the two largest probabilities."""
    return token_reward("margin", "margin", shape=ranked())
