r"""Log-probability reward: the log-likelihood of the reference answer after the completion's own reasoning.

Paper: "Likelihood-Based Reward Designs for General LLM Reasoning", arXiv 2602.03979, which finds it the only one of its
kind that works for short and long references alike; no official code was read.

    reward(y) = Σ_j log π(a*_j | x, z, a*_<j)        z = the reasoning, a* = the reference; or the mean over j (`mean`)

GRPO's z-score within the group follows. Departures from the paper:
 1. Where the reasoning ends is ours: after the last \boxed{ (or <answer>) of the completion. One without an answer is
    scored with the opener put at its end, since 0 would be the best of all values.
 2. A row without a reference has no reward (NaN).

Command: vigor train --config lab --reward_funcs reference_logprob
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.reference import OPENED, Answer, logps_of, placed, references_of, slot_of
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def reference_logprob(*, column: str = "answer", mean: bool = False, answer: Answer = "boxed") -> Reward:
    """The reference's log-likelihood, nats.

    Args:
        column: data set column with the reference, or with a solution that boxes it; without one a row has no reward.
        mean: per token, which takes the length out where the references of one prompt differ in length.
        answer: how answers are marked, "boxed" or "tags".

    Raises:
        ValueError: an unknown `answer`.
    """
    slot = slot_of(OPENED, answer, "reference_logprob")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        references = references_of(rollouts, column, "reference_logprob")
        found = logps_of(policy, placed(rollouts, policy, references, slot, "reference_logprob"))
        sums = [None if logps is None else float(logps.double().sum()) / (len(logps) if mean else 1) for logps in found]
        return from_values(sums, rollouts)

    return Reward(
        name="reference_logprob", needs=frozenset({"text", "reference_logps"}), score=score, columns=(column,)
    )
