"""Overlong: nothing up to a length, then a penalty that falls to -1. To be added to another reward.

Paper: DAPO, arXiv 2503.14476, equation 13 (soft overlong punishment).

    reward(y) = 0                                   T ≤ L - C
                ((L - C) - T) / C                   L - C < T ≤ L
                -1                                  T > L

T is the completion's length in tokens, EOS included; L = 20480 and C = 4096 in the paper.

Departures from the paper:
 1. None known.

Command: vigor train --config lab --reward_funcs accuracy "overlong(max_length=72, cache=24)"
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.base import Reward
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def overlong(*, max_length: int = 20480, cache: int = 4096) -> Reward:
    """The penalty, in [-1, 0].

    Args:
        max_length: L in tokens; set it to max_completion_length.
        cache: C in tokens, the stretch below L over which the penalty grows.

    Raises:
        ValueError: not 0 < cache ≤ max_length.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"overlong: cache={cache} must be positive and at most max_length={max_length}.")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        # (L - C - T) / C passes through 0 at L - C and through -1 at L.
        return ((max_length - cache - rollouts.lengths_B).float() / cache).clamp(-1.0, 0.0)

    return Reward(name="overlong", needs=frozenset({"text"}), score=score)
