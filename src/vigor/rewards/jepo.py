r"""JEPO: the log-likelihood of the reference as a bound on its evidence, with a gradient on the reference itself.

Paper: "Beyond Verifiable Rewards: Scaling Reinforcement Learning for Language Models to Unverifiable Data",
arXiv 2503.19618: the reasoning z is a latent variable, and a lower bound on log Σ_z π(z | x) π(a* | x, z) is raised.
Its abstract and a summary have been read, and no code; the gradients below follow from the bounds by differentiating.

    p_i  = Π_j π(a*_j | x, z_i, a*_<j)
    "single"   bound E log p;               reward_i = log p_i - mean of the others' log p;   c_i = 1
    "group"    bound E log (1/G) Σ_i p_i;   reward_i = log mean_k p_k - log mean_{k≠i} p_k;   c_i = p_i / Σ_k p_k

c_i is the coefficient of the second part of the gradient, c_i ∇log p_i, which VigorTrainer adds to the loss (see
`vigor.auxiliary`). `scale_rewards="none"` and `loss_type="dr_grpo"` give both parts the bound's own weights.

Departures from the paper (a setting in brackets switches one back):
 1. Both baselines leave out the sample itself and are ours where the paper has others: they change no expectation.
    From the gains of "group", which do not sum to 0, TRL takes the group's mean besides.
 2. Where the reasoning ends is ours: after the last \boxed{ (or <answer>); without one the opener is put at its end.
 3. All tokens of the completion are trained on, its own answer included.
 4. No KL term: `beta` is the trainer's.
 5. A row without a reference has no reward (NaN), and no part in its group's bound.

Command: vigor train --config lab --reward_funcs jepo --scale_rewards none --loss_type dr_grpo
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vigor.rewards.base import Auxiliary, Reward, Text
from vigor.rewards.reference import OPENED, Answer, placed, references_of, slot_of, texts_of
from vigor.rewards.reference_logprob import reference_logprob
from vigor.rollouts import Rollouts
from vigor.shaping import leave_one_out
from vigor.signals import PolicyPass

Bound = Literal["group", "single"]


def jepo(
    *, column: str = "answer", bound: Bound = "single", answer: Answer = "boxed", reference_gradient: bool = True
) -> Reward:
    """What the completion adds to the bound on the reference's log-likelihood, nats.

    Args:
        column: data set column with the reference, or with a solution that boxes it; without one a row has no reward.
        bound: "single", or "group", which is tighter: it asks that one completion of the group explains the reference.
        answer: how answers are marked, "boxed" or "tags".
        reference_gradient: add the gradient on the reference to the loss; False leaves half of the bound's out.

    Raises:
        ValueError: an unknown `answer` or `bound`.
    """
    slot = slot_of(OPENED, answer, "jepo")
    if bound not in get_args(Bound):
        raise ValueError(f"jepo: bound={bound!r} must be one of {', '.join(get_args(Bound))}.")

    def texts(rollouts: Rollouts, policy: PolicyPass) -> list[Text | None]:
        return texts_of(placed(rollouts, policy, references_of(rollouts, column, "jepo"), slot, "jepo"))

    return Reward(
        name="jepo",
        needs=frozenset({"text", "reference_logps"}),
        score=reference_logprob(column=column, answer=answer).score,
        shape=gain_in_bound if bound == "group" else leave_one_out,
        columns=(column,),
        auxiliary=Auxiliary(texts, posterior if bound == "group" else evenly) if reference_gradient else None,
    )


def gain_in_bound(logps_PG: Tensor) -> Tensor:
    """log mean_k p_k - log mean_{k≠i} p_k from the (P, G) log p; NaN stays NaN; 0 for one that is alone."""
    valid_PG = ~logps_PG.isnan()
    wide_PG = logps_PG.double().masked_fill(~valid_PG, -torch.inf)
    n_P1 = valid_PG.sum(-1, keepdim=True)
    whole_P1 = wide_PG.logsumexp(-1, keepdim=True) - n_P1.double().log()
    own_GG = torch.eye(logps_PG.shape[-1], dtype=torch.bool, device=logps_PG.device)
    others_PG = wide_PG[:, None].masked_fill(own_GG, -torch.inf).logsumexp(-1) - (n_P1 - 1).double().log()
    gain_PG = torch.where(n_P1 > 1, whole_P1 - others_PG, 0.0)
    return gain_PG.to(logps_PG.dtype).masked_fill(~valid_PG, torch.nan)


def evenly(logps_PG: Tensor) -> Tensor:
    """1 for every valid score; NaN stays NaN."""
    return torch.ones_like(logps_PG).masked_fill(logps_PG.isnan(), torch.nan)


def posterior(logps_PG: Tensor) -> Tensor:
    """p_i / Σ_k p_k from the (P, G) log p; NaN stays NaN."""
    valid_PG = ~logps_PG.isnan()
    shares_PG = logps_PG.double().masked_fill(~valid_PG, -torch.inf).softmax(-1)
    return shares_PG.to(logps_PG.dtype).masked_fill(~valid_PG, torch.nan)
