"""What the sandbox takes and gives: a program, the limits it runs under, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Literal

Status = Literal["passed", "failed", "error", "timeout", "memory", "output_limit", "processes", "files", "left_running"]


class SandboxUnavailable(RuntimeError):
    """The sandbox cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Program:
    """Generated code, and how it is judged.

    Without ``tests`` the code is a script: it reads ``stdin`` and passes if it ends with exit status 0 and, where
    ``expected`` is given, its output `matches`. With ``tests`` it is a module whose functions, named in ``entry``, the
    tests call from another process; the code never sees them.

    Raises ValueError for tests without entry, tests beside expected output, and file names that leave the folder.
    """

    code: str
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """File name, relative to the working directory, to text; written before the code runs."""
    expected: str | None = None
    matches: Callable[[str, str], bool] | None = None
    """``matches(output, expected)``; None: `same_lines`."""
    entry: tuple[str, ...] = ()
    """Names that the tests call: a function, or ``Class.method``, which the tests call as ``method``."""
    setup: str = ""
    """Source that runs before the tests, in their process: imports and helpers from the data set."""
    tests: tuple[str, ...] = ()
    """Sources, run in order in one namespace; one passes if it runs to its end."""

    def __post_init__(self) -> None:
        if self.tests and not self.entry:
            raise ValueError("a program with tests needs entry: the names of the functions that the tests call")
        if self.tests and self.expected is not None:
            raise ValueError("a program is judged by its tests or by its expected output, not by both")
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts:
                raise ValueError(f"file name {name!r}: give a path below the program's folder")


@dataclass(frozen=True)
class Limits:
    """What one program may use. Raises ValueError for a limit too small to start Python in."""

    timeout_s: float = 10.0
    """Wall-clock seconds; CPU seconds over all its processes: twice that."""
    memory_bytes: int = 2**30
    """Address space of a process, and resident memory of all its processes together."""
    output_bytes: int = 2**20
    """Standard output and standard error, each."""
    tasks: int = 64
    """Processes and threads."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s={self.timeout_s}: a program needs a positive number of seconds, such as 10.0")
        if self.memory_bytes < 64 * 2**20:
            raise ValueError(f"memory_bytes={self.memory_bytes}: Python needs at least {64 * 2**20} (64 MiB)")
        if self.output_bytes < 1 or self.tasks < 8:
            raise ValueError(f"output_bytes={self.output_bytes}, tasks={self.tasks}: at least 1 and 8")


@dataclass(frozen=True)
class Outcome:
    """What came out of a program."""

    status: Status
    """``passed``; ``failed``: wrong answers; ``error``: an exception, a signal, an exit status other than 0; a limit:
    ``timeout``, ``memory``, ``output_limit``, ``processes``, ``files``; ``left_running``: its processes outlived it."""
    stdout: str
    stderr: str
    seconds: float
    passed_tests: tuple[bool, ...] = ()
    """One a test; a test that did not get its turn has not passed."""
    detail: str = ""
    """Of the first test that did not pass, or of the exit: one line."""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def script_status(code: int, stderr: str) -> tuple[Status, str]:
    """Status and detail from an exit status; negative stands for a signal."""
    last_line = stderr.rstrip().rpartition("\n")[2]
    if code == 0:
        return "passed", ""
    if last_line.startswith("MemoryError"):
        return "memory", last_line
    return "error", last_line or (f"signal {-code}" if code < 0 else f"exit status {code}")


def judge_output(program: Program, status: Status, stdout: str) -> Status:
    """The status of a script after its output has been compared with the expected one."""
    if status != "passed" or program.expected is None:
        return status
    return "passed" if (program.matches or same_lines)(stdout, program.expected) else "failed"


def same_lines(output: str, expected: str) -> bool:
    """Equal line by line, apart from white space at the ends of lines and of the text; numbers by value.

    As LiveCodeBench compares (LiveCodeBench/LiveCodeBench `lcb_runner/evaluation/testing_util.py`).
    """
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (output, expected))
    return len(ours) == len(theirs) and all(
        mine == right or _same_numbers(mine.split(), right.split()) for mine, right in zip(ours, theirs, strict=True)
    )


def _same_numbers(ours: list[str], theirs: list[str]) -> bool:
    try:
        return bool(ours) and list(map(Decimal, ours)) == list(map(Decimal, theirs))
    except InvalidOperation:
        return False
