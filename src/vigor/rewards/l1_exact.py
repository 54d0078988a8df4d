"""L1-Exact: right answers, less a penalty for every token away from the length that was asked for.

Paper: "L1: Controlling How Long A Reasoning Model Thinks With Reinforcement Learning" (LCPO), arXiv 2503.04697; code
cmu-l3/l1 `math_reward.py` (`get_delta_score_linear`), `scripts/train/run_l1_exact.sh`.

    reward(y) = A(y) - α·|n - T|

A is 1 for a right answer and 0 for a wrong one, n the length that the prompt asks for, T the completion's tokens, EOS
included; α = 0.0003.

Departures from the paper and its code:
 1. None in the formula. The prompt must ask for n tokens; the data set brings both.

Command: vigor train --prompts my.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B --reward_funcs l1_exact
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.compose import column_of, inner
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def l1_exact(*, of: str | Reward = "accuracy", column: str = "target_length", alpha: float = 0.0003) -> Reward:
    """Correctness less α times the distance from the target length; NaN where the row has no target or no label.

    Args:
        of: A, a reward or its spec.
        column: data set column with n, in tokens.
        alpha: α, the price of a token, not negative.

    Raises:
        ValueError: a negative α, no such reward, or one that is shaped within its group.
    """
    if alpha < 0:
        raise ValueError(f"l1_exact: alpha={alpha} would pay for missing the length; it must not be negative.")
    reward = inner(of, "l1_exact")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        targets_B = from_values(list(column_of(rollouts, column, "l1_exact")), rollouts)
        return reward.score(rollouts, policy) - alpha * (targets_B - rollouts.lengths_B).abs()

    columns = tuple(dict.fromkeys((*reward.columns, column)))
    return replace(reward, name="l1_exact", score=score, columns=columns)
