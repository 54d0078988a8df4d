"""Scorers: what the task files' filters and metrics call.

A filter takes the samples of all problems at once, so that programs run side by side, and makes of each sample a
mapping: ``text``; ``answers`` and ``correct``, by extraction ("strict", "flexible"); for IFEval ``parts``, the single
instructions; for tasks with an answer that can be voted on, ``votes``: which of the problem's answers are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from vigor.evaluation import answers, code_tasks, runner

Row = dict[str, Any]
Sample = dict[str, Any]
Samples = Sequence[Sequence[str]]
"""The texts of each problem."""
Documents = Sequence[dict[str, str]]

PARALLEL = 256
"""Attempts that are handed to the sandbox together: what the progress bar counts by."""


def math(resps: Samples, docs: Documents) -> list[list[Sample]]:
    """math-verify on the strict and on the flexible answer; equal answers vote together."""
    from vigor.rewards.agreement import cluster, equality

    same = equality("math")
    scored = []
    for texts, doc in zip(_progress(resps, "math-verify"), docs, strict=True):
        group = []
        for text in texts:
            found = {"strict": answers.strict_math(text), "flexible": answers.flexible_math(text)}
            correct = {key: answer is not None and math_equal(answer, doc["gold"]) for key, answer in found.items()}
            group.append({"text": text, "answers": found, "correct": correct})
        for key in ("strict", "flexible"):
            votes = cluster([sample["answers"][key] for sample in group], same) if len(group) > 1 else [None]
            for sample, vote in zip(group, votes, strict=True):
                sample.setdefault("votes", {})[key] = vote
        scored.append(group)
    return scored


def math_equal(answer: str, gold: str) -> bool:
    """Whether math-verify takes an answer for the reference; False where it runs out of time or cannot read either."""
    return _verifier().verify([f"\\boxed{{{answer}}}"], [gold])[0] == 1.0


def lab(resps: Samples, docs: Documents) -> list[list[Sample]]:
    """The lab's own rule: the last boxed answer, character by character."""
    from vigor.lab.tasks import extract_answer
    from vigor.rewards.agreement import cluster

    scored = []
    for texts, doc in zip(resps, docs, strict=True):
        found = [extract_answer(text) for text in texts]
        scored.append(
            [
                {
                    "text": text,
                    "answers": {"strict": answer},
                    "correct": {"strict": answer == doc["gold"].strip()},
                    "votes": {"strict": vote},
                }
                for text, answer, vote in zip(texts, found, cluster(found), strict=True)
            ]
        )
    return scored


def mmlu_pro(resps: Samples, docs: Documents) -> list[list[Sample]]:
    """Strict: lm-evaluation-harness's own pattern, "answer is (X)". Flexible: also boxed, announced, or alone."""
    from lm_eval.filters.extraction import RegexFilter

    from vigor.rewards.multiple_choice import choice

    pattern = RegexFilter(regex_pattern=r"answer is \(?([ABCDEFGHIJ])\)?")
    scored = []
    for texts, doc, strict in zip(resps, docs, pattern.apply(resps, docs), strict=True):
        letters = "ABCDEFGHIJ"[: len(_row(doc)["options"])]
        group = []
        for text, letter in zip(texts, strict, strict=True):
            found = {"strict": None if letter == pattern.fallback else letter}
            found["flexible"] = found["strict"] or choice(text, letters)
            correct = {key: answer == doc["gold"] for key, answer in found.items()}
            group.append({"text": text, "answers": found, "correct": correct, "votes": found})
        scored.append(group)
    return scored


def ifeval(resps: Samples, docs: Documents) -> list[list[Sample]]:
    """lm-evaluation-harness's own checks, strict and loose.

    Their random choices are fixed: langdetect's, and the letter that is counted where a problem asks for a character
    that is none, such as "#" (ifeval/1122 and ifeval/1129).
    """
    import random

    import langdetect
    from lm_eval.tasks.ifeval.utils import process_results

    langdetect.DetectorFactory.seed = 0
    state = random.getstate()
    scored = []
    for texts, doc in zip(_progress(resps, "instructions"), docs, strict=True):
        row, group = _row(doc), []
        for text in texts:
            random.seed(0)
            found = process_results(row, [text])
            correct = {"strict": found["prompt_level_strict_acc"], "flexible": found["prompt_level_loose_acc"]}
            parts = {"strict": found["inst_level_strict_acc"], "flexible": found["inst_level_loose_acc"]}
            group.append({"text": text, "answers": {}, "correct": correct, "parts": parts})
        scored.append(group)
    random.setstate(state)
    return scored


