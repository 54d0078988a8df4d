"""Rows of the common table: verifiable rewards and controls (family F4)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from rewards_table import BATCH, Completion, G, Row, by_row, in_groups
from torch import nn


def texts(*written: tuple[str, bool, dict[str, Any]]) -> tuple[Completion, ...]:
    """The common batch's tokens with other texts: (text, whether it is right, columns)."""
    return tuple(
        dataclasses.replace(completion, text=text, right=right, columns=columns)
        for completion, (text, right, columns) in zip(BATCH, written, strict=True)
    )


def with_columns(**columns: Sequence[Any]) -> tuple[Completion, ...]:
    """The common batch with further columns."""
    return tuple(
        dataclasses.replace(c, columns={**c.columns, **{name: values[i] for name, values in columns.items()}})
        for i, c in enumerate(BATCH)
    )


def length(completion: Completion) -> int:
    return len(completion.sample.counted) if completion.sample.completion else 0


def right(model: nn.Module, completion: Completion) -> float:
    return float(completion.right)


def slow_format(model: nn.Module, completion: Completion) -> float:
    return float(re.search(r"\\boxed\{[^{}]*[^{} ]", completion.text) is not None)


def slow_draws(seed: int, n: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed * 1_000_003)
    return [torch.rand((), generator=generator).item() for _ in range(n)]


def slow_random(model: nn.Module, batch: Sequence[Completion]) -> list[float]:
    return [float(draw < 0.5) for draw in slow_draws(0, len(batch))]


def slow_noisy(model: nn.Module, batch: Sequence[Completion]) -> list[float]:
    return [
        float(completion.right != (draw < 0.1))
        for completion, draw in zip(batch, slow_draws(1, len(batch)), strict=True)
    ]


def slow_corrected(correction: str, false_positive: float, false_negative: float) -> Any:
    def slow(model: nn.Module, batch: Sequence[Completion]) -> list[float]:
        values = []
        for completion, draw in zip(batch, slow_draws(4, len(batch)), strict=True):
            flipped = draw < (false_negative if completion.right else false_positive)
            seen = int(completion.right != flipped)
            backward = (seen - false_positive) / (1 - false_positive - false_negative)
            forward = false_negative if seen == 1 else false_negative - 1
            values.append({"backward": backward, "forward": forward}[correction])
        return values

    return slow


CHOICES = texts(
    (r"I take \boxed{B}", True, {"answer": "B"}),
    ("The answer is (C). Or is the answer is **D**?", False, {"answer": "C"}),
    (r"\boxed{\text{A}}", True, {"answer": "(A)"}),
    ("d", True, {"answer": "D"}),
    (r"\boxed{(b) 42}", True, {"answer": "b"}),
    ("Answer: C", False, {"answer": "A"}),
    ("no idea at all", False, {"answer": "A"}),
    (r"\boxed{Bad}", False, {"answer": "B"}),
)
WORDS = texts(
    (r"\boxed{the Eiffel Tower!}", True, {"answer": ["Eiffel tower", "La tour Eiffel"]}),
    ("It is the Eiffel Tower", False, {"answer": ["Eiffel tower", "x"]}),
    ("An  eiffel\ttower.", True, {"answer": ["Louvre", "Eiffel tower"]}),
    (r"\boxed{tower Eiffel}", False, {"answer": ["Eiffel tower"]}),
    ("-", False, {"answer": ["a"]}),
    ("Ca", True, {"answer": ["ca"]}),
    (r"\boxed{}", False, {"answer": ["ca"]}),
    ("ca or cb", False, {"answer": ["ca"]}),
)
HASHES = texts(
    ("so\n#### 1,234", True, {"answer": "1234"}),
    ("#### 5 then #### $-7.", False, {"answer": "-7"}),
    ("#### -7.", True, {"answer": "lots of steps\n#### -7"}),
    ("1234", False, {"answer": "1234"}),
    ("#### 12", False, {"answer": "1"}),
    ("#### 1 #### 12", True, {"answer": "12"}),
    ("####12", False, {"answer": "12"}),
    ("#### 0.50", False, {"answer": "0.5"}),
)


