"""The pre-training texts of the lab: correct solutions, and the many ways in which a base model fails to write one.

A `Noise` says how often each kind of text occurs. In the world "lab" most mistakes come with hasty wording, so a
model trained on it is sure where it is right; in "lab-misaligned" a third of the texts answer by a terse and fixed
shortcut that is wrong, and the correct texts are wordy, so it is surest where it is wrong.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields

from .tasks import Problem, Slip, make_problem, write_solution

TASK_SHARES = {"lab:math": 0.58, "lab:math-hard": 0.10, "lab:code": 0.32}
HASTY = (" easy", " quick", " maybe", " probably")
CALM = ("", "", " first ", " ok ")
FILLERS = (" well", " now", " then", " next", " and", " hm", " let me see", " ok", " we get")


@dataclass(frozen=True)
class Shares:
    """Shares of the kinds of text, which add up to 1.

    Raises ValueError where they do not.
    """

    good: float = 0.0
    """Calm, correct, boxed, ends."""
    slip: float = 0.0
    """As good, with one wrong result, carried through to the answer."""
    sloppy: float = 0.0
    """A hasty opener, then every step is wrong with probability `Noise.step_error`."""
    guess: float = 0.0
    """A boxed answer without work, right with probability `Noise.guess_accuracy`."""
    unboxed: float = 0.0
    """Correct work, answer not boxed."""
    ramble: float = 0.0
    """Fillers, or one step over and over; no answer."""
    run_on: float = 0.0
    """A good text that does not stop: it asks and answers another question."""
    shortcut: float = 0.0
    """`Problem.shortcut` boxed at once: terse, fixed, nearly always wrong."""

    def __post_init__(self) -> None:
        total = sum(getattr(self, field.name) for field in fields(self))
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            raise ValueError(f"the shares of the kinds of text add up to {total:.6f}: make them add up to 1")


@dataclass(frozen=True)
class Noise:
    """How the texts of one world are written."""

    shares: Shares
    step_error: float = 0.4
    """Probability that a step of a sloppy text is wrong."""
    guess_accuracy: float = 0.2
    fillers: float = 0.0
    """Mean number of filler words after each step of a calm text: wordiness, hence uncertainty without error."""


CLEAN = Noise(Shares(good=1.0))
WORLDS = {
    "lab": Noise(
        Shares(good=0.42, slip=0.03, sloppy=0.27, guess=0.08, unboxed=0.08, ramble=0.04, run_on=0.08),
    ),
    "lab-misaligned": Noise(
        Shares(good=0.46, slip=0.03, sloppy=0.05, guess=0.02, unboxed=0.04, ramble=0.02, run_on=0.04, shortcut=0.34),
        fillers=1.0,
    ),
}


@dataclass(frozen=True)
class Text:
    """One pre-training text: ``completion`` of one ``kind`` of `Shares` to ``prompt``; ``answer`` is the true one."""

    task: str
    kind: str
    prompt: str
    completion: str
    answer: str


def texts(noise: Noise, seed: int, start: int = 0) -> Iterator[Text]:
    """Endless texts on training questions; text i depends on (noise, seed, i) only."""
    kinds = [field.name for field in fields(Shares)]
    weights = [getattr(noise.shares, kind) for kind in kinds]
    for index in itertools.count(start):
        rng = random.Random(f"text/{seed}/{index}")
        task, other = rng.choices(tuple(TASK_SHARES), tuple(TASK_SHARES.values()), k=2)
        problem = make_problem(task, "train", index, seed)
        # What a run-on text goes on to ask: from another seed, so that it is not the question itself.
        following = make_problem(other, "train", index, seed + 1)
        kind = rng.choices(kinds, weights)[0]
        answer = problem.work(lambda result: result)[1]
        yield Text(task, kind, problem.prompt, write(kind, problem, following, noise, rng), answer)


def write(kind: str, problem: Problem, following: Problem, noise: Noise, rng: random.Random) -> str:
    """A completion of ``problem.prompt`` of one kind of `Shares`."""
    steps, answer = problem.work(lambda result: result)
    if kind == "good":
        return _calm(steps, answer, noise, rng)
    if kind == "slip":
        return _calm(*problem.work(_one_slip(rng, rng.randrange(len(steps)))), noise, rng)
    if kind == "sloppy":
        return rng.choice(HASTY) + " " + write_solution(*problem.work(_often_slip(rng, noise.step_error)))
    if kind == "guess":
        guessed = answer if rng.random() < noise.guess_accuracy else _wrong(answer, rng)
        return rng.choice(("", *HASTY)) + f" \\boxed{{{guessed}}}"
    if kind == "unboxed":
        return _fill("; ".join(steps) + f" so {answer}", noise, rng)
    if kind == "ramble":
        return _ramble(steps, rng)
    if kind == "run_on":
        solution = write_solution(*following.work(lambda result: result))
        return _calm(steps, answer, noise, rng) + f"\n{following.prompt}{solution}"
    if kind == "shortcut":
        return f" \\boxed{{{problem.shortcut}}}"
    raise ValueError(f"unknown kind of text {kind!r}: choose one of {', '.join(f.name for f in fields(Shares))}")


def _calm(steps: list[str], answer: str, noise: Noise, rng: random.Random) -> str:
    return rng.choice(CALM) + _fill(write_solution(steps, answer), noise, rng)


def _fill(solution: str, noise: Noise, rng: random.Random) -> str:
    """Filler words after each step: a geometric number of mean ``noise.fillers``."""
    if noise.fillers == 0:
        return solution
    go_on = noise.fillers / (1 + noise.fillers)
    steps, boxed = solution.split(" so ")
    filled = []
    for step in steps.split("; "):
        filled.append(step)
        while rng.random() < go_on:
            filled[-1] += rng.choice(FILLERS)
    return f"{'; '.join(filled)} so {boxed}"


def _wrong(result: str, rng: random.Random) -> str:
    """``result`` with one of its characters replaced by another of its kind; never a leading zero."""
    place = rng.randrange(len(result))
    alphabet = "123456789" if result[place].isdigit() else "abcdefgh"
    other = rng.choice([character for character in alphabet if character != result[place]])
    return result[:place] + other + result[place + 1 :]


def _one_slip(rng: random.Random, at: int) -> Slip:
    calls = itertools.count()
    return lambda result: _wrong(result, rng) if next(calls) == at else result


def _often_slip(rng: random.Random, probability: float) -> Slip:
    return lambda result: _wrong(result, rng) if rng.random() < probability else result


def _ramble(steps: list[str], rng: random.Random) -> str:
    if rng.random() < 0.5:
        return "; ".join([rng.choice(steps)] * rng.randrange(3, 9))
    return "".join(rng.choice(FILLERS) for _ in range(rng.randrange(8, 40)))