def humaneval(resps: Samples, docs: Documents) -> list[list[Sample]]:
    """The task's tests, in the sandbox."""
    return _run(resps, docs, {"strict": answers.humaneval_completion}, code_tasks.humaneval)


def mbpp(resps: Samples, docs: Documents) -> list[list[Sample]]:
    """The problem's assertions, in the sandbox."""
    return _run(resps, docs, {"strict": lambda row, text: answers.program(text)}, code_tasks.mbpp)


def livecodebench(resps: Samples, docs: Documents) -> list[list[Sample]]:
    """All tests that the rows hold, public and private, in the sandbox."""

    def programs(row: Row, code: str) -> list[Any]:
        tests = [*row["public_test_cases"], *row.get("private_test_cases", ())]
        return code_tasks.livecodebench({**row, "public_test_cases": tests}, code)

    return _run(resps, docs, {"strict": lambda row, text: answers.program(text)}, programs)


def cruxeval(resps: Samples, docs: Documents) -> list[list[Sample]]:
    """Whether the predicted expression has the right value, evaluated in the sandbox without the function."""
    extractions = {"strict": answers.strict_value, "flexible": answers.flexible_value}
    return _run(resps, docs, extractions, code_tasks.cruxeval)


def results(doc: dict[str, str], filtered: Sequence[Sequence[Sample]]) -> dict[str, list[Any]]:
    """The metrics of a problem: a list over its samples for each extraction."""
    samples = filtered[0]
    found = {key: [bool(sample["correct"][key]) for sample in samples] for key in samples[0]["correct"]}
    for key in samples[0].get("parts", ()):
        found[f"instructions_{key}"] = [part for sample in samples for part in sample["parts"][key]]
    return found


def pooled_mean(values: Iterable[Sequence[bool]]) -> float:
    """Mean over all samples of all problems."""
    flat = [value for group in values for value in group]
    return sum(flat) / len(flat)


def _run(
    resps: Samples,
    docs: Documents,
    extractions: Mapping[str, Callable[[Row, str], str | None]],
    programs: Callable[[Row, str], list[Any]],
) -> list[list[Sample]]:
    """Extract, then run each different code of a problem once."""
    rows = [_row(doc) for doc in docs]
    scored: list[list[Sample]] = [
        [{"text": text, "answers": {key: take(row, text) for key, take in extractions.items()}} for text in texts]
        for texts, row in zip(resps, rows, strict=True)
    ]
    codes = [
        (at, code)
        for at, group in enumerate(scored)
        for code in dict.fromkeys(answer for sample in group for answer in sample["answers"].values())
        if code is not None and code.strip()
    ]
    verdicts: dict[tuple[int, str], bool] = {}
    for start in _progress(range(0, len(codes), PARALLEL), "sandbox"):
        part = codes[start : start + PARALLEL]
        passed = code_tasks.solved(runner.current(), [programs(rows[at], code) for at, code in part])
        verdicts.update(zip(part, passed, strict=True))
    for at, group in enumerate(scored):
        for sample in group:
            sample["correct"] = {key: verdicts.get((at, code), False) for key, code in sample["answers"].items()}
    return scored


def _row(doc: dict[str, str]) -> Row:
    row: Row = json.loads(doc["row"])
    return row


@cache
def _verifier() -> Any:
    """One child process and one memory of verdicts for a run."""
    from vigor.rewards.math_equal import MathVerifier

    return MathVerifier()


def _progress(items: Any, what: str) -> Any:
    import sys

    from tqdm.auto import tqdm

    return tqdm(items, desc=what, disable=not sys.stderr.isatty(), leave=False)