def slow_exact_match(model: nn.Module, completion: Completion) -> float:
    def normal(text: str) -> str:
        kept = "".join(" " if c.isspace() else c for c in text.lower() if c not in string.punctuation)
        words = [word for word in kept.split(" ") if word not in ("", "a", "an", "the")]
        return " ".join(words) if words else text.strip().lower()

    boxed = re.findall(r"\\boxed\{([^{}]*)\}", completion.text)
    found = boxed[-1] if boxed else completion.text
    return float(normal(found) in [normal(reference) for reference in completion.columns["answer"]])


REFERENCE = "First the heat rises. Then the gas expands, and the Heat is work."
CHAIN = texts(
    ("Heat, gas, heat.", False, {"answer": REFERENCE, "keywords": ["heat", "gas"]}),
    ("gas before heat", False, {"answer": REFERENCE, "keywords": ["heat", "gas"]}),
    ("preheat the gases", False, {"answer": REFERENCE, "keywords": ["heat", "gas"]}),
    (REFERENCE, False, {"answer": REFERENCE, "keywords": [["heat", "gas"], ["work"]]}),
    ("work work", False, {"answer": REFERENCE, "keywords": [["heat", "gas"], ["work"]]}),
    ("rises", False, {"answer": REFERENCE, "keywords": [[["absent"], ["rises"]], [["gas expands"], ["work"]]]}),
    ("heat gas heat gas heat", False, {"answer": REFERENCE, "keywords": ["heat", "gas"]}),
    ("nothing", False, {"answer": REFERENCE, "keywords": '["heat", "gas"]'}),
)


def slow_chain(model: nn.Module, completion: Completion) -> float:
    cell = completion.columns["keywords"]
    cell = cell if not isinstance(cell, str) else ["heat", "gas"]
    points = cell if isinstance(cell[0], list) else [cell]
    points = [point if isinstance(point[0], list) else [point] for point in points]

    def sequence(keywords: Sequence[str], text: str) -> list[str]:
        found, i, text = [], 0, text.lower()
        while i < len(text):
            for keyword in keywords:
                before, after = text[i - 1 : i] if i else "", text[i + len(keyword) : i + len(keyword) + 1]
                if text.startswith(keyword.lower(), i) and not before.isalnum() and not after.isalnum():
                    found.append(keyword.lower())
                    i += len(keyword) - 1
                    break
            i += 1
        return found

    def lcs(one: list[str], other: list[str]) -> int:
        subsequences = (s for n in range(len(one), 0, -1) for s in itertools.combinations(one, n))
        return next((len(s) for s in subsequences if is_subsequence(s, other)), 0)

    def is_subsequence(short: Sequence[str], long: Sequence[str]) -> bool:
        rest = iter(long)
        return all(item in rest for item in short)

    scores = []
    for alternatives in points:
        values = [0.0]
        for keywords in alternatives:
            one, other = sequence(keywords, completion.text), sequence(keywords, completion.columns["answer"])
            values.append(lcs(one, other) / max(len(one), len(other)) if one or other else 0.0)
        scores.append(max(values))
    return math.fsum(scores) / len(scores)


def slow_tiers(model: nn.Module, completion: Completion) -> float:
    grade = slow_chain(model, completion)
    return max(k / 4 for k in range(5) if grade >= k / 4 - 1e-9)


LANGUAGES = texts(
    ("twice three is six", False, {}),
    ("два плюс two", False, {}),
    ("答案是 six 。", False, {}),
    ("2 + 2 = 4", False, {}),
    ("αβ x γ", False, {}),
    ("don't", False, {}),
    ("naïve café", False, {}),
    ("Ωmega", False, {}),
)


def slow_language(model: nn.Module, completion: Completion) -> float:
    scripts = [
        unicodedata.name(c).split()[0] if unicodedata.category(c).startswith("L") else "" for c in completion.text
    ]
    words = [script for script, _ in itertools.groupby(scripts) if script]
    return words.count("LATIN") / len(words) if words else 1.0


def slow_repetition(model: nn.Module, completion: Completion) -> float:
    tokens = [completion.sample.ids[t] for t in completion.sample.counted]
    seen: list[list[int]] = []
    repeats = 0
    for i in range(len(tokens) - 2):
        repeats += tokens[i : i + 3] in seen
        seen.append(tokens[i : i + 3])
    return -repeats / len(seen) if seen else 0.0


