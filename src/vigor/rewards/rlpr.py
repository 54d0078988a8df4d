r"""RLPR: how much the completion's reasoning raises the mean probability of the reference answer's tokens.

Paper: "RLPR: Extrapolating RLVR to General Domains without Verifiers", arXiv 2506.18254; code OpenBMB/RLPR@8490fca
`verl/workers/reward_manager/prob.py`, `verl/trainer/ppo/ray_trainer.py`, `core_algos.py`.

    p_B    = mean_j π(a*_j | x, reasoning up to the answer's opener, a*_<j); 0 where the answer's form is not right
    p_A    = mean_j π(a*_j | x, a*_<j), the reference straight after the prompt
    reward = 0.9 · max(p_B - p_A, 0) + 0.1 · [the form is right]

A group is left out (NaN) where the std of its rewards is below β · m, with m ← 0.99 m + 0.01 · (mean std of the batch).
m records from the 6th batch and filters from the 11th; β = 0.5 (their value for Qwen; 0.9 Llama, 1.0 Gemma).

Departures from the paper and its code (a setting in brackets switches one back):
 1. Answers stand in \boxed{}; there in <answer> tags that must be exactly right (`answer="tags"`).
 2. p_A is the current policy's; there the initial policy's, computed once (`baseline="column"` reads such values).
 3. No repetition penalty, whose size was not read: add `repetition` to the mix.
 4. Probabilities are not rounded to bfloat16.
 5. m starts as the first recorded mean std, and starts anew when a run is resumed; evaluation leaves it alone.
 6. Sampled tokens are kept in front of the reference, see `vigor.continuation`; there the whole text is encoded again.

Command: vigor train --config lab --reward_funcs rlpr
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.reference import MARKED, Answer, logps_of, placed, references_of, slot_of, without_reasoning
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

Baseline = Literal["policy", "column", "none"]


class SpreadFilter:
    """RLPR's prompt filter: groups whose rewards differ less than a running mean of such differences are left out."""

    def __init__(self, beta: float, *, decay: float = 0.99, record_from: int = 6, filter_from: int = 11) -> None:
        """`beta` scales the threshold, 0 filters nothing; the rest is the paper's."""
        self.beta = beta
        self.decay = decay
        self.record_from = record_from
        self.filter_from = filter_from
        self.training = False
        """Whether the batch at hand is one that is trained on."""
        self.batches = 0
        """Training batches seen."""
        self.mean_std: float | None = None

    def __call__(self, rewards_PG: Tensor) -> Tensor:
        """The rewards with left-out groups NaN; a training batch then moves the running mean, another does not."""
        std_P = _std(rewards_PG)
        batch = self.batches + 1
        kept_PG = rewards_PG
        if batch >= self.filter_from and self.mean_std is not None:
            kept_PG = rewards_PG.masked_fill((std_P < self.beta * self.mean_std)[:, None], torch.nan)
        if self.training:
            self.batches = batch
            if batch >= self.record_from:
                now = float(std_P.double().mean())
                self.mean_std = now if self.mean_std is None else self.decay * self.mean_std + (1 - self.decay) * now
        return kept_PG


def rlpr(
    *,
    column: str = "answer",
    answer: Answer = "boxed",
    baseline: Baseline = "policy",
    baseline_column: str = "no_reasoning",
    format_weight: float = 0.1,
    beta: float = 0.5,
) -> Reward:
    """RLPR's reward, in [0, 1].

    Args:
        column: data set column with the reference, or with a solution that boxes it; without one a row has no reward.
        answer: how answers are marked, "boxed" or "tags".
        baseline: p_A from the current "policy", from a data set "column", or "none" (p_A = 0).
        baseline_column: the data set column with p_A, read with baseline="column" only.
        format_weight: share of the reward for an answer in the right form.
        beta: threshold of the filter on groups; 0 keeps all.

    Raises:
        ValueError: an unknown `answer` or `baseline`, a weight outside [0, 1], or a negative beta.
    """
    slot = slot_of(MARKED, answer, "rlpr")
    if baseline not in ("policy", "column", "none"):
        raise ValueError(f"rlpr: baseline={baseline!r} must be policy, column or none.")
    if not (0 <= format_weight <= 1 and beta >= 0):
        raise ValueError(f"rlpr: format_weight ({format_weight}) must lie in [0, 1], and beta ({beta}) be at least 0.")
    spread = SpreadFilter(beta)

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        spread.training = policy.model.training
        references = references_of(rollouts, column, "rlpr")
        with_reasoning = logps_of(policy, placed(rollouts, policy, references, slot, "rlpr"))
        p_A: list[float | None] = [0.0] * len(rollouts)
        if baseline == "policy":
            without = logps_of(policy, without_reasoning(rollouts, policy, references))
            p_A = [_mean_probability(logps) for logps in without]
        elif baseline == "column":
            p_A = [None if p is None else float(p) for p in rollouts.columns[baseline_column]]
        lengths = rollouts.lengths_B.tolist()
        values: list[float | None] = []
        for logps, reference, less, length in zip(with_reasoning, references, p_A, lengths, strict=True):
            if reference is None or less is None or not length:
                values.append(None)
                continue
            gain = max((_mean_probability(logps) or 0.0) - less, 0.0)
            values.append((1 - format_weight) * gain + format_weight * float(logps is not None))
        return from_values(values, rollouts)

    columns = (column, baseline_column) if baseline == "column" else (column,)
    return Reward(name="rlpr", needs=frozenset({"text", "reference_logps"}), score=score, shape=spread, columns=columns)


def _mean_probability(logps: Tensor | None) -> float | None:
    return None if logps is None else float(logps.double().exp().mean())


def _std(rewards_PG: Tensor) -> Tensor:
    """(P,) unbiased std of the valid rewards of each group; 0 for fewer than two."""
    valid = ~rewards_PG.isnan()
    centred = torch.where(valid, rewards_PG - rewards_PG.nanmean(-1, keepdim=True), 0.0).double()
    return (centred.square().sum(-1) / (valid.sum(-1) - 1).clamp(min=1)).sqrt()
