"""Entropy (RENT): how sure the policy is of each next token.

Paper: "Maximizing Confidence Alone Improves Reasoning", arXiv 2505.22660; code satrams/rent-rl@5d4d38a
`verl/trainer/ppo/ray_trainer.py`.

    reward(y) = -(1/T) Σ_t H(π(·|x, y_<t)),   H(p) = -Σ_v p_v log p_v

GRPO's z-score within the group follows. Departures from the paper:
 1. None.
Departures from the official code:
 1. The option that replaces the reward of a completion without an answer by -7 is not part of it: mix `format` in.

Command: vigor train --config lab --reward_funcs entropy
"""

from __future__ import annotations

from vigor.rewards.base import Reward, negate
from vigor.rewards.tokens import token_reward


def entropy() -> Reward:
    """Minus the mean token entropy, nats."""
    return token_reward("entropy", "entropy", negate)
