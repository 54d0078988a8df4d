"""VIGOR without √T: an ablation. The norm of a mean's gradient shrinks with length, so long completions win.

Paper: ablation of "Verifier-Free RL for LLMs via Intrinsic Gradient-Norm Reward", arXiv 2605.09920; code
ZJUSCL/VIGOR@52eee72 `src/open_r1/intuitor_trainer.py` l.1068-1073, kl_reward_sqrt_len_scaling_enabled=False.

    score(y) = -‖∇_θ NLL(y|x)‖₂,   NLL = mean over the T completion tokens
    reward   = rank of the score within the group, mapped to [-1, 1]

Departures from the paper:
 1. None in the formula.
Departures from the official code:
 1. Those of `vigor`: float32 squares, average ranks, temperature of sampling, no dropout.

Command: vigor train --config lab --reward_funcs vigor_no_sqrt
"""

from __future__ import annotations

from vigor.rewards.base import Reward, compose, negate, ranked
from vigor.rewards.vigor import grad_norm


def vigor_no_sqrt() -> Reward:
    """Rank of minus the gradient norm."""
    return compose("vigor_no_sqrt", {"grad_norm", "full_norm"}, grad_norm(), negate, shape=ranked())
