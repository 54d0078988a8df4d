"""Measures of a task from the verdicts on its samples, with 95 % intervals. Plain numbers in, plain numbers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vigor.lab.evaluate import clustered_interval, pass_at_k, wilson_interval

DRAWS = 2000


@dataclass(frozen=True)
class Measure:
    """A share in [0, 1] and its 95 % interval."""

    value: float
    low: float
    high: float
    interval: str
    """How the interval was made."""

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def measures(
    correct: Sequence[Sequence[bool]],
    votes: Sequence[Sequence[Hashable]] | None = None,
    parts: Sequence[Sequence[bool]] | None = None,
) -> dict[str, Measure]:
    """What one extraction shows.

    Args:
        correct: for each problem the verdicts on its samples, equally many for all.
        votes: in the same shape, labels of which equal ones are the same answer; None casts no vote.
        parts: for each problem the verdicts on its single instructions, any number.

    Returns:
        One sample a problem: "accuracy", with Wilson's interval. Several: "avg@k", with Wilson's interval of effective
        sample size, because samples of one problem are not independent; "pass@j" for j = 2, 4, 8 … and k, without
        bias (Chen et al. 2021, arXiv 2107.03374, equation 1), and "majority@k", with Wilson's over problems. Where
        there are parts, "instructions", with a bootstrap over problems.

    Raises:
        ValueError: there is no problem, or problems differ in their number of samples.
    """
    k = len(correct[0]) if correct else 0
    if k == 0 or any(len(group) != k for group in correct):
        raise ValueError("measures: every problem needs the same number of samples, at least one.")
    n = len(correct)
    shares = [sum(group) / k for group in correct]
    found = {}
    if k == 1:
        found["accuracy"] = _wilson(sum(shares) / n, n)
    else:
        mean = sum(shares) / n
        found[f"avg@{k}"] = Measure(mean, *clustered_interval(shares, k), "Wilson, effective sample size")
        for j in sorted({2**i for i in range(1, k.bit_length())} | {k}):
            found[f"pass@{j}"] = _wilson(sum(pass_at_k(k, sum(group), j) for group in correct) / n, n)
        if votes is not None:
            right = sum(majority_right(group, of) for group, of in zip(correct, votes, strict=True))
            found[f"majority@{k}"] = _wilson(right / n, n)
    if parts is not None:
        found["instructions"] = _pooled(parts)
    return found


def majority_right(correct: Sequence[bool], votes: Sequence[Hashable]) -> bool:
    """Whether the most frequent answer is right; of equally frequent ones the first counts. No vote at all is wrong."""
    counts = Counter(vote for vote in votes if vote is not None)
    return bool(counts) and bool(correct[list(votes).index(counts.most_common(1)[0][0])])


def bootstrap(sums: Sequence[tuple[float, float]], draws: int = DRAWS, seed: int = 0) -> list[float]:
    """Σ of the first numbers / Σ of the second, of problems drawn with replacement; sorted, ``draws`` of them."""
    import numpy as np

    rng = np.random.default_rng(seed)
    pairs = np.asarray(sums, dtype=np.float64)
    ratios: list[float] = []
    while len(ratios) < draws:
        block = min(draws - len(ratios), max(1, 2_000_000 // len(pairs)))
        tops, bottoms = pairs[rng.integers(len(pairs), size=(block, len(pairs)))].sum(1).T
        ratios += (tops / bottoms).tolist()
    return sorted(ratios)


def central(ordered: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the middle ``level`` of ordered values."""
    cut = round((1 - level) / 2 * len(ordered))
    return ordered[cut], ordered[len(ordered) - 1 - cut]


def _wilson(share: float, n: int) -> Measure:
    return Measure(share, *wilson_interval(share, n), "Wilson")


def _pooled(parts: Sequence[Sequence[bool]]) -> Measure:
    sums = [(float(sum(group)), float(len(group))) for group in parts]
    value = sum(top for top, _ in sums) / sum(bottom for _, bottom in sums)
    return Measure(value, *central(bootstrap(sums)), "bootstrap over problems")
