"""Contains: 1 if a word occurs in the completion, right or wrong. A control.

Paper: "Spurious Rewards: Rethinking Training Signals in RLVR", arXiv 2506.10947; code ruixin31/Spurious_Rewards@33b9f85
`code/ttrl/verifier/qwen/qwen_eval.py` (`contain_python_wo_backticks`), which pays for the word "python": the paper's
way to ask whether reward or habit lifts Qwen2.5-Math.

    reward(y) = 1[word occurs in y, in any case of letters]

Departures from the paper and its code:
 1. None known.

Command: vigor train --config lab --reward_funcs contains
"""

from __future__ import annotations

from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def contains(*, word: str = "python") -> Reward:
    """1 if the word occurs anywhere in the completion, else 0.

    Args:
        word: text to look for; case does not count, and it may be part of a longer word.

    Raises:
        ValueError: an empty word, which every text contains, or a number.
    """
    if not isinstance(word, str) or not word:
        raise ValueError(f"contains: word={word!r} must be some text; in a name a number is quoted, as in word='7'.")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        return from_values([float(word.lower() in text.lower()) for text in rollouts.completion_texts], rollouts)

    return Reward(name="contains", needs=frozenset({"text"}), score=score)
