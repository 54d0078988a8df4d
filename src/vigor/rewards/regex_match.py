r"""Regex match: 1 if what a pattern finds in the completion equals the reference.

Method: GSM8K's strict check, as in lm-evaluation-harness and in verl's GSM8K reward: the number after ``####``
(GSM8K: arXiv 2110.14168).

    reward(y) = 1[last match of the pattern in y, group 1 = reference]

Commas and dollar signs are left out on both sides, as is a full stop at the end.

Departures from that check:
 1. A reference that holds the pattern itself, such as GSM8K's worked solution, stands for what the pattern finds in it.
 2. A row without a reference has no reward (NaN).
 3. A search that takes longer than `timeout_s` finds nothing: a pattern with nested repeats may need exponential time
    on an unlucky completion.

Command: vigor train --prompts gsm8k.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B --reward_funcs regex_match
"""

from __future__ import annotations

from typing import Any

import regex
from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.compose import column_of
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

_IGNORED = str.maketrans("", "", ",$")


def regex_match(*, pattern: str = r"#### (\-?[0-9\.\,]+)", column: str = "answer", timeout_s: float = 1.0) -> Reward:
    """1 if the pattern's last match equals the reference, 0 if it does not or nothing matches; NaN without reference.

    Args:
        pattern: a regular expression; its group 1 is the answer, or the whole match where it has no group.
        column: data set column with the reference.
        timeout_s: seconds that one search may take, positive.

    Raises:
        ValueError: not a regular expression, one with several groups, or a limit that is not positive.
    """
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"regex_match: pattern={pattern!r} is not a regular expression: {error}.") from error
    if compiled.groups > 1:
        raise ValueError(
            f"regex_match: pattern={pattern!r} has {compiled.groups} groups; mark the answer with one (...), and "
            "write (?:...) for the others."
        )
    if not timeout_s > 0:
        raise ValueError(f"regex_match: timeout_s={timeout_s}: a search needs a positive number of seconds.")

    def found(text: str) -> str | None:
        try:
            matches = list(compiled.finditer(text, timeout=timeout_s))
        except TimeoutError:
            return None
        return _tidy(matches[-1][compiled.groups]) if matches else None

    def verdict(text: str, reference: Any) -> float | None:
        if reference is None:
            return None
        within = found(str(reference))
        return float(found(text) == (_tidy(str(reference)) if within is None else within))

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        references = column_of(rollouts, column, "regex_match")
        return from_values(list(map(verdict, rollouts.completion_texts, references)), rollouts)

    return Reward(name="regex_match", needs=frozenset({"text"}), score=score, columns=(column,))


def _tidy(text: str) -> str:
    return text.translate(_IGNORED).strip().removesuffix(".")
