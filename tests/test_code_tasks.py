from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from sandbox import ALTERED

from vigor.evaluation import code_tasks
from vigor.evaluation.sandbox import Limits, Program, Sandbox
from vigor.rewards import get
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

SAMPLE = 12

HUMANEVAL = {
    "prompt": 'def half(x):\n    """Half of x."""\n    return x / 2\n\n\ndef mean(a, b):\n    """The mean."""\n',
    "entry_point": "mean",
    "test": "def check(candidate):\n    assert candidate(1, 3) == 2\n    assert candidate(2, 2) == half(4)\n",
}
MBPP: dict[str, Any] = {
    "test_list": ["assert area(2) == math.pi * 4", "assert sum(area(x) for x in [0]) == 0"],
    "test_imports": [],
    "answer": "import math\ndef area(r):\n    return math.pi * r ** 2",
}
FUNCTIONAL = {
    "starter_code": "class Solution:\n    def flip(self, xs: List[int], n: int) -> List[int]:\n        ",
    "metadata": {"func_name": "flip"},
    "public_test_cases": [
        {"input": "[1, 2]\n1", "output": "[2, 1]", "testtype": "functional"},
        {"input": "[]\n3", "output": "[]", "testtype": "functional"},
    ],
}
STDIN = {
    "starter_code": "",
    "metadata": {},
    "public_test_cases": [
        {"input": "2 3\n", "output": "5", "testtype": "stdin"},
        {"input": "10 20", "output": "30\n", "testtype": "stdin"},
    ],
}
CRUXEVAL = {"code": "def f(x):\n    return x + [1]", "input": "[0]", "output": "[0, 1]"}

FLIP = "class Solution:\n    def flip(self, xs: List[int], n: int):\n        return tuple(reversed(xs))"
ATTEMPTS = [
    (code_tasks.humaneval(HUMANEVAL, "    return half(a + b)\n"), True),
    (code_tasks.humaneval(HUMANEVAL, "    return a\n"), False),
    (code_tasks.humaneval(HUMANEVAL, "    return (a + b) / 2\ndef half(x):\n    return 0\n"), True),
    (code_tasks.mbpp(MBPP, MBPP["answer"]), True),
    (code_tasks.mbpp(MBPP, "def area(r):\n    return 3 * r * r"), False),
    (code_tasks.livecodebench(FUNCTIONAL, FLIP), True),
    (code_tasks.livecodebench(FUNCTIONAL, FLIP.replace("reversed", "sorted")), False),
    (code_tasks.livecodebench(STDIN, "print(sum(map(int, input().split())))"), True),
    (code_tasks.livecodebench(STDIN, "print(5)"), False),
    (code_tasks.cruxeval(CRUXEVAL, "[0] + [1]"), True),
    (code_tasks.cruxeval(CRUXEVAL, "[0]"), False),
    (code_tasks.cruxeval(CRUXEVAL, "f( [0])"), False),
    ([], False),
]


@pytest.fixture(scope="module")
def sandbox(bubblewrap: None) -> Iterator[Sandbox]:
    with Sandbox(Limits(timeout_s=60.0), jobs=2) as shared:
        yield shared


def test_right_attempts_are_solved_and_wrong_ones_are_not(sandbox: Sandbox) -> None:
    assert code_tasks.solved(sandbox, [programs for programs, _ in ATTEMPTS]) == [right for _, right in ATTEMPTS]


def test_assertions_find_the_functions_they_call() -> None:
    program = code_tasks.assertions("", ["assert f([x for x in g(1)]) == sys.maxsize"], ["import re"])
    assert program.entry == ("f", "g") and program.setup == "import re\nimport sys"
    named = code_tasks.assertions("", ["assert sum(1, 2) == 3"], reference="def sum(a, b):\n    return a + b")
    assert named.entry == ("sum",)
    with pytest.raises(ValueError, match="call no function"):
        code_tasks.assertions("", ["assert len([1]) == 1"])


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    file = folder / f"{name}.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    return random.Random(0).sample([json.loads(line) for line in file.read_text().splitlines()], SAMPLE)


def test_humaneval_references_pass_and_wrong_ones_fail(sandbox: Sandbox, data_dir: Path) -> None:
    found = rows(data_dir, "humaneval")
    right = [code_tasks.humaneval(row, row["answer"]) for row in found]
    wrong = [code_tasks.humaneval(row, ALTERED.format(code=row["answer"], name=row["entry_point"])) for row in found]
    assert code_tasks.solved(sandbox, right + wrong) == [True] * SAMPLE + [False] * SAMPLE


