"""The lab's questions: right, repeatable, and never shared between train and test."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys

import pytest

from vigor.lab.tasks import TASKS, extract_answer, is_correct, make_example, make_rows, split_of
from vigor.lab.tokenizer import build_tokenizer


def _true_answer(prompt: str) -> str:
    """An answer found without the generator's help: Python does the arithmetic and runs the programs."""
    question = prompt.removeprefix("Q:").removesuffix("\nA:")
    if "print(" in question:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(question, {})
        return printed.getvalue().strip()
    if equation := re.fullmatch(r"solve (\d+)x([+-]\d+)=(\d+)", question):
        k, b, c = (int(part) for part in equation.groups())
        return next(str(x) for x in range(100) if k * x + b == c)
    if question.endswith(" mod 10"):
        return str(eval(question.removesuffix(" mod 10")) % 10)
    return str(eval(question))


@pytest.mark.parametrize("task", TASKS)
def test_answers_and_solutions_are_right(task):
    for index in range(1500):
        example = make_example(task, "train", index)
        assert example.answer == _true_answer(example.prompt), example
        assert example.solution.endswith(f"\\boxed{{{example.answer}}}")
        assert is_correct(example.solution, example.answer)


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_never_share_a_question(task):
    train = {row["prompt"] for seed in range(3) for row in make_rows(task, "train", 4000, seed=seed)}
    test = {row["prompt"] for seed in range(3) for row in make_rows(task, "test", 4000, seed=seed)}
    assert len(train) > 1500
    assert len(test) > 500
    assert not train & test
    assert all(split_of(prompt[2:-3]) == "train" for prompt in train)


def test_hard_questions_are_not_among_the_ones_trained_on():
    math = {row["prompt"] for split in ("train", "test") for row in make_rows("lab:math", split, 5000)}
    hard = {row["prompt"] for split in ("train", "test") for row in make_rows("lab:math-hard", split, 5000)}
    assert not math & hard


def test_questions_depend_on_task_split_seed_and_index_alone():
    # Golden: another Python or platform must ask the same questions, or measured tables stop being comparable.
    assert make_rows("lab:math", "test", 3) == [
        {"prompt": "Q:solve 7x+1=36\nA:", "answer": "5"},
        {"prompt": "Q:8-1+5 mod 10\nA:", "answer": "2"},
        {"prompt": "Q:6+2+6 mod 10\nA:", "answer": "4"},
    ]
    assert make_rows("lab:code", "test", 1) == [{"prompt": "Q:s='dehaca'\nprint(s[1:4])\nA:", "answer": "eha"}]
    assert make_rows("lab:code", "train", 5, start=7, seed=3) == make_rows("lab:code", "train", 12, seed=3)[7:]
    assert make_rows("lab:math", "train", 20, seed=0) != make_rows("lab:math", "train", 20, seed=1)


@pytest.mark.parametrize("task", TASKS)
def test_solutions_fit_the_completion_budget(task):
    tokenizer = build_tokenizer()
    solutions = [make_example(task, "test", index).solution for index in range(2000)]
    assert max(len(encoding.ids) for encoding in tokenizer.encode_batch(solutions)) + 1 <= 72


def test_far_indices_are_as_cheap_as_near_ones():
    assert make_example("lab:math", "train", 10**15).prompt.startswith("Q:")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" so \\boxed{42}", "42"),
        ("\\boxed{1} wait \\boxed{2}", "2"),
        ("\\boxed{ ab }", "ab"),
        ("\\boxed{\\boxed{5}", "5"),
        ("\\boxed{3} and \\boxed{4", "3"),
        ("\\boxed{}", ""),
        ("so 42", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_a_number_is_compared_as_written():
    assert is_correct("so \\boxed{42}", " 42 ")
    assert not is_correct("so \\boxed{042}", "42")
    assert not is_correct("so 42", "42")


def test_unknown_names_are_refused_with_the_choice():
    with pytest.raises(ValueError, match="lab:math-hard"):
        make_example("lab:maths", "train", 0)
    with pytest.raises(ValueError, match="train, test"):
        make_example("lab:math", "dev", 0)
    with pytest.raises(ValueError, match="-1"):
        make_example("lab:math", "train", -1)


def test_tasks_need_no_torch_and_the_lab_no_trainer():
    code = "import sys, vigor.lab.tasks; assert 'torch' not in sys.modules\n"
    code += "import vigor.lab.build, vigor.lab.world; assert 'vigor.trainer' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
