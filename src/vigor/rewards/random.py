"""Random reward: a coin toss that knows nothing of the completion. The control that must not help.

Paper: "Spurious Rewards: Rethinking Training Signals in RLVR", arXiv 2506.10947; code ruixin31/Spurious_Rewards@33b9f85
`code/ttrl/verifier/auto_verify.py`.

    reward(y) ~ Bernoulli(p), p = 0.5

Departures from the paper and its code:
 1. Drawn from a counter-based stream (seed, micro-step, row): the same for any number of processes and after a resume,
    and drawn apart from the sampler's random numbers, so watching it changes nothing.

Command: vigor train --config lab --reward_funcs random
"""

from __future__ import annotations

import torch
from torch import Tensor

from vigor.rewards.base import Reward
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def uniform_draws(rollouts: Rollouts, seed: int) -> Tensor:
    """(B,) float32 in [0, 1), on the rollouts' device, from the counter-based stream of (seed, micro-step, row)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + rollouts.micro_step)
    draws = torch.rand(rollouts.first_row + len(rollouts), generator=generator)[rollouts.first_row :]
    return draws.to(rollouts.input_ids_BL.device)


def random(*, p: float = 0.5, seed: int = 0) -> Reward:
    """1 with probability p, else 0.

    Raises:
        ValueError: p is not in [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"random: p must lie in [0, 1], got {p}.")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        return (uniform_draws(rollouts, seed) < p).float()

    return Reward(name="random", needs=frozenset(), score=score)
