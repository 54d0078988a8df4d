r"""Agreement between completions: answers, clusters of equal answers, majorities. Pure functions on lists of texts.

What counts as an answer (`extract`) and when two are the same (`equal`) is the caller's choice; papers differ in both.
An answer is None where a completion has none: it joins no cluster and casts no vote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, get_args

from torch import Tensor

from vigor.rewards.base import from_values
from vigor.rewards.boxed import last_boxed
from vigor.rewards.math_equal import MathVerifier
from vigor.rollouts import BatchTexts, Rollouts

Extract = Callable[[str], str | None]
"""The answer of a completion, None where it has none."""
Equal = Callable[[str, str], bool]
"""Whether the first answer is the same as the second. Need not be symmetric: the second is the known one."""
Equality = Literal["string", "math"] | Equal
Ties = Literal["first", "none"]


def boxed_answer(text: str) -> str | None:
    r"""The content of the last \boxed{...}, without white space at its ends; None where there is none, or nothing."""
    return (last_boxed(text) or "").strip() or None


def same_string(answer: str, known: str) -> bool:
    """Equal character by character."""
    return answer == known


def equality(equal: Equality, *, timeout_s: float = 5.0) -> Equal:
    r"""The comparison that a name stands for; a function stays itself.

    "string" compares character by character. "math" asks math-verify, in a process that can be killed
    (`vigor.rewards.math_equal`): 1/2 equals 0.5. What it cannot read, or not in `timeout_s` seconds, is equal only to
    the same text.

    Raises:
        ValueError: an unknown name.
    """
    if callable(equal):
        return equal
    if equal == "string":
        return same_string
    if equal != "math":
        names = ", ".join(get_args(get_args(Equality)[0]))
        raise ValueError(
            f"equal={equal!r} is no comparison: choose one of {names}, or give a function (answer, known)."
        )
    verifier = _verifier(timeout_s)

    def same_value(answer: str, known: str) -> bool:
        return answer == known or verifier.verify([f"\\boxed{{{answer}}}"], [known])[0] == 1.0

    return same_value


@cache
def _verifier(timeout_s: float) -> MathVerifier:
    """One child process and one memory of verdicts for all rewards that compare answers with each other."""
    return MathVerifier(timeout_s=timeout_s)


def cluster(answers: Sequence[str | None], equal: Equal = same_string) -> list[int | None]:
    """The cluster of each answer, numbered by first appearance; None for no answer.

    Greedy: an answer joins the first cluster whose first member it equals. For an equivalence relation these are its
    classes; a relation that is not transitive makes the result depend on the order of the answers.
    """
    firsts: list[str] = []
    found: list[int | None] = []
    for answer in answers:
        if answer is None:
            found.append(None)
            continue
        at = next((k for k, first in enumerate(firsts) if equal(answer, first)), len(firsts))
        if at == len(firsts):
            firsts.append(answer)
        found.append(at)
    return found


def shares(clusters: Sequence[int | None]) -> list[float]:
    """Each row's cluster size divided by the number of rows; 0 for no answer."""
    return [0.0 if k is None else sum(other == k for other in clusters) / len(clusters) for k in clusters]


def cluster_entropy(clusters: Sequence[int | None]) -> float:
    """Entropy of the cluster sizes in nats; each row without an answer is a cluster of its own."""
    sizes = [sum(other == k for other in clusters) for k in sorted({k for k in clusters if k is not None})]
    sizes += [1] * sum(k is None for k in clusters)
    return -math.fsum(n / len(clusters) * math.log(n / len(clusters)) for n in sizes)


def majority(answers: Sequence[str | None], equal: Equal = same_string, ties: Ties = "first") -> str | None:
    """The first member of the largest cluster; None where there is no answer at all.

    Args:
        answers: one a vote; None casts none.
        equal: when two answers are the same vote.
        ties: of clusters that are equally large "first" takes the one that appeared first, as a Python Counter does in
            the official codes; "none" takes none of them.

    Raises:
        ValueError: an unknown rule for ties.
    """
    if ties not in get_args(Ties):
        raise ValueError(f"ties={ties!r} must be one of {', '.join(get_args(Ties))}.")
    clusters = cluster(answers, equal)
    voted = [k for k in clusters if k is not None]
    if not voted:
        return None
    sizes = [voted.count(k) for k in range(max(voted) + 1)]
    if ties == "none" and sizes.count(max(sizes)) > 1:
        return None
    return answers[clusters.index(sizes.index(max(sizes)))]


def majority_at_k(
    answers: Sequence[str | None], reference: str, k: int, *, votes: Equal = same_string, check: Equal = same_string
) -> float:
    """Self-consistency: the share of blocks of k answers whose majority is right.

    Wang et al. 2023, arXiv 2203.11171. Blocks of k in the order given, so that the estimate has no bias; answers that
    do not fill a last block are left out. A block without any answer is wrong.

    Raises:
        ValueError: k is not positive, or there are fewer than k answers.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"majority_at_k: k must lie between 1 and the {len(answers)} answers, got {k}.")
    blocks = [answers[i : i + k] for i in range(0, len(answers) - k + 1, k)]
    labels = [majority(block, votes) for block in blocks]
    return sum(label is not None and check(label, reference) for label in labels) / len(labels)


def matches(answers: Sequence[str | None], label: str | None, equal: Equal) -> list[float | None]:
    """1 for each answer that equals the label, else 0; all 0 where there is no label."""
    return [float(answer is not None and label is not None and equal(answer, label)) for answer in answers]


def score_groups(rollouts: Rollouts, judge: Callable[[BatchTexts, range], list[float | None]]) -> Tensor:
    """(B,) float32 scores of this process's rows from a function of whole groups; None becomes NaN.

    Args:
        rollouts: with the texts of all processes, or with whole groups.
        judge: (texts of the batch, rows of one group) -> one value a row. It is called once for each group that this
            process holds a row of; a group that two processes share is judged by both, from the same texts.

    Raises:
        ValueError: the rollouts hold parts of groups and no other texts.
    """
    texts, first = rollouts.whole_batch()
    size = rollouts.group_size
    values: dict[int, float | None] = {}
    for start in range(first // size * size, first + len(rollouts), size):
        rows = range(start, start + size)
        values.update(zip(rows, judge(texts, rows), strict=True))
    return from_values([values[row] for row in range(first, first + len(rollouts))], rollouts)
