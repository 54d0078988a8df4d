"""The command: `vigor train | methods | recipes`. Each subcommand imports what it needs, when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vigor import __version__

_EPILOG = """\
vigor train --config lab                     train the built-in model, show before and after
vigor train --prompts my.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B
vigor train --config lab --dry_run           print the plan, touch nothing
vigor train --help                           every setting
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status (0 done, 1 refused with a message, 2 wrong usage)."""
    parser = argparse.ArgumentParser(
        prog="vigor",
        description="Post-train language models with reinforcement learning, without labels, verifiers or judges.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vigor {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("train", help="train a model on prompts", add_help=False)
    methods = commands.add_parser("methods", help="list the rewards")
    methods.add_argument("name", nargs="?", help="show one reward's page")
    commands.add_parser("recipes", help="list the shipped recipes")
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    if args.command == "train":
        from vigor.commands.train import train

        return train(rest)
    if rest:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    if args.command == "methods":
        return _methods(args.name)
    return _recipes()


def _methods(name: str | None) -> int:
    from importlib.util import find_spec
    from pathlib import Path

    from vigor.rewards import METHODS

    if name is None:
        columns = [("name", "family", "needs", "cost", "paper", "reward")]
        columns += [(m.name, m.family, m.needs, m.cost, m.paper, m.summary) for m in METHODS.values()]
        _table(columns)
        return 0
    if name not in METHODS:
        print(f"vigor: no reward {name!r}; the rewards are: {', '.join(METHODS)}", file=sys.stderr)
        return 1
    import ast

    spec = find_spec(METHODS[name].module)
    assert spec is not None and spec.origin is not None
    print(ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))))
    return 0


def _recipes() -> int:
    from vigor import recipes

    _table([("recipe", "what it is"), *((name, recipes.summary(name)) for name in recipes.names())])
    return 0


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