def slow_overlong(longest: int, cache: int) -> Any:
    def slow(model: nn.Module, completion: Completion) -> float:
        t = length(completion)
        if t <= longest - cache:
            return 0.0
        return ((longest - cache) - t) / cache if t <= longest else -1.0

    return slow


TARGETS = with_columns(target_length=[5, 4, 3, 2, 1000, 6, 1, 3000])


def slow_l1_exact(model: nn.Module, batch: Sequence[Completion]) -> list[float]:
    return [float(c.right) - 0.0003 * abs(c.columns["target_length"] - length(c)) for c in batch]


def slow_l1_max(model: nn.Module, completion: Completion) -> float:
    room = 0.0003 * (completion.columns["target_length"] - length(completion)) + 0.5
    return float(completion.right) * min(max(room, 0.0), 1.0)


def slow_cosine(longest: int) -> Any:
    def slow(model: nn.Module, completion: Completion) -> float:
        near = 0.5 * (1 + math.cos(math.pi * min(length(completion), longest) / longest))
        short, long = (1.0, 0.5) if completion.right else (-1.0, -0.5)
        return long + (short - long) * near

    return slow


def slow_kimi(model: nn.Module, completion: Completion) -> float:
    return -length(completion) - (0 if completion.right else 0.5)


@in_groups
def kimi_shape(scores: list[float]) -> list[float]:
    rows = [(math.floor(-x), x == math.floor(x)) for x in scores]
    shortest, longest = min(t for t, _ in rows), max(t for t, _ in rows)
    if shortest == longest:
        return [0.0] * len(rows)
    lambdas = [0.5 - (t - shortest) / (longest - shortest) for t, _ in rows]
    return [x if correct else min(0.0, x) for x, (_, correct) in zip(lambdas, rows, strict=True)]


WRONG = tuple(
    dataclasses.replace(c, right=r, columns={"wrong_answer": w})
    for c, r, w in zip(BATCH, [0, 0, 0, 1, 0, 1, 0, 0], ["71"] * 4 + ["2"] * 4, strict=True)
)
VOTES = texts(
    (r"\boxed{72}", False, {"answer": "72"}),
    (r"\boxed{71}", True, {"answer": "72"}),
    (r"\boxed{70}", False, {"answer": "72"}),
    (r"\boxed{ 71 }", True, {"answer": "72"}),
    (r"\boxed{1}", True, {"answer": "0.5"}),
    (r"\boxed{2}", False, {"answer": "0.5"}),
    (r"\boxed{}", False, {"answer": "0.5"}),
    (r"\boxed{\frac12}", False, {"answer": "0.5"}),
)


def slow_wrong_majority(model: nn.Module, batch: Sequence[Completion]) -> list[float]:
    values = []
    for start in range(0, len(batch), G):
        group = batch[start : start + G]
        answers = [(re.findall(r"\\boxed\{(.*)\}", c.text) or [""])[-1].strip() for c in group]
        wrong = [a for a in answers if a and a not in (batch[start].columns["answer"], r"\frac12")]
        label = max(wrong, key=lambda a: (wrong.count(a), -wrong.index(a))) if wrong else None
        values += [math.nan if label is None else float(answer == label) for answer in answers]
    return values


def run_python(codes: list[str], tests: list[list[str]]) -> list[list[bool]]:
    """Runs this file's own snippets, and nothing else: it isolates nothing."""
    verdicts = []
    for code, checks in zip(codes, tests, strict=True):
        space: dict[str, Any] = {}
        try:
            exec(code, space)
            verdicts.append([bool(eval(check, space)) for check in checks])
        except (NameError, SyntaxError):
            verdicts.append([False] * len(checks))
    return verdicts


def slow_tests(completion: Completion) -> list[bool]:
    """What each snippet's author knows of it: the numbers after #."""
    if not completion.text:
        return [False, False, False]
    return [bit == "1" for bit in completion.text.split("#")[1][:3]]


