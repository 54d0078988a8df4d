r"""Multiple choice: 1 if the letter that the completion settles on is the reference's.

Paper: the binary reward on options of "Extending RLVR to Open-Ended Tasks via Verifiable Multiple-Choice
Reformulation", arXiv 2511.02463; no official code.

    reward(y) = 1[letter(y) = letter(reference)]

letter(y), in this order: the last non-empty \boxed{…} (``B``, ``(B)``, ``\text{B}``, ``B. 42``); the last letter that
"answer is", "answer:" or "option" announces; the whole completion, if it is nothing but a letter.

Departures from the paper:
 1. How the letter is found is ours.
 2. A row whose reference is no letter of `letters` has no reward (NaN).

Command: vigor train --prompts my.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B --reward_funcs multiple_choice
"""

from __future__ import annotations

import re

from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.boxed import last_boxed
from vigor.rewards.compose import column_of
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

_WRAPPING = r"(?:\\(?:text|mathrm|mathbf|textbf)\{|[\s($*\[\"'])*"
_ALONE = re.compile(rf"{_WRAPPING}([A-Za-z])(?![A-Za-z])")
# A lower-case letter must end its phrase: "the answer is a cat" names no option.
_ANNOUNCED = re.compile(
    rf"(?i:\banswer\s*(?:is\s*:?|:)|\boption\s*:?){_WRAPPING}([A-Z](?![A-Za-z])|[a-z](?=\s*(?:[^\w\s]|$)))"
)
_ONLY = re.compile(rf"{_WRAPPING}([A-Za-z])[\s)$*\]\"'.}}]*")


def choice(text: str, letters: str) -> str | None:
    r"""The letter, in upper case, that a completion settles on; None where it settles on none of `letters`."""
    boxed = last_boxed(text)
    if boxed is not None and boxed.strip():
        found = _ALONE.match(boxed)
    else:
        announced = list(_ANNOUNCED.finditer(text))
        found = announced[-1] if announced else _ONLY.fullmatch(text)
    return found[1].upper() if found is not None and found[1].upper() in letters else None


def multiple_choice(*, column: str = "answer", letters: str = "ABCDEFGHIJ") -> Reward:
    """1 for the right letter, 0 for another or none; NaN where the reference is no letter.

    Args:
        column: data set column with the right letter, such as "B" or "(B)".
        letters: the letters that name options, in upper case.

    Raises:
        ValueError: `letters` holds anything but different upper-case letters A to Z.
    """
    if not re.fullmatch(r"[A-Z]+", letters) or len(set(letters)) < len(letters):
        raise ValueError(f"multiple_choice: letters={letters!r} must be different letters A to Z, such as ABCD.")

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        values: list[float | None] = []
        for text, reference in zip(
            rollouts.completion_texts, column_of(rollouts, column, "multiple_choice"), strict=True
        ):
            only = _ONLY.fullmatch(str(reference or ""))
            known = only is not None and only[1].upper() in letters
            values.append(float(choice(text, letters) == only[1].upper()) if only is not None and known else None)
        return from_values(values, rollouts)

    return Reward(name="multiple_choice", needs=frozenset({"text"}), score=score, columns=(column,))
