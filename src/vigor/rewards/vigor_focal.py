"""VIGOR with the official code's focal weight: norms of over-confident completions count more, before ranking.

Paper: "Verifier-Free RL for LLMs via Intrinsic Gradient-Norm Reward", arXiv 2605.09920; code ZJUSCL/VIGOR@52eee72
`src/open_r1/intuitor_trainer.py` l.1455-1487 (off in every recipe), `configs.py` l.48-84.

    score(y) = -√T · ‖∇_θ NLL(y|x)‖₂ · b^λ,   λ = -0.5
    metric "entropy":  b = H + 1e-6, and 1 where H + 1e-6 ≥ target;   H = mean token entropy, nats
    metric "p_norm":   b = max(1 - p̄, 1e-6) where p̄ > target, else 1;   p̄ = mean probability of the sampled tokens
    reward   = rank of the score within the group, mapped to [-1, 1]

With λ < 0 a completion of low entropy gets a larger weight, hence a lower rank: a brake on collapse.

Departures from the paper:
 1. The paper's reward has no such weight; this is the code's option.
Departures from the official code:
 1. H and p̄ are taken at the sampling temperature, like the norm; there all three at 1.
 2. No target means 0.9 for "p_norm". There an unset target leaves all weights at 1.
 3. Those of `vigor`: float32 squares, average ranks, no dropout.

Command: vigor train --config lab --reward_funcs vigor_focal
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vigor.rewards.base import Reward, compose, negate, ranked, times_length
from vigor.rewards.tokens import of_tokens
from vigor.rewards.vigor import grad_norm
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

Metric = Literal["entropy", "p_norm"]
EPS = 1e-6


def vigor_focal(*, metric: Metric = "entropy", exponent: float = -0.5, target: float | None = None) -> Reward:
    """Rank of minus √T times the gradient norm times a power of the completion's uncertainty.

    Args:
        metric: "entropy" or "p_norm", see the formula.
        exponent: λ; negative punishes confidence. The official configuration has -0.5, its 7B script 0.1.
        target: entropy below which, or mean probability above which, the weight applies. None: always for "entropy",
            0.9 for "p_norm".

    Raises:
        ValueError: unknown metric.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"vigor_focal: metric={metric!r} must be one of {get_args(Metric)}.")
    norm = grad_norm()
    statistic = "entropy" if metric == "entropy" else "logps"
    uncertainty = of_tokens("entropy") if metric == "entropy" else of_tokens("logps", each=torch.exp)

    def signal(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        norms = norm(rollouts, policy)
        return norms * _base(metric, uncertainty(rollouts, policy), target).to(norms.dtype) ** exponent

    needs = {"grad_norm", "full_norm", "token_stats", statistic}
    return compose("vigor_focal", needs, signal, times_length(0.5), negate, shape=ranked())


def _base(metric: Metric, values_B: Tensor, target: float | None) -> Tensor:
    if metric == "entropy":
        base_B = (values_B + EPS).clamp(min=EPS)
        return base_B if target is None else torch.where(base_B < target, base_B, torch.ones_like(base_B))
    confident_B = values_B > (0.9 if target is None else target)
    return torch.where(confident_B, (1 - values_B).clamp(min=EPS), torch.ones_like(values_B))