TESTS = {"tests": ["f(1) == 1", "f(2) == 4", "f(-1) == 1"]}
CODE = texts(
    ("f = lambda x: x * x  #111", True, TESTS),
    ("Here:\n```python\nf = lambda x: x  #100\n```\nthat is it.", False, TESTS),
    ("f = lambda x: abs(x)  #101", False, TESTS),
    ("```\nf = lambda x: 0\n```\nno:\n```py\nf = lambda x: 1  #101\n```", False, TESTS),
    ("def f(x) return x  #000", False, TESTS),
    ("f = lambda x: x + 2  #011", False, TESTS),
    ("f = lambda x: 3 * x - 2  #110", False, TESTS),
    ("unknown  #000", False, TESTS),
)


def slow_verpo(model: nn.Module, batch: Sequence[Completion]) -> list[float]:
    values = []
    for start in range(0, len(batch), G):
        passed = [slow_tests(completion) for completion in batch[start : start + G]]
        n = len(passed)
        hardness = [1 - sum(row[j] for row in passed) / n for j in range(3)]
        weights = [h / math.fsum(hardness) if any(hardness) else 1 / 3 for h in hardness]
        for row in passed:
            values.append(0.5 * math.fsum(w for w, ok in zip(weights, row, strict=True) if ok) + 0.5 * all(row))
    return values


ROWS = {
    "accuracy": Row(by_row(right, empty=0.0)),
    "multiple_choice": Row(by_row(right, empty=0.0), batch=CHOICES),
    "exact_match": Row(by_row(slow_exact_match, empty=0.0), batch=WORDS),
    "regex_match": Row(by_row(right, empty=0.0), batch=HASHES),
    "keyword_chain": Row(by_row(slow_chain, empty=0.0), batch=CHAIN),
    "unit_tests(runner=rows_verifiable.run_python)": Row(by_row(right, empty=0.0), batch=CODE),
    "unit_tests(runner=rows_verifiable.run_python, partial=True)": Row(
        by_row(lambda model, completion: sum(slow_tests(completion)) / 3, empty=0.0), batch=CODE
    ),
    "verpo(runner=rows_verifiable.run_python)": Row(slow_verpo, batch=CODE, whole_groups=True),
    "tiers": Row(by_row(slow_tiers, empty=0.0), batch=CHAIN),
    "noisy": Row(slow_noisy, follows_rows=False),
    "noisy(false_positive=0.3, false_negative=0.2, correction=backward, seed=4)": Row(
        slow_corrected("backward", 0.3, 0.2), follows_rows=False
    ),
    "noisy(false_positive=0.3, false_negative=0.2, correction=forward, seed=4)": Row(
        slow_corrected("forward", 0.3, 0.2), follows_rows=False
    ),
    "overlong": Row(by_row(slow_overlong(20480, 4096), empty=0.0)),
    "overlong(max_length=6, cache=4)": Row(by_row(slow_overlong(6, 4), empty=0.0)),
    "l1_exact": Row(slow_l1_exact, batch=TARGETS),
    "l1_max": Row(by_row(slow_l1_max, empty=0.0), batch=TARGETS),
    "kimi_length": Row(by_row(slow_kimi, empty=-0.5), shape=kimi_shape),
    "cosine_length": Row(by_row(slow_cosine(1000), empty=-1.0)),
    "cosine_length(max_length=4)": Row(by_row(slow_cosine(4), empty=-1.0)),
    "repetition": Row(by_row(slow_repetition, empty=0.0)),
    "language_consistency": Row(by_row(slow_language, empty=1.0), batch=LANGUAGES),
    "format": Row(by_row(slow_format, empty=0.0)),
    "random": Row(slow_random, follows_rows=False),
    "contains": Row(
        by_row(lambda model, completion: float("python" in completion.text.lower()), empty=0.0),
        batch=texts(*[(t, False, {}) for t in ("Python", "pythons", "pyth on", "", "x", "PYTHON 3", "py", "thon")]),
    ),
    "incorrect_label": Row(by_row(right, empty=0.0), batch=WRONG),
    "incorrect_label(source=majority)": Row(slow_wrong_majority, batch=VOTES, whole_groups=True),
    "inverse": Row(by_row(lambda model, completion: 1.0 - completion.right, empty=1.0)),
    "both": Row(by_row(lambda model, completion: slow_format(model, completion) * completion.right, empty=0.0)),
}
