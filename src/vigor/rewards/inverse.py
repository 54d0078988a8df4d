"""Inverse: 1 - another reward. A control that pays for what the other punishes.

Paper: "Spurious Rewards: Rethinking Training Signals in RLVR", arXiv 2506.10947; code ruixin31/Spurious_Rewards@33b9f85
`code/ttrl/verifier/auto_verify.py` (`inverse_` before any other reward).

    reward(y) = 1 - X(y)

Departures from the paper and its code:
 1. X may also be a reward that is ranked within its group: the ranks are then those of -X.
 2. Where X has no opinion (NaN), neither has this one.
 3. A term that X adds to the loss itself, as verifree does, is left out.

Command: vigor train --config lab --reward_funcs inverse
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from vigor.rewards.base import Reward
from vigor.rewards.compose import resolve
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def inverse(*, of: str | Reward = "accuracy") -> Reward:
    """1 - X.

    Args:
        of: X, a reward or its spec.

    Raises:
        ValueError: no such reward.
    """
    reward = resolve(of)

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        return 1.0 - reward.score(rollouts, policy)

    return replace(reward, name="inverse", score=score, auxiliary=None)
