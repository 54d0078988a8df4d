r"""NOVER: rank of the reasoning perplexity, the reference's perplexity after the completion's reasoning.

Paper: "NOVER: Incentive Training for Language Models via Verifier-Free Reinforcement Learning", arXiv 2505.16022; code
thinkwee/NOVER@24c3090 `reward_functions.py`, `utils.py`.

    P(y)     = exp(-(1/n) Σ_j log π(a*_j | x, z, a*_<j) / N),   N = max(1, 1 + log₁₀ of the reasoning's tokens)
    R_r      = (v - k) / v for the completion with the k-th lowest P, k = 0 …, of the v in the right form
    reward   = [the form is right] · (1 + R_r)

The score is 1/P, which orders completions as R_r does, and 0 where the form is not right.

Departures from the paper and its code (a setting in brackets switches one back):
 1. Answers stand in \boxed{}; there in <answer> tags that must be exactly right (`answer="tags"`).
 2. P is the policy's; there that of a proxy that follows the policy.
 3. P covers the reference's tokens; there those of its tags too, in a prompt that is written anew.
 4. The efficiency reward (the share of others that are both longer and more perplexed) is left out: it compares two
    numbers of each completion, and a score that is gathered over processes is one.
 5. Equal perplexities share their mean rank; there the earlier row wins.

Command: vigor train --config lab --reward_funcs nover --scale_rewards none
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.reference import MARKED, Answer, logps_of, placed, references_of, slot_of
from vigor.rollouts import Rollouts
from vigor.shaping import rank
from vigor.signals import PolicyPass

_SMALLEST = torch.finfo(torch.float32).tiny


def nover(*, column: str = "answer", answer: Answer = "boxed") -> Reward:
    """NOVER's format and reasoning rewards: 0 for the wrong form, else above 1 and at most 2.

    Args:
        column: data set column with the reference, or with a solution that boxes it; without one a row has no reward.
        answer: how answers are marked, "boxed" or "tags".

    Raises:
        ValueError: an unknown `answer`.
    """
    slot = slot_of(MARKED, answer, "nover")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        references = references_of(rollouts, column, "nover")
        rows = placed(rollouts, policy, references, slot, "nover")
        values: list[float | None] = []
        for row, logps, reference, length in zip(
            rows, logps_of(policy, rows), references, rollouts.lengths_B.tolist(), strict=True
        ):
            if reference is None or not length:
                values.append(None)
            elif row is None or logps is None:
                values.append(0.0)
            else:
                norm = max(1.0, 1.0 + math.log10(max(row.reasoning, 1)))
                values.append(max(math.exp(float(logps.double().mean()) / norm), _SMALLEST))
        return from_values(values, rollouts)

    return Reward(
        name="nover", needs=frozenset({"text", "reference_logps"}), score=score, shape=ranked_share, columns=(column,)
    )


def ranked_share(scores_PG: Tensor) -> Tensor:
    """1 + (v - k)/v for the k-th highest of a group's v positive scores, k from 0; 0 for a score of 0; NaN stays."""
    right = scores_PG > 0
    count = right.sum(-1, keepdim=True).clamp(min=1)
    ranks = rank(scores_PG.masked_fill(~right, torch.nan))
    above = (1 - ranks) / 2 * (count - 1)  # rank 1 is the highest: k = 0; a score alone has rank 0
    above = torch.where(count > 1, above, 0.0)
    return torch.where(right, 1 + (count - above) / count, torch.where(scores_PG.isnan(), scores_PG, 0.0))
