r"""Format reward: 1 for a completion with a non-empty \boxed{} answer, right or wrong. A control.

Paper: "Spurious Rewards: Rethinking Training Signals in RLVR", arXiv 2506.10947; code ruixin31/Spurious_Rewards@33b9f85
`code/ttrl/verifier/auto_verify.py` (`format`).

    reward(y) = 1 if the last \boxed{a} of y whose braces balance has an a that is not blank, else 0

Departures from the paper and its code:
 1. None known.

Command: vigor train --config lab --reward_funcs format
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.boxed import last_boxed
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def format() -> Reward:
    r"""1 if the completion has a non-empty \boxed{} answer, else 0."""

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        answers = [last_boxed(text) for text in rollouts.completion_texts]
        return from_values([float(bool(answer and answer.strip())) for answer in answers], rollouts)

    return Reward(name="format", needs=frozenset({"text"}), score=score)
