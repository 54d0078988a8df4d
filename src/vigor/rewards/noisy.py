"""Noisy: a 0/1 reward seen through a verifier that errs at known rates, with two corrections for it.

Paper: Cai et al., "Reinforcement Learning with Verifiable yet Noisy Rewards under Imperfect Verifiers",
arXiv 2510.00915. No code of the authors has been read; the formulas are those that summaries of the paper give.

    r~ = 1 with probability ρ0 where r = 0 (false positive);   r~ = 0 with probability ρ1 where r = 1 (false negative)
    none       reward = r~
    backward   reward = (r~ - ρ0) / (1 - ρ0 - ρ1)              E[reward | r] = r
    forward    reward = ρ1 where r~ = 1, ρ1 - 1 where r~ = 0   E[reward | r] = (1 - ρ0 - ρ1)·(r - 1)

Departures from the paper:
 1. The forward weights multiply the score function of a policy gradient; here they are the reward, which is the same
    where the advantage is the reward itself (no baseline).
 2. Both corrections are increasing straight lines in r~. A z-score within the group undoes any such line: with
    scale_rewards="group" the advantages of all three are equal up to its epsilon. They differ where the scale counts:
    scale_rewards="none", and beside other rewards under sum_then_normalize.
 3. The errors come from a counter-based stream (seed, micro-step, row), see `random`.

Command: vigor train --config lab --reward_funcs "noisy(false_positive=0.1, false_negative=0.2)"
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from vigor.rewards.base import Reward
from vigor.rewards.compose import inner, verdicts
from vigor.rewards.random import uniform_draws
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

Correction = Literal["none", "backward", "forward"]


def flip(verdicts_B: Tensor, draws_B: Tensor, false_positive: float, false_negative: float) -> Tensor:
    """(B,) verdicts of 0, 1 or NaN with errors: one flips where its uniform draw in [0, 1) is below its error rate."""
    rates_B = torch.where(verdicts_B == 1, false_negative, false_positive)
    return torch.where(draws_B < rates_B, 1 - verdicts_B, verdicts_B)


def corrected(noisy_B: Tensor, false_positive: float, false_negative: float, correction: Correction) -> Tensor:
    """(B,) rewards from noisy verdicts; see the module."""
    if correction == "backward":
        return (noisy_B - false_positive) / (1 - false_positive - false_negative)
    return noisy_B + (false_negative - 1) if correction == "forward" else noisy_B


def noisy(
    *,
    of: str | Reward = "accuracy",
    false_positive: float = 0.1,
    false_negative: float = 0.1,
    correction: Correction = "none",
    seed: int = 1,
) -> Reward:
    """A 0/1 reward with errors.

    Args:
        of: the clean reward, or its spec; its values are 0 and 1.
        false_positive: ρ0, share of zeros that become ones.
        false_negative: ρ1, share of ones that become zeros.
        correction: "none", "backward" or "forward".
        seed: of the stream of errors; not that of a `random` beside it, whose tosses would be the errors.

    Raises:
        ValueError: rates outside [0, 1) or with a sum of 1 or more, an unknown correction, no such reward, or one that
            is shaped within its group; when scoring, a value other than 0 and 1.
    """
    if min(false_positive, false_negative) < 0 or false_positive + false_negative >= 1:
        raise ValueError(
            f"noisy: false_positive={false_positive} and false_negative={false_negative} must not be negative, and "
            "their sum must be below 1: from there on the verifier says nothing, or the opposite (see `inverse`)."
        )
    if correction not in get_args(Correction):
        raise ValueError(f"noisy: correction={correction!r} must be one of {', '.join(get_args(Correction))}.")
    reward = inner(of, "noisy")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        clean_B = verdicts(reward, "noisy", rollouts, policy)
        seen_B = flip(clean_B, uniform_draws(rollouts, seed), false_positive, false_negative)
        return corrected(seen_B, false_positive, false_negative, correction)

    return replace(reward, name="noisy", score=score)
