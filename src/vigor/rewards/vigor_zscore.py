"""VIGOR with z-scores in place of ranks: an ablation. How much the norms differ counts again.

Paper: ablation of "Verifier-Free RL for LLMs via Intrinsic Gradient-Norm Reward", arXiv 2605.09920; code
ZJUSCL/VIGOR@52eee72 `src/open_r1/intuitor_trainer.py` l.1510-1544, with its rank shaping switched off.

    score(y) = -√T · ‖∇_θ NLL(y|x)‖₂
    reward   = (score - mean of the group) / (standard deviation of the group + 1e-4)

Departures from the paper:
 1. None in the formula.
Departures from the official code:
 1. Those of `vigor`: float32 squares, temperature of sampling, no dropout.
 2. A group of equal scores gets exactly 0.

Command: vigor train --config lab --reward_funcs vigor_zscore
"""

from __future__ import annotations

from vigor.rewards.base import Reward, compose, negate, times_length
from vigor.rewards.vigor import grad_norm
from vigor.shaping import zscore


def vigor_zscore() -> Reward:
    """z-score of minus √T times the gradient norm."""
    needs = {"grad_norm", "full_norm"}
    return compose("vigor_zscore", needs, grad_norm(), times_length(0.5), negate, shape=zscore)
