"""EM-RL, token level: minus the summed token entropies of the completion.

Paper: "The Unreasonable Effectiveness of Entropy Minimization in LLM Reasoning", arXiv 2505.15134; the formula is from
a summary of it: shivamag125/EM_PT@91cda30 holds no training code.

    score(y) = -Σ_t H(π(·|x, y_<t))
    reward   = score - mean score of the group's other completions

The sum makes short completions win. Departures from the paper:
 1. The trainer divides by the group's standard deviation unless scale_rewards=none; the summary mentions the
    leave-one-out baseline only.

Command: vigor train --config lab --reward_funcs em_rl_token
"""

from __future__ import annotations

from vigor.rewards.base import Reward, negate
from vigor.rewards.tokens import token_reward
from vigor.shaping import leave_one_out


def em_rl_token() -> Reward:
    """Minus the sum of the token entropies, nats, against the rest of the group."""
    return token_reward("em_rl_token", "entropy", negate, reduce="sum", shape=leave_one_out)
