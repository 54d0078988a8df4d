"""Repetition: a penalty for the share of n-grams that came before. To be added to another reward.

Paper: "Demystifying Long Chain-of-Thought Reasoning in LLMs", arXiv 2502.03373, appendix C.2, in the per-completion
form of open-r1 and TRL (`get_repetition_penalty_reward`).

    reward(y) = -w·(1 - distinct n-grams of y / all n-grams of y),   n = 3, w = 1;  0 where y is shorter than n

Departures from the paper and its code:
 1. The paper puts a penalty on each repeated token, with n = 40; the share is open-r1's.
 2. n-grams are of tokens, as in the paper and in TRL; open-r1 takes words.
 3. Only counted tokens form n-grams: what a tool wrote is neither repeated nor continued by the policy.

Command: vigor train --config lab --reward_funcs accuracy repetition --reward_weights 1 0.1
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def repeated_share(tokens: list[int], n: int) -> float:
    """1 - distinct n-grams / n-grams, in [0, 1); 0 for a text without n-grams."""
    ngrams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def repetition(*, n: int = 3, weight: float = 1.0) -> Reward:
    """The penalty, in (-weight, 0].

    Args:
        n: tokens of an n-gram.
        weight: w, the penalty of a text that is all repeats, positive.

    Raises:
        ValueError: n below 1, or a weight that is not positive.
    """
    if n < 1 or not weight > 0:
        raise ValueError(
            f"repetition: n={n} must be at least 1, and weight={weight} positive; the sign is the reward's."
        )

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        rows = zip(rollouts.input_ids_BL, rollouts.completion_mask_BL.bool(), strict=True)
        return from_values(
            [0.0 - weight * repeated_share(ids_L[mask_L].tolist(), n) for ids_L, mask_L in rows], rollouts
        )

    return Reward(name="repetition", needs=frozenset({"text"}), score=score)
