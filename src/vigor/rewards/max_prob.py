"""Mean probability of the likeliest token, whether or not it was the one sampled.

Paper: the maximum softmax probability of "A Baseline for Detecting Misclassified and Out-of-Distribution Examples",
arXiv 1610.02136, token by token.

    score(y) = (1/T) Σ_t max_v π(v|x, y_<t)
    reward   = rank of the score within the group, mapped to [-1, 1]

Departures from the paper:
 1. There one classification; here the mean over the completion's tokens, and a reward.

Command: vigor train --config lab --reward_funcs max_prob
"""

from __future__ import annotations

from vigor.rewards.base import Reward, ranked
from vigor.rewards.tokens import token_reward


def max_prob() -> Reward:
    """Rank of the mean of the largest probabilities."""
    return token_reward("max_prob", "max_prob", shape=ranked())
