"""VIGOR without shaping: an ablation. The raw norm reaches the trainer, whose own normalisation decides the scale.

Paper: ablation of "Verifier-Free RL for LLMs via Intrinsic Gradient-Norm Reward", arXiv 2605.09920; code
ZJUSCL/VIGOR@52eee72 `src/open_r1/intuitor_trainer.py` l.1073.

    reward(y) = -√T · ‖∇_θ NLL(y|x)‖₂

With the trainer's default, scale_rewards="group", the advantages are those of `vigor_zscore`; with "batch" or "none"
prompts whose norms vary more weigh more.

Departures from the paper:
 1. No rank.
Departures from the official code:
 1. Those of `vigor`: float32 squares, temperature of sampling, no dropout.

Command: vigor train --config lab --reward_funcs vigor_raw
"""

from __future__ import annotations

from vigor.rewards.base import Reward, compose, negate, times_length
from vigor.rewards.vigor import grad_norm


def vigor_raw() -> Reward:
    """Minus √T times the gradient norm."""
    return compose("vigor_raw", {"grad_norm", "full_norm"}, grad_norm(), times_length(0.5), negate)
