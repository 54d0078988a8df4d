"""The command: `vigor train | compare | report | …`. Each subcommand imports what it needs, when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vigor import __version__
from vigor.commands import compare, methods, probe, replay, report, score

_EPILOG = """\
vigor train --config lab                     train the built-in model, show before and after
vigor train --prompts my.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B
vigor train --config lab --dry_run           print the plan, touch nothing
vigor train --help                           every setting
vigor compare --config lab --jobs 2          does it help? methods, seeds, intervals
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
    methods.add_arguments(commands.add_parser("methods", help="list the rewards"))
    commands.add_parser("recipes", help="list the shipped recipes")
    compare.add_arguments(commands.add_parser("compare", help="methods × seeds × worlds", allow_abbrev=False))
    report.add_arguments(commands.add_parser("report", help="one page for one or several runs"))
    replay.add_arguments(commands.add_parser("replay", help="compute a step again that was NaN or infinite"))
    probe.add_arguments(commands.add_parser("probe", help="what a reward would do on your prompts, before training"))
    score.add_arguments(commands.add_parser("score", help="score completions: best of N, filtering, confidence"))
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
    if args.command == "methods":
        return methods.methods(args)
    if args.command == "report":
        return report.report(args)
    if args.command == "replay":
        return replay.replay(args)
    if args.command == "probe":
        return probe.probe(args)
    if args.command == "score":
        return score.score(args)
    return _recipes()


def _recipes() -> int:
    from vigor import recipes

    methods.table([("recipe", "what it is"), *((name, recipes.summary(name)) for name in recipes.names())])
    return 0
