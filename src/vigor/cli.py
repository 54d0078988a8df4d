"""The command: `vigor train | compare | report | …`. Each subcommand imports what it needs, when it runs."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from vigor import __version__
from vigor.commands import compare, methods, plan, probe, replay, report, score
from vigor.commands import eval as evaluation
from vigor.disk import REFUSALS, STDOUT
from vigor.terminal import Parser

_EPILOG = """\
vigor train --config lab                     train the built-in model, show before and after
vigor train --prompts my.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B
vigor train --config lab --dry_run           print the plan, touch nothing
vigor train --help                           every setting
vigor compare --config lab --jobs 2          does it help? methods, seeds, intervals
vigor eval lab --suite lab                   benchmarks for a model
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status (0 done, 1 failed while it ran, 2 refused with a message).

    A reader that has seen enough, such as `head`, ends it with status 1 and without a word; a full disk below standard
    output, with status 1 and a message.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, where it can be caught, rather than as Python ends
    except OSError as error:
        if error.errno not in {errno.EPIPE, *REFUSALS} or not _output_fails():
            raise
        if error.errno != errno.EPIPE:
            print(f"vigor: {STDOUT} cannot be written: {error.strerror}.", file=sys.stderr)
        # What is still buffered goes nowhere when Python flushes it: "Note on SIGPIPE" in the documentation of signal.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _output_fails() -> bool:
    """Whether it is standard output that takes no more, and no file or pipe of the command's own."""
    try:
        sys.stdout.write("\n")  # if it does take more, a traceback follows
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _run(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="vigor",
        description="Post-train language models with reinforcement learning, without labels, verifiers or judges.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vigor {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("train", help="train a model on prompts", add_help=False)
    plan.add_arguments(commands.add_parser("plan", help="memory and time on given GPUs, and the cheapest set-up"))
    methods.add_arguments(commands.add_parser("methods", help="list the rewards"))
    commands.add_parser("recipes", help="list the shipped recipes")
    compare.add_arguments(commands.add_parser("compare", help="methods × seeds × worlds", allow_abbrev=False))
    report.add_arguments(commands.add_parser("report", help="one page for one or several runs"))
    replay.add_arguments(commands.add_parser("replay", help="compute a step again that was NaN or infinite"))
    probe.add_arguments(commands.add_parser("probe", help="what a reward would do on your prompts, before training"))
    score.add_arguments(commands.add_parser("score", help="score completions: best of N, filtering, confidence"))
    evaluation.add_arguments(commands.add_parser("eval", help="benchmarks: the paper's, mathematics, code, the lab"))
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    if args.command == "train":
        from vigor.commands.train import train

        return train(rest)
    if args.command == "compare":
        return compare.compare(args, rest)
    if rest:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    run = {
        "methods": methods.methods,
        "recipes": _recipes,
        "plan": plan.plan,
        "report": report.report,
        "replay": replay.replay,
        "probe": probe.probe,
        "score": score.score,
        "eval": evaluation.evaluate,
    }
    return run[args.command](args)


def _recipes(args: argparse.Namespace) -> int:
    from vigor import recipes

    methods.table([("recipe", "what it is"), *((name, recipes.summary(name)) for name in recipes.names())])
    print()
    named = ((name, recipes.summary(name, comparisons=True)) for name in recipes.comparisons())
    methods.table([("comparison", "what it is: vigor compare --config …"), *named])
    return 0
