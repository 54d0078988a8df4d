"""What the rewards of a run demand of it, checked before anything is sampled: names, columns, a readable policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from vigor.rewards.base import Reward

POLICY = {"grad_norm", "token_stats", "reference_logps"}
"""What a reward needs that reads the policy itself."""
UNEVEN = ("head_grad_norm",)
"""Rewards of our own that run the model as often as a process has distinct rows."""


def check_columns(ours: Iterable[Reward], dataset: Any) -> None:
    """Refuses a data set without a column that a reward reads.

    Raises:
        ValueError: with the reward, the column, and those that there are.
    """
    columns = dataset.column_names if dataset is not None else None
    if columns is None:  # a stream need not know its columns
        return
    for reward in ours:
        if missing := [column for column in reward.columns if column not in columns]:
            raise ValueError(
                f"reward {reward.name!r} reads the column {missing[0]!r}, but the data set has {', '.join(columns)}. "
                "Rename the column, or leave this reward out."
            )


def check_names(names: Sequence[str]) -> None:
    """Refuses rewards of one name.

    Raises:
        ValueError: with the names.
    """
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"reward_funcs holds {', '.join(repeated)} more than once; their logs would overwrite.")


def check_whole(model: Any) -> None:
    """Refuses a model whose parameters are in parts before the trainer has it; names of models pass.

    Raises:
        ValueError: with the first such parameter.
    """
    if not isinstance(model, nn.Module) or not dist.is_available():
        return
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"the model's {name} is in parts already ({parameter.placements}): sharded when it was loaded "
                "(DistributedConfig, tp_plan), by fully_shard or by tensor parallelism. Hand over the whole model and "
                "let accelerate shard it: --accelerate_config fsdp2."
            )


def check_policy(trainer: Any, ours: Sequence[Reward]) -> None:
    """Refuses a policy that some reward cannot read: one with images, or with parameters in parts.

    Raises:
        ValueError: with the reward, why, and what to use.
    """
    names = [reward.name for reward in ours if reward.needs & POLICY]
    if names and trainer._is_vlm:
        raise ValueError(
            f"reward {names[0]!r} scores text; the policy is a vision-language model, and images would be lost."
        )
    if names and trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            f"reward {names[0]!r} reads the policy, whose parameters FSDP version 1 merges into flat ones. Use "
            "version 2 (--accelerate_config fsdp2; in a file of your own, fsdp_version: 2)."
        )
    if trainer.is_fsdp_enabled or trainer.is_zero3:
        check_even(ours)


def check_even(ours: Iterable[Reward]) -> None:
    """Refuses rewards for which processes do not run equally many passes, and so cannot gather parameters together.

    Raises:
        ValueError: with the reward.
    """
    for reward in ours:
        if "reference_logps" in reward.needs or reward.name in UNEVEN:
            raise ValueError(
                f"reward {reward.name!r} runs forward passes that differ in number between processes, which those of "
                "FSDP and ZeRO-3 must not. Use DDP or ZeRO-1/2."
            )
