"""`vigor methods`: the list of rewards, and the page of one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from vigor import rewards
from vigor.rewards import METHODS, Method
from vigor.terminal import printable, refuse

COLUMNS = ("name", "family", "needs", "cost", "paper", "reward")
FAMILIES = ("intrinsic", "agreement", "reference", "verifiable", "control")
_INDEX = """\
# Methods

Each method is a reward by name: `--reward_funcs NAME`, with options in the name, such as `"vigor(ties=index)"`. The
name alone is the paper's setting. `vigor methods` lists them all with what they need and what they cost; `vigor methods
NAME` prints the formula and the departures from the paper and its code; `vigor methods --needs prompts` lists those
without labels. Any of them mix: [Mixing rewards](../cli.md#mixing-rewards).

Where no paper proposes a reward, its page says that the definition is the library's own. Several such signals are
shaped by rank, as VIGOR's is, so that a comparison with VIGOR is one of signals.

There are {n} methods. *Needs* is what the data set must bring; *cost* is what the method adds to a step beyond
generation and update: nothing, forward or backward passes over the completions, or extra sampling.
"""
_NOTES = {
    "intrinsic": "They need prompts and nothing else, and share one pass over the policy.",
    "agreement": "They need no labels, but answers that can be compared.",
    "reference": "They need a reference answer of any length, and nobody to check it.",
    "verifiable": "Rules, and wrappers round a rule. The terms for length and repetition go beside another reward.",
    "control": "They belong into every comparison: what a control gains, no reward may claim as its own.",
}
_ABSENT = """
## Not here, and why

**P2S** ([2601.20649](https://arxiv.org/abs/2601.20649)) pays each step of the reasoning by the likelihood of the rest
of a gold chain, which the policy writes itself, having seen the answer. Its abstract and parts of summaries were
read; no code was found. Not established: which rest of the chain belongs to which step of a completion, by what rule
chains are dropped, and how the steps' values become advantages. A rule of our own would bear the paper's name for
another method. It would also take a value for each step, where a reward here is a number for each completion, and
samples from a prompt that holds the answer. The likelihood itself is at hand:
`vigor.continuation.ContinuationScorer.logps(prefix, rest)`.

**RLFR** ([2510.10201](https://arxiv.org/abs/2510.10201)) has a formula (Jinghaoleven/RLFR@1589879): a flow network
predicts hidden states of three layers, and its error, above 0.6 after min-max scaling within the response and in at
most 15 tokens, is taken from those tokens' rewards. It does not fit this room: a network of its own is trained beside
the policy, with its optimizer, checkpoints and first training on good texts; the penalty goes to tokens, and summed
into one number a completion it would be another method; and it is added to a reward from labels, by which the
network's training texts are chosen.

**NOVER**'s efficiency reward and **RLVRR**'s style checks are left out of [`nover`](nover.md) and
[`keyword_chain`](keyword_chain.md), whose pages say why.
"""
_HEAD = "| name | reward | needs | cost | paper |\n|---|---|---|---|---|\n"
_TITLES = {
    "intrinsic": "Intrinsic: what the policy says of its own completions",
    "agreement": "Agreement: what the completions of one prompt say of each other",
    "reference": "Reference likelihood: what the policy says of a reference answer after its own reasoning",
    "verifiable": "Verifiable: what a rule says of a completion",
    "control": "Controls: what must not help, or only by its form",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vigor methods`."""
    parser.add_argument("name", nargs="?", help="show one reward's page")
    parser.add_argument("--family", choices=FAMILIES, help="only this family")
    parser.add_argument(
        "--needs", nargs="+", metavar="WHAT", help=f"only what these suffice for: {', '.join(needed(METHODS.values()))}"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.add_argument("--markdown", action="store_true", help="print docs/methods/index.md")


def methods(args: argparse.Namespace) -> int:
    """Runs `vigor methods`; returns the exit status (0 done, 2 refused with a message)."""
    if args.name is not None:
        return _show(args.name)
    if unknown := set(args.needs or ()) - set(needed(METHODS.values())):
        return refuse(
            "methods --needs",
            f"no reward needs {', '.join(sorted(unknown))}; choose from {', '.join(needed(METHODS.values()))}.",
        )
    chosen = select(METHODS.values(), family=args.family, available=args.needs)
    if args.json:
        print(json.dumps([asdict(method) for method in chosen], indent=2, ensure_ascii=False))
    elif args.markdown:
        print(index(chosen), end="")
    else:
        table([COLUMNS, *(_cells(method) for method in chosen)])
    return 0


def select(
    listed: Iterable[Method], *, family: str | None = None, available: Sequence[str] | None = None
) -> list[Method]:
    """The methods of a family that need no more than what is available; None leaves all in.

    Args:
        listed: the registry.
        family: one of `FAMILIES`.
        available: names such as "answers"; prompts are always there.
    """
    at_hand = {"prompts", *(available or ())}
    return [
        method
        for method in listed
        if (family is None or method.family == family) and (available is None or set(parts(method.needs)) <= at_hand)
    ]


def parts(written: str) -> list[str]:
    """["prompts", "answers"] from "prompts + answers"."""
    return written.split(" + ")


def needed(listed: Iterable[Method]) -> list[str]:
    """Everything that some method needs, prompts first."""
    return list(dict.fromkeys(["prompts", *(part for method in listed for part in parts(method.needs))]))


def index(listed: Sequence[Method]) -> str:
    """docs/methods/index.md: a table for each family."""
    text = [_INDEX.format(n=len(listed))]
    for family in FAMILIES:
        if rows := [method for method in listed if method.family == family]:
            text.append(f"\n## {_TITLES[family]}\n\n{_NOTES[family]}\n\n{_HEAD}")
            for m in rows:
                reward = m.summary.replace("|", "\\|")
                text.append(f"| [`{m.name}`]({m.name}.md) | {reward} | {m.needs} | {m.cost} | {_link(m.paper)} |\n")
    return "".join([*text, *([_ABSENT] if len(listed) == len(METHODS) else [])])


def page_path(name: str) -> Path:
    """The file of a method's page: in the installed package, or in docs/methods of a checkout.

    Raises:
        FileNotFoundError: neither has it.
    """
    package = Path(rewards.__file__).parent
    for folder in (package / "pages", package.parents[2] / "docs" / "methods"):
        if (folder / f"{name}.md").is_file():
            return folder / f"{name}.md"
    raise FileNotFoundError(f"no page of {name!r} in {package / 'pages'} or docs/methods: the installation is broken.")


def table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of cells in columns."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show(name: str) -> int:
    if name not in METHODS:
        return refuse("methods", f"no reward {name!r}; the rewards are: {', '.join(METHODS)}")
    import ast
    from importlib.util import find_spec

    page = page_path(name).read_text("utf-8").rstrip()
    spec = find_spec(METHODS[name].module)
    assert spec is not None and spec.origin is not None
    notes = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or ""
    print(f"{page}\n\n## In the code\n\n{notes}")
    return 0


def _cells(method: Method) -> tuple[str, ...]:
    return method.name, method.family, method.needs, method.cost, method.paper, method.summary


def _link(paper: str) -> str:
    number = paper.removeprefix("arXiv ")
    return paper if number == paper else f"[{number}](https://arxiv.org/abs/{number})"
