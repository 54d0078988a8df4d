"""Keyword chain: does the completion name the reference's keywords, in the reference's order?

Paper: Jiang et al., "From Verifiable Dot to Reward Chain" (RLVRR), arXiv 2601.18533; code YJiangcm/RLVRR@23c0956
`openrlhf/reward_tools/reward_fn.py` (`keyword_reward_func`), the content half of its reward.

    reward(y) = mean over key points of max over keyword lists of LCS(k(y), k(a)) / max(|k(y)|, |k(a)|)

k(·) is the sequence of a list's keywords as they occur in a text (whole words, any case, repeats included), a the
reference, LCS the length of the longest common subsequence.

Departures from the code:
 1. The style half is left out: there it runs Python from the data set.
 2. A completion without any keyword of a list scores 0 for it, as there; so does a reference without one.
 3. A row without keywords or reference has no reward (NaN); there it gets 0.
 4. Keywords are read as JSON or lists, never evaluated. Blank keywords are left out.

Command: vigor train --prompts my.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B --reward_funcs keyword_chain
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vigor.rewards.base import Reward, from_values
from vigor.rewards.compose import column_of
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass


def occurrences(keywords: Sequence[str], text: str) -> list[str]:
    """The keywords as they occur in the text one after the other, in lower case.

    Where several begin at one place, the one that is listed first counts.
    """
    listed = [keyword for keyword in keywords if keyword.strip()]
    if not listed:
        return []
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, listed))})(?!\w)"
    return [found.lower() for found in re.findall(pattern, text, flags=re.IGNORECASE)]


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence; time |one|·|other|, memory |other|."""
    lengths = [0] * (len(other) + 1)
    for a in one:
        before = 0
        for j, b in enumerate(other, start=1):
            before, lengths[j] = lengths[j], before + 1 if a == b else max(lengths[j], lengths[j - 1])
    return lengths[-1]


def chain_score(text: str, reference: str, key_points: Sequence[Sequence[Sequence[str]]]) -> float:
    """The formula above; key_points[i] holds the alternative keyword lists of key point i. 0 without key points."""
    scores = []
    for alternatives in key_points:
        best = 0.0
        for keywords in alternatives:
            found, wanted = occurrences(keywords, text), occurrences(keywords, reference)
            if longest := max(len(found), len(wanted)):
                best = max(best, common_subsequence(found, wanted) / longest)
        scores.append(best)
    return sum(scores) / len(scores) if scores else 0.0


def read_key_points(value: Any) -> list[list[list[str]]] | None:
    """Key points from a data set cell: a list of keywords, of such lists (one a key point), or of lists of such lists.

    A cell of text is read as JSON; None stays None.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"keyword_chain: {value[:80]!r} is not JSON ({error}); write a list of keywords."
            ) from error
    if value is None:
        return None
    depth, inside = 0, value
    while isinstance(inside, list | tuple) and inside:
        depth, inside = depth + 1, inside[0]
    if depth == 1:
        value = [[value]]
    elif depth == 2:
        value = [[keywords] for keywords in value]
    words = [word for alternatives in value for keywords in alternatives for word in keywords] if depth else []
    if depth > 3 or not all(isinstance(word, str) for word in words) or not isinstance(value, list | tuple):
        raise ValueError(
            f"keyword_chain: cannot read the keywords {value!r}; write a list of keywords, or of such lists."
        )
    return [[list(keywords) for keywords in alternatives] for alternatives in value]


def keyword_chain(*, column: str = "answer", keywords: str = "keywords") -> Reward:
    """How much of the reference's chain of keywords the completion follows, in [0, 1]; NaN where the row has none.

    Args:
        column: data set column with the reference text.
        keywords: data set column with its keywords, see `read_key_points`.

    Raises:
        ValueError: when scoring, keywords that cannot be read.
    """

    def verdict(text: str, reference: str | None, cell: Any) -> float | None:
        points = read_key_points(cell)
        return None if reference is None or points is None else chain_score(text, reference, points)

    def score(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        references = column_of(rollouts, column, "keyword_chain")
        cells = column_of(rollouts, keywords, "keyword_chain")
        return from_values(list(map(verdict, rollouts.completion_texts, references, cells)), rollouts)

    return Reward(name="keyword_chain", needs=frozenset({"text"}), score=score, columns=(column, keywords))
