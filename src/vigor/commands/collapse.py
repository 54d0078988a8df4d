"""`vigor probe --collapse_step`: the Model Collapse Step of a model on these prompts."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from vigor import recipes
from vigor.commands.methods import table
from vigor.reading import read_settings
from vigor.terminal import printable, refuse

N_PROMPTS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that only `--collapse_step` has."""
    group = parser.add_argument_group("Model Collapse Step (trains a copy of the model to its ruin, instead)")
    group.add_argument("--collapse_step", nargs="?", type=int, const=100, metavar="STEPS", help="train on the majority "
                       "vote until it is wrong everywhere, for at most so many steps of --n_prompts fresh prompts and "
                       "one update each (default: 100)")  # fmt: skip
    group.add_argument("--config", help="recipe of `vigor train` whose settings hold where the measure has none of its "
                       "own (default: lab for a built-in base, otherwise none)")  # fmt: skip
    group.add_argument("--learning_rate", type=float, help="of that training (default: the recipe's, or TRL's 1e-6)")
    group.add_argument("--output_dir", type=Path, help="of that training (default: runs/collapse-DATE)")


def run(args: argparse.Namespace) -> int:
    """Trains, prints the curve and the step; returns the exit status (0 measured, 1 the training failed).

    Raises:
        ValueError, OSError: something cannot work; the message says what, where and the remedy.
    """
    from vigor.commands.job import prepare, quiet_third_parties
    from vigor.probe import collapse

    if args.collapse_step < 1 or (args.learning_rate is not None and not args.learning_rate > 0):
        raise ValueError(
            f"--collapse_step {args.collapse_step}, --learning_rate {args.learning_rate}: give positive numbers."
        )
    folder = args.output_dir or Path("runs") / f"collapse-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir {folder} is not an empty folder. Name a new one.")
    named = args.config or ("lab" if args.world else None)
    recipe = read_settings(recipes.resolve(named)) if named else {}
    n_prompts = args.n_prompts or N_PROMPTS
    chosen = collapse.settings(
        recipe,
        n_prompts=n_prompts,
        steps=args.collapse_step,
        model_name_or_path=args.model_name_or_path or args.world,
        prompts=args.prompts,
        prompt_column=args.prompt_column,
        answer_column=args.answer_column,
        system_prompt=args.system_prompt,
        max_completion_length=args.max_completion_length,
        learning_rate=args.learning_rate,
        temperature=args.temperature,
        seed=args.seed,
        dtype=None if args.dtype == "auto" else args.dtype,
    )
    quiet_third_parties()
    prepare(["--output_dir", str(folder)], chosen)
    print(
        f"Majority vote on {n_prompts} prompts × {collapse.NUM_GENERATIONS} completions a step, {n_prompts} updates "
        f"each, until Reward Accuracy is below {collapse.THRESHOLD:.0%} or {args.collapse_step} steps are over"
    )
    print("step  Reward Accuracy  accuracy of the samples")
    try:
        curve = collapse.measure(chosen, folder, say=_say)
    except collapse.CollapseError as error:
        refuse("probe", error)
        return 1
    found = collapse.collapse_step(curve)
    best = max(curve, key=lambda at: at.accuracy)
    print(f"\n{_told(found, len(curve))}")
    table(
        [
            ("", "step", "accuracy of the samples"),
            ("before", "0", f"{curve[0].accuracy:.1%}"),
            ("best", str(best.step), f"{best.accuracy:.1%}"),
            ("last", str(curve[-1].step), f"{curve[-1].accuracy:.1%}"),
        ]
    )
    report = {
        "collapse_step": found,
        "threshold": collapse.THRESHOLD,
        "curve": [asdict(at) for at in curve],
        "settings": chosen,
        "source": "arXiv 2603.08660",
    }
    print(f"Run folder: {printable(folder)}")
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(printable(args.out))
    return 0


def _say(at: Any) -> None:
    print(f"{at.step:>4}  {at.reward_accuracy:>15.1%}  {at.accuracy:>23.1%}", flush=True)


def _told(found: int | None, steps: int) -> str:
    if found is None:
        return f"Model Collapse Step: none in {steps} steps; the model lasts longer than that (arXiv 2603.08660)."
    return f"Model Collapse Step: {found} (the first step with Reward Accuracy below 1 %, arXiv 2603.08660)."
