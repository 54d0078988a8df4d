r"""Another wording of a lab question, with the same answer: what the paraphrased view of Co-rewarding needs.

A rewrite is an identity of arithmetic or of programs, in a form that the lab's bases have seen:

    45+303                        303+45, 48+300, …                 swap the terms, move a part of one to the other
    412-67                        422-77, …                         move both terms by the same number
    solve 3x+5=20                 solve 3x+2=17, solve 3x-4=11, …    add the same number on both sides
    4+3-2 mod 10                  4-2+3 mod 10, 4-7-2 mod 10, …     reorder the terms, write +t as -(10-t)
    a=5⏎b=a*2⏎print(b)            d=5⏎a=d*2⏎print(a), …             rename the variables
    s='dehaca'⏎print(s[1:4])      s='behacf'⏎print(s[1:4]), …       change characters that are not printed

A rewrite stays in the split of its question, so a paraphrased train set holds no test question.

Command: python -m vigor.lab.paraphrase --task lab:math --questions 2048 --out pairs.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .tasks import SPLITS, TASKS, make_example, split_of

_TRIES = 200

Rewrite = Callable[["re.Match[str]", random.Random], str]


def paraphrase(prompt: str, *, seed: int = 0) -> str | None:
    r"""Another prompt ("Q:...\nA:") with the same answer and in the same split; the same one for the same seed.

    None where no other wording was found in that split: some short programs and chains have few.

    Raises:
        ValueError: the prompt is no question of the lab.
    """
    if not (prompt.startswith("Q:") and prompt.endswith("\nA:")):
        raise ValueError(f"no prompt of the lab: {prompt!r}. Its prompts look like 'Q:45+303\\nA:'.")
    question = prompt[len("Q:") : -len("\nA:")]
    match, rewrite = _kind(question)
    rng = random.Random(f"paraphrase/{seed}/{question}")
    for _ in range(_TRIES):
        other = rewrite(match, rng)
        if other != question and split_of(other) == split_of(question):
            return f"Q:{other}\nA:"
    return None


def make_pairs(task: str, split: str, n: int, *, start: int = 0, seed: int = 0) -> list[dict[str, str | int]]:
    """`n` questions in two wordings each: 2n rows {"prompt", "answer", "pair"}, the two of a pair side by side.

    Questions are taken from index `start` on; those that have no other wording are passed over. `pair` is the
    question's index.

    Raises:
        ValueError: an unknown task or split, or a negative `start`.
    """
    rows: list[dict[str, str | int]] = []
    index = start
    while len(rows) < 2 * n:
        example = make_example(task, split, index, seed)
        if (other := paraphrase(example.prompt, seed=seed)) is not None:
            rows += [{"prompt": prompt, "answer": example.answer, "pair": index} for prompt in (example.prompt, other)]
        index += 1
    return rows


def _kind(question: str) -> tuple[re.Match[str], Rewrite]:
    for pattern, rewrite in _KINDS:
        if match := pattern.fullmatch(question):
            return match, rewrite
    raise ValueError(f"no question of the lab: {question!r}. The tasks are {', '.join(TASKS)}.")


def _sum(match: re.Match[str], rng: random.Random) -> str:
    """Both terms keep their number of digits."""
    a, b = int(match[1]), int(match[2])
    moved = rng.randrange(-9, 10)
    first, second = a + moved, b - moved
    if not (_as_long(first, a) and _as_long(second, b)):
        first, second = a, b
    return f"{second}+{first}" if rng.random() < 0.5 else f"{first}+{second}"


def _difference(match: re.Match[str], rng: random.Random) -> str:
    a, b = int(match[1]), int(match[2])
    moved = rng.randrange(-20, 21)
    return f"{a + moved}-{b + moved}" if _as_long(a + moved, a) and _as_long(b + moved, b) else f"{a}-{b}"


def _as_long(number: int, other: int) -> bool:
    return number > 0 and len(str(number)) == len(str(other))


def _equation(match: re.Match[str], rng: random.Random) -> str:
    """k x ± b = c with another constant of b's size, on whichever side keeps the right-hand side positive."""
    k, c = int(match[1]), int(match[4])
    b = int(match[2] + match[3])
    size = range(1, 10) if abs(b) < 10 else range(10, 31)
    other = rng.choice("+-") + str(rng.choice(size))
    right = c - b + int(other)
    return f"solve {k}x{other}={right}" if right > 0 else match[0]


def _chain(match: re.Match[str], rng: random.Random) -> str:
    """The value modulo 10 is that of the sum, whose terms may trade places; the first one is never negative."""
    terms = [int(term) for term in re.findall(r"[+-]?\d", match[1])]
    rng.shuffle(terms)
    flipped = [term - 10 * (1 if term > 0 else -1) if rng.random() < 0.3 else term for term in terms]
    first = flipped[0] if flipped[0] > 0 else flipped[0] + 10
    return f"{first}" + "".join(f"{term:+d}" for term in flipped[1:]) + " mod 10"


def _program(match: re.Match[str], rng: random.Random) -> str:
    """Renames its variables among a to e, different ones to different ones; the counter i keeps its name."""
    text = match[0]
    names = sorted(set(re.findall(r"\b[a-e]\b", text)))
    renamed = dict(zip(names, rng.sample("abcde", len(names)), strict=True))
    return re.sub(r"\b[a-e]\b", lambda found: renamed[found[0]], text)


def _slice(match: re.Match[str], rng: random.Random) -> str:
    """Another string of the same length with the same characters where the slice reads."""
    text, first, last = match[1], int(match[2]), int(match[3])
    other = [c if first <= i < last else rng.choice("abcdefgh") for i, c in enumerate(text)]
    return f"s='{''.join(other)}'\nprint(s[{first}:{last}])"


_KINDS: list[tuple[re.Pattern[str], Rewrite]] = [
    (re.compile(r"(\d+)\+(\d+)"), _sum),
    (re.compile(r"(\d+)-(\d+)"), _difference),
    (re.compile(r"solve (\d)x([+-])(\d+)=(\d+)"), _equation),
    (re.compile(r"(\d(?:[+-]\d)+) mod 10"), _chain),
    (re.compile(r"s='([a-h]+)'\nprint\(s\[(\d+):(\d+)\]\)"), _slice),
    (re.compile(r"[a-e]=\d\n(?:[a-e]=.*\n|for i in range\(\d\):.*\n)+print\([a-e]\)"), _program),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes paired prompts to a jsonl file that `vigor train --prompts` reads."""
    parser = argparse.ArgumentParser(prog="python -m vigor.lab.paraphrase", description=main.__doc__)
    parser.add_argument("--task", choices=TASKS, default="lab:math")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--questions", type=int, default=2048, help="each gives two prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    rows = make_pairs(args.task, args.split, args.questions, seed=args.seed)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.out}: {len(rows)} prompts, {args.questions} questions of {args.task} in two wordings each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
