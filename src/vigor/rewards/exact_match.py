r"""Exact match: 1 if the answer's text equals the reference's, without any mathematics.

Method: exact match as in question answering (SQuAD, arXiv 1606.05250), used as a reward by search-agent work such as
Search-R1 (arXiv 2503.09516).

    reward(y) = 1[normal(answer(y)) = normal(reference)]

answer(y) is the content of the last \boxed{…}, or the whole completion where there is none. normal(·) is SQuAD's: lower
case, without ASCII punctuation, without the articles a, an, the, white space collapsed.

Departures from the papers:
 1. The \boxed{…}; SQuAD's predictions are bare answers.
 2. A list of references is met by any of them, as in SQuAD; a row without a reference has no reward (NaN).
 3. Text that holds nothing but punctuation and articles keeps them, so that "-" does not equal "a".

Command: vigor train --config lab --reward_funcs exact_match
"""

from __future__ import annotations

import re
import string
from typing import Any

from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.boxed import last_boxed
from vigor.rewards.compose import column_of
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normal(text: str) -> str:
    """The text as SQuAD compares it; only in lower case, without outer white space, where nothing would be left."""
    bare = " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())
    return bare or text.strip().lower()


def exact_match(*, column: str = "answer", normalise: bool = True) -> Reward:
    """1 if the answer equals a reference as text, 0 if not; NaN where the row has no reference.

    Args:
        column: data set column with the reference, or a list of them.
        normalise: compare SQuAD's normal form; False compares the text itself, without outer white space.
    """
    form = normal if normalise else str.strip

    def verdict(text: str, references: Any) -> float | None:
        wanted = [
            str(r) for r in (references if isinstance(references, list | tuple) else [references]) if r is not None
        ]
        if not wanted:
            return None
        boxed = last_boxed(text)
        found = form(text if boxed is None else boxed)
        return float(any(found == form(reference) for reference in wanted))

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        references = column_of(rollouts, column, "exact_match")
        return from_values(list(map(verdict, rollouts.completion_texts, references)), rollouts)

    return Reward(name="exact_match", needs=frozenset({"text"}), score=score, columns=(column,))
