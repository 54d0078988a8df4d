"""What is taken for the answer in a completion, and what the measures make of the verdicts."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from vigor.evaluation import answers, compare_results, scoring
from vigor.evaluation.metrics import bootstrap, majority_right, measures

MATH = [
    # text, strict, flexible
    (r"so \boxed{7} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}", r"\frac{1}{2}"),
    ("3 * 4 = 12\n#### 12", "12", "12"),
    (r"#### 12 but \boxed{13}", "13", "13"),
    ("That makes 1,200 eggs in 3 weeks.", None, "3"),
    ("The answer is 1,200 eggs.\nI hope that 2 checks help.", None, "1200"),
    (r"The answer is $\frac{3}{4}$.", None, r"\frac{3}{4}"),
    (r"Answer: \(x^2\)", None, "x^2"),
    (r"The answer is $\$32,\!348$.", None, r"\$32,\!348"),
    ("the ratio is 3/4", None, "3/4"),
    ("it falls to -5.5 degrees", None, "-5.5"),
    ("between $2$ and $3$ lie 17 of them", None, "17"),
    ("no idea", None, None),
    (r"\boxed{}", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), MATH)
def test_answers_of_mathematics(text: str, strict: str | None, flexible: str | None) -> None:
    assert answers.strict_math(text) == strict
    assert answers.flexible_math(text) == flexible


def test_code_is_the_last_block_also_an_open_one() -> None:
    assert answers.program("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```\nc") == "y = 2\n"
    assert answers.program("a\n```python\nx = 1\ny = 2") == "x = 1\ny = 2"
    assert answers.program("x = 1") == "x = 1"


def test_a_humaneval_completion_is_a_function_or_a_body() -> None:
    row = {"entry_point": "f"}
    assert answers.humaneval_completion(row, "```python\ndef f(x):\n    return x\n```") == "\ndef f(x):\n    return x\n"
    assert answers.humaneval_completion(row, "    return x\n\nThis returns x.\n    no") == "    return x\n"
    assert answers.humaneval_completion(row, "    return x\n") == "    return x\n"


VALUES = [
    ("assert f([1], 'a') == 'b'", "'b'", "'b'"),
    ("first f([1], 'a') == 2, no:\nassert f([1], 'a') == 'x == y'\nDone.", "'x == y'", "'x == y'"),
    ("`assert f([1], 'a') == {1: 2}`.", "{1: 2}", "{1: 2}"),
    ("[ANSWER]\nassert f([1], 'a') == (1,)[/ANSWER]", "(1,)", "(1,)"),
    ("[ANSWER]'b'[/ANSWER]", None, "'b'"),
    (r"It is \boxed{[3]}", None, "[3]"),
    ("Thus:\n```python\n'b'\n```", None, "'b'"),
    ("It returns\n[1, 2]", None, "[1, 2]"),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), VALUES)
def test_predicted_values(text: str, strict: str | None, flexible: str | None) -> None:
    row = {"input": "[1], 'a'"}
    assert answers.strict_value(row, text) == strict
    assert answers.flexible_value(row, text) == flexible


def test_equal_answers_vote_together() -> None:
    texts = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{3}", "nothing"]
    (group,) = scoring.math([texts], [{"gold": r"\frac12"}])
    assert [sample["votes"]["strict"] for sample in group] == [0, 0, 1, None]
    assert [sample["correct"]["strict"] for sample in group] == [True, True, False, False]


def test_one_sample_gives_an_accuracy_with_wilsons_interval() -> None:
    found = measures([[True]] * 8 + [[False]] * 2)
    assert list(found) == ["accuracy"]
    accuracy = found["accuracy"]
    # Newcombe 1998's formula by hand, z = 1.959964, 8 of 10.
    assert (accuracy.value, accuracy.low, accuracy.high) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    rng = random.Random(0)
    correct = [[rng.random() < 0.3 for _ in range(6)] for _ in range(9)]
    found = measures(correct)
    assert set(found) == {"avg@6", "pass@2", "pass@4", "pass@6"}
    for j in (2, 4, 6):
        slow = [sum(map(any, itertools.combinations(group, j))) / math.comb(6, j) for group in correct]
        assert found[f"pass@{j}"].value == pytest.approx(sum(slow) / 9)
    assert found["avg@6"].value == pytest.approx(sum(map(sum, correct)) / 54)


def test_the_majority_is_the_most_frequent_answer_and_the_first_of_equals() -> None:
    assert majority_right([False, True, True], ["a", "b", "b"])
    assert majority_right([True, False], ["a", "b"])
    assert not majority_right([False, True], ["a", "b"])
    assert majority_right([False, True], [None, "b"])
    assert not majority_right([False, False], [None, None])
    votes = [["a", "b", "b"], ["a", "a", "b"]]
    assert measures([[False, True, True]] * 2, votes)["majority@3"].value == 0.5


def test_instructions_are_pooled() -> None:
    found = measures([[True], [False]], parts=[[True], [True, False, False]])["instructions"]
    assert found.value == 0.5
    assert found.low <= 0.5 <= found.high and found.interval == "bootstrap over problems"


def test_samples_must_be_equally_many() -> None:
    with pytest.raises(ValueError, match="same number of samples"):
        measures([[True], [True, False]])
    with pytest.raises(ValueError, match="same number of samples"):
        measures([])


def test_the_bootstrap_covers_like_the_normal_interval() -> None:
    rng = random.Random(1)
    values = [rng.gauss(0.3, 1.0) for _ in range(400)]
    drawn = bootstrap([(value, 1.0) for value in values], 4000)
    mean = sum(values) / 400
    error = math.sqrt(sum((value - mean) ** 2 for value in values)) / 400
    assert drawn[100] == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert drawn[3899] == pytest.approx(mean + 1.96 * error, abs=0.2 * error)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 0), (1, 7), (5, 5), (9, 2)])
def test_mcnemar_counts_all_outcomes_that_are_as_unlikely(gained: int, lost: int) -> None:
    n = gained + lost
    slow = sum(abs(sum(coin) - n / 2) >= abs(gained - n / 2) for coin in itertools.product((0, 1), repeat=n)) / 2**n
    assert compare_results.mcnemar(gained, lost) == pytest.approx(slow)


def test_a_difference_of_sampled_tasks() -> None:
    pairs: list[Any] = [([False, False], [True, True])] * 10 + [([True, True], [True, True])] * 10
    found = compare_results.difference("t", "strict", pairs)
    assert (found.first, found.second, found.test) == (0.5, 1.0, "paired bootstrap")
    assert 0.2 < found.low < 0.5 < found.high < 0.8 and found.p < 0.001
    same = compare_results.difference("t", "strict", [([True, False], [False, True])] * 5)
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)
