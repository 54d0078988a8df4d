"""Logit-gradient norm: VIGOR's norm with the logits in place of the parameters. One forward pass, no backward.

Source: per token, the proxy 1 - 2π + Σπ² of the optimal-token baseline in verl (`verl/trainer/ppo/core_algos.py`); the
reward is a relative of VIGOR's (arXiv 2605.09920).

    ‖∇_z NLL(y|x)‖₂ = (1/T) √( Σ_t [1 - 2 π(y_t) + Σ_v π_v²] ),   z the T x V logits divided by the temperature
    score(y) = -√T · ‖∇_z NLL(y|x)‖₂
    reward   = rank of the score within the group, mapped to [-1, 1]

Exact for the logits; what the network makes of a change of its parameters is left out. Departures:
 1. verl estimates a baseline with it; as a reward it is the library's own.

Command: vigor train --config lab --reward_funcs logit_grad_norm
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.base import Reward, compose, negate, ranked
from vigor.rewards.tokens import of_tokens
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def logit_grad_norm() -> Reward:
    """Rank of minus √T times the norm of the gradient with respect to the logits."""
    mean_square = of_tokens("logit_grad")

    def signal(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        # √T · (1/T) √Σ is the root of the mean.
        return mean_square(rollouts, policy).sqrt()

    return compose("logit_grad_norm", {"token_stats", "logit_grad"}, signal, negate, shape=ranked())
