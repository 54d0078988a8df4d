"""What the rewards of a run demand of it, checked before anything is sampled: names, columns, a readable policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

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


def check_policy(trainer: Any, ours: Sequence[Reward]) -> None:
    """Refuses a policy that some reward cannot read: one with images, or with parameters in parts.

    Raises:
        ValueError: with the reward, why, and what to use.
    """
    names = [reward.name for reward in ours if reward.needs & POLICY]
    uneven = [r.name for r in ours if "reference_logps" in r.needs or r.name in UNEVEN]
    if names and trainer._is_vlm:
        raise ValueError(
            f"reward {names[0]!r} scores text; the policy is a vision-language model, and images would be lost."
        )
    if names and trainer.is_zero3:
        raise ValueError(
            f"reward {names[0]!r} reads the policy, whose parameters are partitioned by DeepSpeed ZeRO-3: it would "
            "get the norms of parts. Use FSDP2 (--accelerate_config fsdp2), or ZeRO-1/2."
        )
    if names and trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            f"reward {names[0]!r} reads the policy, whose parameters FSDP version 1 merges into flat ones. Use "
            "version 2 (--accelerate_config fsdp2; in a file of your own, fsdp_version: 2)."
        )
    if uneven and trainer.is_fsdp_enabled:
        raise ValueError(
            f"reward {uneven[0]!r} runs forward passes that differ in number between processes, which FSDP's must "
            "not. Use DDP or ZeRO-1/2."
        )