def test_mbpp_references_pass_and_wrong_ones_fail(sandbox: Sandbox, data_dir: Path) -> None:
    found = rows(data_dir, "mbpp_sanitized")
    right = [code_tasks.mbpp(row, row["answer"]) for row in found]
    wrong = [
        code_tasks.mbpp(row, ALTERED.format(code=row["answer"], name=programs[0].entry[0]))
        for row, programs in zip(found, right, strict=True)
    ]
    assert code_tasks.solved(sandbox, right + wrong) == [True] * SAMPLE + [False] * SAMPLE


def test_cruxeval_references_pass_and_wrong_ones_fail(sandbox: Sandbox, data_dir: Path) -> None:
    found = rows(data_dir, "cruxeval")
    right = [code_tasks.cruxeval(row, row["answer"]) for row in found]
    wrong = [code_tasks.cruxeval(row, f"({row['answer']}, 0)") for row in found]
    assert code_tasks.solved(sandbox, right + wrong) == [True] * SAMPLE + [False] * SAMPLE


def test_livecodebench_answers_pass_and_wrong_ones_fail(sandbox: Sandbox, data_dir: Path) -> None:
    found = rows(data_dir, "livecodebench_public")
    right = [code_tasks.livecodebench(row, table_of_answers(row)) for row in found]
    wrong = [code_tasks.livecodebench(row, table_of_answers(row, off=True)) for row in found]
    assert code_tasks.solved(sandbox, right + wrong) == [True] * SAMPLE + [False] * SAMPLE


def table_of_answers(problem: dict[str, Any], off: bool = False) -> str:
    """A program that looks its answers up; the data set has no reference solutions. ``off``: each answer altered."""
    tests = problem["public_test_cases"]
    if tests[0]["testtype"] == "stdin":
        table = {test["input"].strip(): test["output"] + ("x" if off else "") for test in tests}
        return f"import sys\nprint({table!r}[sys.stdin.read().strip()])"
    table = {
        repr([json.loads(line) for line in test["input"].split("\n")]): json.loads(test["output"]) for test in tests
    }
    answer = f"{table!r}[repr(list(args))]"
    return (
        f"class Solution:\n    def {problem['metadata']['func_name']}(self, *args):\n"
        f"        return {f'[{answer}]' if off else answer}\n"
    )


def test_the_runner_of_the_rewards(sandbox: Sandbox) -> None:
    double = "def double(x):\n    return 2 * x"
    tests = ["assert double(1) == 2", "assert double(2) == 5"]
    cells = [tests, json.dumps(tests), [{"input": "3", "output": "6"}, {"input": "1", "output": "2"}]]
    codes = [double, "def double(x):\n    return 5", "print(6)"]
    assert code_tasks.run_tests(codes, cells) == [[True, False], [False, True], [True, False]]
    for cell in ([1], [], [{"input": "1"}], "{}"):
        with pytest.raises(ValueError, match="give a list of assertions"):
            code_tasks.run_tests([""], [cell])
    code_tasks.default_runner(os.getpid()).close()
    code_tasks.default_runner.cache_clear()


def test_the_rewards_run_in_the_sandbox(sandbox: Sandbox) -> None:
    texts = ["```python\ndef f(x):\n    return x\n```", "def f(x):\n    return 1", "import sys\nsys.exit(0)"]
    columns = {"tests": [["assert f(1) == 1", "assert f(2) == 2"]] * 3}
    batch = Rollouts.from_token_ids(
        [[2]] * 3, [[3]] * 3, group_size=3, pad_token_id=0, completions=texts, columns=columns
    )
    wanted = {"unit_tests": [1, 0, 0], "unit_tests(partial=True)": [1, 0.5, 0], "verpo": [1, 1 / 6, 0]}
    for spec, expected in wanted.items():
        assert get(spec).score(batch, PolicyPass(nn.Identity(), batch)).tolist() == pytest.approx(expected)
    code_tasks.default_runner(os.getpid()).close()
    code_tasks.default_runner.cache_clear()


def test_programs_carry_no_test_into_the_candidate() -> None:
    (program,) = code_tasks.humaneval(HUMANEVAL, "    return 0\n")
    assert isinstance(program, Program) and "assert" not in program.code
    (program,) = code_tasks.cruxeval(CRUXEVAL, "1")
    assert "def f" not in program.code
