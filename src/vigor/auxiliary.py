"""The term that a reward adds to the update's loss: a gradient on a text of its own, such as the reference answer.

    loss = TRL's loss - Σ_i w_i c_i Σ_j log π(a_ij | context_i, a_i,<j)

c_i is the reward's coefficient, times the reward's weight, without gradient. w_i is what TRL's loss makes of the
log-probability of one token of row i with advantage 1: so a paper whose loss sums over the tokens of completion and
text alike is reproduced up to the one factor by which TRL scales them all, gradient accumulation included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vigor.continuation import ContinuationScorer
from vigor.rewards.base import Reward
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

TERMS = "auxiliary_terms"
"""Key of a training batch: for each row, a list of [context ids, text ids, coefficient]."""
LOSSES = ("grpo", "sapo", "bnpo", "dr_grpo", "luspo", "dapo", "cispo", "vespo")
"""Losses whose token weights are known here."""


def active(rewards: Mapping[int, Reward], first: list[float] | None, last: list[float] | None) -> dict[int, Reward]:
    """The rewards whose term is part of the loss at some point of the run: not those that are only watched.

    Args:
        rewards: by their place in `reward_funcs`.
        first: `reward_weights`; None is 1 for all.
        last: `reward_weights_final`.
    """
    return {
        i: reward
        for i, reward in rewards.items()
        if reward.auxiliary is not None and any(weights is None or weights[i] for weights in (first, last or first))
    }


def check(trainer: Any, rewards: Mapping[int, Reward]) -> None:
    """Raises ValueError if the terms of these rewards cannot be added to the trainer's loss."""
    if not rewards:
        return
    name = next(iter(rewards.values())).name
    off = f"Leave the term out with {name.partition('(')[0]}(reference_gradient=False)"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"reward {name!r} adds a term to the loss whose forward passes differ in number between processes: not "
            f"with FSDP or DeepSpeed. {off}, or use DDP."
        )
    if trainer.loss_type not in LOSSES:
        raise ValueError(
            f"reward {name!r} adds a term to the loss, and how loss_type={trainer.loss_type!r} weighs a token is not "
            f"known here. {off}, or choose from {', '.join(LOSSES)}."
        )
    rate = max((m.p for m in trainer.model.modules() if isinstance(m, nn.Dropout)), default=0.0)
    if rate and trainer.args.gradient_checkpointing:
        raise ValueError(
            f"reward {name!r} adds a term to the loss, computed without dropout; gradient checkpointing would compute "
            f"it again with the model's dropout of {rate:g}. Set disable_dropout=True or gradient_checkpointing=False."
        )


def terms_of(reward: Reward, weight: float, scores: Tensor, rollouts: Rollouts, policy: PolicyPass) -> list[list[Any]]:
    """The reward's term for each local row: [] or [[context, text, coefficient · weight]].

    Args:
        reward: one with an `auxiliary`.
        weight: the reward's weight in the mix.
        scores: (B,) gathered scores of whole groups; NaN takes a row out.
        rollouts: the local rows.
        policy: the pass that scored them.
    """
    assert reward.auxiliary is not None
    coefficients_PG = reward.auxiliary.coefficient(scores.view(-1, rollouts.group_size))
    first = rollouts.first_row
    local = (weight * coefficients_PG.flatten()[first : first + len(rollouts)]).tolist()
    placed = reward.auxiliary.rows(rollouts, policy)
    return [[] if row is None or math.isnan(c) or c == 0 else [[*row, c]] for row, c in zip(placed, local, strict=True)]


def token_weights(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    """(R,) float32: w of each row of a micro-batch, see the module.

    Source: `GRPOTrainer._compute_loss` of TRL 1.14 to 1.16; tests/test_auxiliary.py takes them from its gradient.
    """
    mask_RT = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask_RT = mask_RT * inputs["tool_mask"]
    lengths_R = mask_RT.sum(-1).float()
    rows, accumulated = len(lengths_R), trainer.current_gradient_accumulation_steps
    if trainer.loss_type in ("dapo", "cispo", "vespo"):
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        share = tokens * accumulated / trainer.args.steps_per_generation
        # CISPO's ratio, 1 at the first update, is clipped from above only, and may be clipped to less than 1.
        ratio = min(1.0, trainer.epsilon_high) if trainer.loss_type == "cispo" else 1.0
        return torch.full_like(lengths_R, ratio) / share
    tokens_R = {
        "grpo": rows * lengths_R.clamp(min=1.0),
        "sapo": rows * lengths_R.clamp(min=1.0),
        "bnpo": lengths_R.sum().clamp(min=1.0).expand_as(lengths_R),
        "dr_grpo": torch.full_like(lengths_R, float(rows * trainer.max_completion_length)),
        "luspo": torch.full_like(lengths_R, float(rows)),
    }[trainer.loss_type]
    return 1 / (tokens_R * accumulated)


def auxiliary_loss(trainer: Any, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The terms of a micro-batch, a scalar with its graph; 0 where it has none.

    One more forward pass over contexts and texts, at the sampling temperature and without dropout; its graph is held
    beside that of TRL's loss.

    Raises:
        FloatingPointError: the policy gives NaN.
    """
    terms = [(i, *term) for i, of_row in enumerate(inputs[TERMS]) for term in of_row]
    if not terms:
        return torch.zeros((), device=inputs["completion_mask"].device)
    scorer = ContinuationScorer(
        model, temperature=trainer.temperature, micro_batch=trainer.args.per_device_train_batch_size
    )
    logps = scorer.logps([term[1] for term in terms], [term[2] for term in terms], requires_grad=True)
    weights = token_weights(trainer, inputs).tolist()
    sums = torch.stack([row.sum() for row in logps])
    factors = sums.new_tensor([weights[i] * coefficient for i, _, _, coefficient in terms])
    return -(factors * sums).sum()
