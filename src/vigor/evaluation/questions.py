"""What the model reads, made from a row. The wording is ours, except where lm-evaluation-harness has the task."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def plain(row: Row) -> str:
    """The problem and nothing else; the answer's format is the system prompt's affair."""
    return str(row["problem"])


def humaneval(row: Row) -> str:
    return (
        "Complete this Python function. Give the whole function, with the imports that it needs, in one ```python "
        f"block.\n\n```python\n{row['prompt'].rstrip()}\n```"
    )


def mbpp(row: Row) -> str:
    """All assertions are shown: the text does not name the function."""
    tests = "\n".join(row["test_list"])
    return (
        f"{row['prompt'].strip()} The code must pass these tests:\n\n```python\n{tests}\n```\n\n"
        "Give the whole program, without the tests, in one ```python block."
    )


def livecodebench(row: Row) -> str:
    """With the starter code for problems that call a method, else for standard input and output."""
    if row["starter_code"].strip():
        form = (
            "Write the solution in Python 3. Keep the class and the method of this frame, and give the whole program "
            f"in one ```python block:\n\n```python\n{row['starter_code'].rstrip()}\n```"
        )
    else:
        form = (
            "Write a Python 3 program that reads standard input and prints the answer to standard output. Give the "
            "whole program in one ```python block."
        )
    return f"{row['prompt'].strip()}\n\n{form}"


def cruxeval(row: Row) -> str:
    """Output prediction, with room to reason."""
    call = f"f({row['input']})"
    return (
        "What does this Python function return?\n\n"
        f"```python\n{row['code']}\n\nassert {call} == ??\n```\n\n"
        "Think step by step. Then finish with the assertion, its ?? replaced by the value as a literal, on a line of "
        f"its own: assert {call} == ..."
    )


def mmlu_pro(row: Row) -> str:
    """As lm-evaluation-harness asks it, without its five examples."""
    from lm_eval.tasks.mmlu_pro.utils import format_cot_example

    introduction = (
        f"The following are multiple choice questions (with answers) about {row['subject']}. Think step by step and "
        'then finish your answer with "the answer is (X)" where X is the correct letter choice.\n'
    )
    return introduction + format_cot_example(
        {"question": row["prompt"], "options": row["options"]}, including_answer=False
    )


def ifeval(row: Row) -> str:
    return str(row["prompt"])
