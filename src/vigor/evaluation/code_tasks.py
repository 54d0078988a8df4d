"""Programs from the problems of HumanEval, MBPP, LiveCodeBench and CRUXEval, and the runner of test-based rewards.

A problem is one row of the data set as SOURCES.md lists it; a completion is code, without prose or fences
(`vigor.rewards.unit_tests.code_of` takes it out of a text). A problem is solved if all its programs pass.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vigor.evaluation.sandbox import Limits, Outcome, Program, Sandbox

Problem = Mapping[str, Any]

_LIVECODEBENCH_PRELUDE = """\
from typing import *
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics
import itertools, functools, operator, io, sys, json
sys.setrecursionlimit(50000)
"""


def humaneval(problem: Problem, completion: str) -> list[Program]:
    """``completion`` continues ``problem["prompt"]``; ``check`` of ``problem["test"]`` calls the function.

    The prompt itself, where every function is complete with its docstring, gives the tests their helpers.
    """
    name = problem["entry_point"]
    test = f"{problem['test']}\ncheck({name})\n"
    return [Program(problem["prompt"] + completion, entry=(name,), setup=problem["prompt"], tests=(test,))]


def mbpp(problem: Problem, completion: str) -> list[Program]:
    """``completion`` is the whole program; the tests are the assertions of ``problem["test_list"]``."""
    return [assertions(completion, problem["test_list"], problem["test_imports"], problem["answer"])]


def livecodebench(problem: Problem, completion: str) -> list[Program]:
    """One program a public test that reads standard input; one in all for tests that call ``Solution``'s method.

    The usual modules are imported before the completion, as the benchmark's own harness does.
    """
    code = _LIVECODEBENCH_PRELUDE + completion
    programs = []
    calls = []
    for test in problem["public_test_cases"]:
        if test["testtype"] == "stdin":
            programs.append(Program(code, stdin=test["input"], expected=test["output"]))
        else:
            arguments = [json.loads(line) for line in test["input"].split("\n")]
            calls.append((arguments, json.loads(test["output"])))
    if calls:
        name = problem["metadata"]["func_name"]
        entry = f"Solution.{name}" if "class Solution" in problem["starter_code"] else name
        tests = tuple(f"assert as_list({name}(*{arguments!r})) == {expected!r}" for arguments, expected in calls)
        # The benchmark compares JSON, which has no tuples.
        setup = "def as_list(value):\n    return list(value) if isinstance(value, tuple) else value\n"
        programs.append(Program(code, entry=(entry,), setup=setup, tests=tests))
    return programs


def cruxeval(problem: Problem, completion: str) -> list[Program]:
    """Output prediction: ``completion`` is the expression after ``==``. It is evaluated without the function's code."""
    code = f"def predicted():\n    return (\n{completion}\n)\n"
    return [Program(code, entry=("predicted",), tests=(f"assert predicted() == ({problem['output']})",))]


def assertions(code: str, tests: Sequence[str], imports: Sequence[str] = (), reference: str = "") -> Program:
    """A program judged by assertions that call its functions.

    The functions are those that ``reference`` defines and the tests name; without a reference, every name in the tests
    that is neither built in nor imported. A standard module that the tests name without importing it is imported.
    Raises ValueError where the tests call nothing.
    """
    used: set[str] = set()
    bound: set[str] = set()
    for node in (node for text in [*imports, *tests] for node in ast.walk(ast.parse(text.strip()))):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
    with warnings.catch_warnings():  # the data sets' own references hold invalid escapes such as \w
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        body = ast.parse(reference).body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    free = {name for name in used - bound if not hasattr(builtins, name)}
    modules = sorted(name for name in free - defined if name in sys.stdlib_module_names)
    entry = sorted(used & defined) or sorted(free.difference(modules))
    if not entry:
        raise ValueError(f"the tests call no function of the program: {tests[0] if tests else 'there are none'!r}")
    setup = "\n".join([*imports, *(f"import {name}" for name in modules)])
    return Program(code, entry=tuple(entry), setup=setup, tests=tuple(test.strip() for test in tests))


class Runner(Protocol):
    """`Sandbox` and `SandboxFusion`."""

    def run(self, programs: Sequence[Program]) -> list[Outcome]: ...


def solved(runner: Runner, attempts: Sequence[Sequence[Program]]) -> list[bool]:
    """Whether all programs of each attempt pass; an attempt without programs is not solved."""
    outcomes = iter(runner.run([program for programs in attempts for program in programs]))
    passed = [[next(outcomes).passed for _ in programs] for programs in attempts]
    return [bool(attempt) and all(attempt) for attempt in passed]


def run_tests(codes: Sequence[str], tests: Sequence[Any], runner: Runner | None = None) -> list[list[bool]]:
    """The runner of the rewards `unit_tests` and `verpo`: which of its tests each code passes.

    Each item of ``tests`` is a list, all of its items of one kind: assertions (strings) that call the code's functions,
    or mappings with ``input`` and ``output``: text for standard input and the text expected on standard output. The
    list may be given as JSON. ``runner``: None for this process's pool of bubblewrap sandboxes, where each code has ten
    seconds for all its assertions, or for each input.

    Raises SandboxUnavailable where no sandbox can run, ValueError for tests of another form.
    """
    planned = [_planned(code, cell) for code, cell in zip(codes, tests, strict=True)]
    runner = default_runner(os.getpid()) if runner is None else runner
    outcomes = iter(runner.run([program for programs in planned for program in programs]))
    verdicts = []
    for programs in planned:
        found = [next(outcomes) for _ in programs]
        verdicts.append(list(found[0].passed_tests) if programs[0].tests else [outcome.passed for outcome in found])
    return verdicts


def _planned(code: str, cell: Any) -> list[Program]:
    tests = json.loads(cell) if isinstance(cell, str) else list(cell)
    if tests and all(isinstance(test, str) for test in tests):
        return [assertions(code, tests)]
    if tests and all(isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in tests):
        return [Program(code, stdin=test["input"], expected=test["output"]) for test in tests]
    raise ValueError(
        f"tests {str(cell)[:200]!r}: give a list of assertions, or a list of objects with input and output, or its JSON"
    )


@functools.cache
def default_runner(owner: int) -> Sandbox:
    """One pool a process: a fork's copy of its parent's would answer to both. Its sandboxes end with the process."""
    return Sandbox(Limits())
