"""The sandbox on whole data sets: right solutions must pass, wrong ones fail, and how many programs run per second.

    VIGOR_DATA_DIR=... python benchmarks/sandbox.py            # about two minutes on two cores
    python benchmarks/sandbox.py --data_dir DIR --jobs 2 --out docs/results/sandbox

Right: the reference solutions of HumanEval, MBPP (sanitized) and CRUXEval. LiveCodeBench's rows have no reference
solutions; there a program looks each public test's answer up, which checks the way from the data set to the verdict.
Wrong, of each problem: every answer of the right program altered; None for every answer; an exit with status 0 before
the tests; an exit with status 0 in the function.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vigor.evaluation import code_tasks
from vigor.evaluation.sandbox import Limits, Outcome, Program, Sandbox

Problem = dict[str, Any]
Attempt = list[Program]
LIMITS = Limits(timeout_s=30.0)

ALTERED = """
{code}
def altered_answer(value, made=type({{}})):
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float, complex)): return 2 * value + 1
    if isinstance(value, (str, list, tuple)): return value + type(value)("x")
    if isinstance(value, dict): return {{**value, "x": 0}}
    return 0 if not value else None
right_answer_of_{name} = {name}
def {name}(*args): return altered_answer(right_answer_of_{name}(*args))
"""
EXIT_IN_FUNCTION = "import sys\ndef {name}(*args):\n    sys.exit(0)\n"
NONE = "def {name}(*args):\n    return None\n"
EXIT = "import os\nos._exit(0)\n"


def humaneval(problem: Problem) -> Iterator[Attempt]:
    """The right attempt, then the wrong ones."""
    name = problem["entry_point"]
    yield code_tasks.humaneval(problem, problem["answer"])
    for code in (ALTERED.format(code=problem["answer"], name=name), *(text.format(name=name) for text in (NONE, EXIT))):
        yield code_tasks.humaneval(problem, "    pass\n" * (code[0] != "\n") + code)
    yield code_tasks.humaneval(problem, "    pass\n" + EXIT_IN_FUNCTION.format(name=name))


def mbpp(problem: Problem) -> Iterator[Attempt]:
    right = code_tasks.mbpp(problem, problem["answer"])
    name = right[0].entry[0]
    yield right
    yield code_tasks.mbpp(problem, ALTERED.format(code=problem["answer"], name=name))
    for text in (NONE, EXIT, EXIT_IN_FUNCTION):
        yield code_tasks.mbpp(problem, text.format(name=name))


def cruxeval(problem: Problem) -> Iterator[Attempt]:
    for text in (problem["answer"], f"({problem['answer']}, 0)", "...", "__import__('os')._exit(0)", "exit()"):
        yield code_tasks.cruxeval(problem, text)


def livecodebench(problem: Problem) -> Iterator[Attempt]:
    tests = problem["public_test_cases"]
    if tests[0]["testtype"] == "stdin":
        head, look = "import sys\n", "{table!r}[sys.stdin.read().strip()]"
        table = {test["input"].strip(): test["output"] for test in tests}
        bodies = [f"print({look.format(table=table)})", f"print({look.format(table=table)} + 'x')", "print(None)"]
        bodies += ["import os; os._exit(0)", "sys.exit(0)"]
        for body in bodies:
            yield code_tasks.livecodebench(problem, head + body)
        return
    answers = {
        repr([json.loads(line) for line in test["input"].split("\n")]): json.loads(test["output"]) for test in tests
    }
    method = f"class Solution:\n    def {problem['metadata']['func_name']}(self, *args):\n        "
    for body in (f"return {answers!r}[repr(list(args))]", f"return [{answers!r}[repr(list(args))]]", "return None"):
        yield code_tasks.livecodebench(problem, method + body)
    yield code_tasks.livecodebench(problem, EXIT)
    yield code_tasks.livecodebench(problem, method + "import sys; sys.exit(0)")


DATA: dict[str, Callable[[Problem], Iterator[Attempt]]] = {
    "humaneval": humaneval,
    "mbpp_sanitized": mbpp,
    "cruxeval": cruxeval,
    "livecodebench_public": livecodebench,
}


@dataclass(frozen=True)
class Timed:
    outcomes: list[Outcome]
    per_second: float
    """Wall clock, with the sandboxes started before."""

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """What `solved` asks for: the outcomes that are already here."""
        assert len(programs) == len(self.outcomes)
        return self.outcomes


def timed(programs: Sequence[Program], jobs: int | None) -> Timed:
    with Sandbox(LIMITS, jobs=jobs) as sandbox:
        sandbox.run([programs[0]] * sandbox.jobs * 2)
        started = time.monotonic()
        outcomes = sandbox.run(programs)
        seconds = time.monotonic() - started
    return Timed(outcomes, len(programs) / seconds)


def measure(folder: Path, name: str, jobs: int | None) -> tuple[str, list[str]]:
    """One line of the table, and the problems that came out otherwise than they should."""
    problems = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    attempts = [list(DATA[name](problem)) for problem in problems]
    right, wrong = [found[0] for found in attempts], [attempt for found in attempts for attempt in found[1:]]
    times = [timed([program for attempt in group for program in attempt], jobs) for group in (right, wrong)]
    passed, let_through = code_tasks.solved(times[0], right), code_tasks.solved(times[1], wrong)
    odd = [
        f"{problem['id']}: the right one failed" for problem, found in zip(problems, passed, strict=True) if not found
    ]
    each = len(wrong) // len(problems)
    odd += [f"{problems[i // each]['id']}: wrong one {i % each} passed" for i, found in enumerate(let_through) if found]
    cells = [name, len(problems), f"{sum(passed)} of {len(right)}", f"{sum(let_through)} of {len(wrong)}"]
    cells += [f"{value:.0f}" for value in (times[0].per_second, times[1].per_second)]
    return f"| {' | '.join(map(str, cells))} |", odd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=os.environ.get("VIGOR_DATA_DIR"))
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="write OUT.md beside printing it")
    arguments = parser.parse_args()
    if arguments.data_dir is None:
        parser.error("--data_dir or VIGOR_DATA_DIR: the folder with humaneval.jsonl and the others")
    lines: list[str] = []
    odd: list[str] = []
    lines += ["| one trivial program 400 times | per second |", "|---|---:|"]
    trivial = {
        "script, output compared": Program("print(1)", expected="1"),
        "function, tests in a second sandbox": Program(
            "def f(x):\n    return x", entry=("f",), tests=("assert f(1) == 1",)
        ),
    }
    for name, program in trivial.items():
        found = timed([program] * 400, arguments.jobs)
        assert all(outcome.passed for outcome in found.outcomes)
        lines.append(f"| {name} | {found.per_second:.0f} |")
    lines += [
        "",
        "| data set | problems | right pass | wrong pass | right/s | wrong/s |",
    ]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name in DATA:
        line, unexpected = measure(arguments.data_dir, name, arguments.jobs)
        lines.append(line)
        odd += unexpected
    jobs = arguments.jobs or len(os.sched_getaffinity(0))
    where = f"{os.cpu_count()} × {processor()}, Python {platform.python_version()}, {jobs} jobs"
    load = os.getloadavg()[0]
    lines += ["", f"{datetime.date.today().isoformat()}, {where}, load average at the end {load:.1f}.", *odd]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(text)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
