"""Self-certainty (Intuitor): how far each token's distribution is from uniform.

Paper: "Learning to Reason without External Rewards", arXiv 2505.19590; code sunblaze-ucb/Intuitor@3f0cdd7.

    reward(y) = (1/T) Σ_t KL(U ‖ π(·|x, y_<t)) = (1/T) Σ_t -(1/V) Σ_v log(V π_v)

GRPO's z-score within the group follows. Departures from the paper:
 1. None.
Departures from the official code (a setting in brackets switches one back):
 1. The distribution scored at t is the one from which token t was sampled, as in their verl version. Their open-r1
    version (`intuitor_trainer.py` l.852-855) is shifted by one position: it leaves out the distribution of the first
    token and counts the one after the last (`legacy_shift=True`).
 2. logsumexp(z) - mean(z) there; here log V is subtracted, which no z-score can see.
 3. float32 logits at the sampling temperature; there bfloat16 at temperature 1 (open-r1).

Command: vigor train --config lab --reward_funcs self_certainty
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.base import Reward, compose
from vigor.rewards.tokens import token_reward
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def self_certainty(*, legacy_shift: bool = False) -> Reward:
    """Mean KL(uniform ‖ policy) over the completion, nats; higher is more certain.

    Args:
        legacy_shift: score the distribution after each token in place of the one it was sampled from, as one official
            version does; it takes a forward pass of its own.
    """
    if not legacy_shift:
        return token_reward("self_certainty", "self_certainty")

    def signal(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        stats = policy.stats_after("self_certainty")
        return stats.mean(stats.self_certainty_BL)

    return compose("self_certainty", "token_stats", signal)
