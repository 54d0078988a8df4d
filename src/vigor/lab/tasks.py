"""The questions of the lab: endless, seeded, with a worked solution each. No torch here.

Three tasks. ``lab:math`` is trained on: column addition and subtraction, one-variable equations, chains modulo 10.
``lab:math-hard`` asks the same with more digits, larger constants and more terms, and ``lab:code`` asks for the
output of a short program; both are only ever evaluated. A question's own text decides whether it belongs to
"train" or "test", so the two can never share one, whatever seed or index made it.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

TASKS = ("lab:math", "lab:math-hard", "lab:code")
SPLITS = ("train", "test")

Slip = Callable[[str], str]
"""Maps the result of one step to what gets written down; the identity gives the correct solution."""

_TEST_SHARE_OF_256 = 64
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True)
class LabExample:
    """One question: ``solution`` is a correct completion of ``prompt`` and ends with ``\\boxed{answer}``."""

    prompt: str
    answer: str
    solution: str


@dataclass(frozen=True)
class Problem:
    """A question before it is worded: ``work(slip)`` gives the written steps and the answer that they lead to.

    ``shortcut`` is what a lazy reader would answer: read off the question without any work, nearly always wrong.
    """

    question: str
    shortcut: str
    work: Callable[[Slip], tuple[list[str], str]]

    @property
    def prompt(self) -> str:
        return f"Q:{self.question}\nA:"


def make_example(task: str, split: str, index: int, seed: int = 0) -> LabExample:
    """The ``index``-th question of ``task`` in ``split``: the same on every machine, in constant time.

    Questions may repeat at different indices (the space of the smaller kinds is a few thousand), never across splits.
    Raises ValueError for an unknown task or split or a negative index.
    """
    problem = make_problem(task, split, index, seed)
    steps, answer = problem.work(_no_slip)
    return LabExample(problem.prompt, answer, write_solution(steps, answer))


def make_rows(task: str, split: str, n: int, *, start: int = 0, seed: int = 0) -> list[dict[str, str]]:
    """``n`` data set rows ``{"prompt", "answer"}`` from index ``start`` on."""
    examples = (make_example(task, split, index, seed) for index in range(start, start + n))
    return [{"prompt": example.prompt, "answer": example.answer} for example in examples]


def make_problem(task: str, split: str, index: int, seed: int = 0) -> Problem:
    """As `make_example`, before wording; the corpus writes its flawed texts from this."""
    if task not in _KINDS:
        raise ValueError(f"unknown lab task {task!r}: choose one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {task}: choose one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index {index} of {task} is negative: indices run from 0 upward without end")
    rng = random.Random(f"{task}/{split}/{seed}/{index}")
    while True:
        problem = rng.choice(_KINDS[task])(rng)
        if split_of(problem.question) == split:
            return problem


def split_of(question: str) -> str:
    """The split of a question: test for the quarter whose SHA-256 starts with a byte below 64, else train."""
    return "test" if hashlib.sha256(question.encode()).digest()[0] < _TEST_SHARE_OF_256 else "train"


def write_solution(steps: list[str], answer: str) -> str:
    """The clean wording: the steps, then the boxed answer."""
    return "; ".join(steps) + f" so \\boxed{{{answer}}}"


def extract_answer(text: str) -> str | None:
    """Content of the last complete ``\\boxed{...}`` of ``text``, stripped; None where there is none."""
    found = _BOXED.findall(text)
    return found[-1].strip() if found else None


def is_correct(text: str, answer: str) -> bool:
    """Whether the last boxed answer of ``text`` is ``answer``, character by character."""
    return extract_answer(text) == answer.strip()


def _no_slip(result: str) -> str:
    return result


def _columns(a: int, b: int, sign: int) -> Problem:
    """a + b or a - b (a >= b), column by column from the right with carries or borrows."""
    operator, word = ("+", " carry") if sign > 0 else ("-", " borrow")

    def work(slip: Slip) -> tuple[list[str], str]:
        steps, written, carry = [], "", 0
        width = max(len(str(a)), len(str(b)))
        for x, y in zip(reversed(f"{a:0{width}d}"), reversed(f"{b:0{width}d}"), strict=True):
            total = int(x) + sign * (int(y) + carry)
            digit = slip(str(total % 10))
            shown = f"{x}{operator}{y}" + (f"{operator}1" if carry else "")
            carry = int(not 0 <= total <= 9)
            steps.append(f"{shown}={digit}" + (word if carry else ""))
            written = digit + written
        written = "1" + written if carry else written
        return steps, written.lstrip("0") or "0"

    return Problem(f"{a}{operator}{b}", str(a), work)


def _sum(rng: random.Random, widths: tuple[int, ...]) -> Problem:
    a, b = (_number(rng, rng.choice(widths)) for _ in range(2))
    return _columns(a, b, +1)


def _difference(rng: random.Random, widths: tuple[int, ...]) -> Problem:
    a, b = sorted((_number(rng, rng.choice(widths)) for _ in range(2)), reverse=True)
    return _columns(a, b, -1)


def _number(rng: random.Random, width: int) -> int:
    return rng.randrange(10 ** (width - 1), 10**width)


def _equation(rng: random.Random, constants: range) -> Problem:
    """k x + b = c or k x - b = c with a positive right-hand side."""
    k, x, b = rng.randrange(2, 10), rng.randrange(1, 13), rng.choice(constants)
    sign = -1 if rng.random() < 0.5 and k * x > b else +1
    c = k * x + sign * b
    operator, inverse = ("+", "-") if sign > 0 else ("-", "+")

    def work(slip: Slip) -> tuple[list[str], str]:
        product = slip(str(c - sign * b))
        solution = slip(str(int(product) // k))
        return [f"{k}x={c}{inverse}{b}={product}", f"x={product}/{k}={solution}"], solution

    return Problem(f"solve {k}x{operator}{b}={c}", str(c), work)


def _chain(rng: random.Random, lengths: tuple[int, ...]) -> Problem:
    """A chain of single-digit additions and subtractions modulo 10."""
    terms = [rng.randrange(1, 10) for _ in range(rng.choice(lengths))]
    operators = [rng.choice("+-") for _ in terms[1:]]

    def work(slip: Slip) -> tuple[list[str], str]:
        steps, value = [], str(terms[0])
        for operator, term in zip(operators, terms[1:], strict=True):
            result = slip(str((int(value) + (term if operator == "+" else -term)) % 10))
            steps.append(f"{value}{operator}{term}={result}")
            value = result
        return steps, value

    chain = str(terms[0]) + "".join(f"{op}{term}" for op, term in zip(operators, terms[1:], strict=True))
    return Problem(f"{chain} mod 10", str(terms[0]), work)


def _assignments(rng: random.Random) -> Problem:
    """Two or three assignments, each from the variable before it."""
    names = rng.sample("abcde", 3)
    start = value = rng.randrange(1, 10)
    lines, plan = [f"{names[0]}={start}"], []
    for i in range(rng.choice((1, 2))):
        operator = rng.choice("+-*")
        operand = rng.randrange(2, 4) if operator == "*" else rng.randrange(1, 10)
        if operator == "-" and operand > value:
            operator = "+"
        value = _apply(value, operator, operand)
        plan.append((names[i + 1], operator, operand))
        lines.append(f"{names[i + 1]}={names[i]}{operator}{operand}")
    lines.append(f"print({plan[-1][0]})")

    def work(slip: Slip) -> tuple[list[str], str]:
        steps, shown = [f"{names[0]}={start}"], str(start)
        for name, operator, operand in plan:
            result = slip(str(max(_apply(int(shown), operator, operand), 0)))
            steps.append(f"{name}={shown}{operator}{operand}={result}")
            shown = result
        return steps, shown

    return Problem("\n".join(lines), str(start), work)


def _apply(value: int, operator: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator]


def _loop(rng: random.Random) -> Problem:
    """A counting loop that adds a constant, or the counter itself."""
    name, turns, start = rng.choice("abcde"), rng.randrange(2, 5), rng.randrange(1, 10)
    constant = rng.randrange(2, 10)
    adds_counter = rng.random() < 0.4

    def work(slip: Slip) -> tuple[list[str], str]:
        steps, shown = [f"{name}={start}"], str(start)
        for i in range(turns):
            added = i if adds_counter else constant
            result = slip(str(int(shown) + added))
            steps.append(f"{shown}+{added}={result}")
            shown = result
        return steps, shown

    body = f"{name}+=" + ("i" if adds_counter else str(constant))
    return Problem(f"{name}={start}\nfor i in range({turns}):{body}\nprint({name})", str(start), work)


def _slice(rng: random.Random) -> Problem:
    """A slice of a short string, found by numbering its characters."""
    text = "".join(rng.choice("abcdefgh") for _ in range(rng.randrange(4, 7)))
    first = rng.randrange(0, len(text) - 1)
    last = rng.randrange(first + 1, len(text) + (first > 0))

    def work(slip: Slip) -> tuple[list[str], str]:
        read = [slip(character) for character in text]
        return [f"{i}{character}" for i, character in enumerate(read)], "".join(read[first:last])

    return Problem(f"s='{text}'\nprint(s[{first}:{last}])", text, work)


_KINDS: dict[str, list[Callable[[random.Random], Problem]]] = {
    "lab:math": [
        lambda rng: _sum(rng, (2, 3)),
        lambda rng: _difference(rng, (2, 3)),
        lambda rng: _equation(rng, range(1, 10)),
        lambda rng: _chain(rng, (3, 4)),
    ],
    "lab:math-hard": [
        lambda rng: _columns(_number(rng, 4), _number(rng, 4), +1),
        lambda rng: _difference(rng, (4,)),
        lambda rng: _equation(rng, range(10, 31)),
        lambda rng: _chain(rng, (5, 6)),
    ],
    "lab:code": [_assignments, _loop, _slice],
}
