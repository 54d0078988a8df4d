"""Rewards that are a reduction of one token statistic over the completion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from vigor.rewards.base import Reward, Score, Shape, Step, compose, unshaped
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

Reduce = Literal["mean", "sum", "min"]


def of_tokens(statistic: str, reduce: Reduce = "mean", each: Callable[[Tensor], Tensor] | None = None) -> Score:
    """The signal that reduces a statistic of `vigor.tokenstats.STATISTICS`, each value through `each` first."""

    def signal(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        stats = policy.token_stats(statistic)
        values_BL = stats[statistic] if each is None else each(stats[statistic])
        return {"mean": stats.mean, "sum": stats.sum, "min": stats.min}[reduce](values_BL)

    return signal


def token_reward(name: str, statistic: str, *steps: Step, reduce: Reduce = "mean", shape: Shape = unshaped) -> Reward:
    """A reward from the reduction of one statistic, per-row steps and a group shape."""
    return compose(name, {"token_stats", statistic}, of_tokens(statistic, reduce), *steps, shape=shape)
