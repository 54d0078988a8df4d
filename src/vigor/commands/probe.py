"""`vigor probe`: what a reward would do on these prompts, from samples alone, before anything is trained."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vigor.commands import collapse
from vigor.commands.methods import table
from vigor.commands.score import load_model, load_tokenizer
from vigor.terminal import printable, refuse

N_PROMPTS = 64
_SAMPLING: dict[str, Any] = {
    "signals": None,
    "labelled": None,
    "num_generations": 16,
    "batch_size": 64,
    "noise_prompts": 8,
    "device": None,
}
"""Defaults of what only matters where completions are sampled and scored."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vigor probe`."""
    parser.add_argument("--prompts", required=True, help="jsonl, json, csv, parquet, a hub data set, or lab:math")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model_name_or_path", metavar="NAME", help="folder or hub name")
    model.add_argument("--world", choices=("lab", "lab-misaligned"), help="a built-in base")
    parser.add_argument("--signals", nargs="+", metavar="NAME", help="rewards of `vigor methods` (default: vigor, "
                        "logprob, self_certainty, entropy)")  # fmt: skip
    parser.add_argument("--n_prompts", type=int, help="the first so many prompts (default: 64); with "
                        "--collapse_step, prompts a step (default: 32)")  # fmt: skip
    parser.add_argument(
        "--labelled", type=int, metavar="N", help="use the answers of the first N of them only; 0: none"
    )
    parser.add_argument("--num_generations", type=int, help="completions of a prompt (default: 16)")
    parser.add_argument("--max_completion_length", type=int, help="tokens (default: 512; 72 for lab: prompts)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default: 1)")
    parser.add_argument("--batch_size", type=int, help="completions sampled together (default: 64)")
    parser.add_argument("--prompt_column", help="column with the prompt (default: prompt, problem, question, messages)")
    parser.add_argument("--answer_column", help="column with the reference answer (default: answer, if there is one)")
    parser.add_argument("--system_prompt", help="system message put before every prompt")
    parser.add_argument("--noise_prompts", type=int, help="prompts to score again in another precision "
                        "(default: 8; 0: none)")  # fmt: skip
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the "
                        "weights: that of your training (default: as saved)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    collapse.add_arguments(parser)
    parser.set_defaults(**_SAMPLING)


def probe(args: argparse.Namespace) -> int:
    """Runs `vigor probe`; returns the exit status (0 done, 1 the training failed, 2 refused with a message)."""
    try:
        check(args)
        if args.collapse_step is not None:
            return collapse.run(args)
        run(args)
    except (OSError, ValueError) as error:
        return refuse("probe", error)
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuses what would have no effect, and a file that cannot be written.

    Raises:
        ValueError: with the flag and the remedy.
    """
    if args.collapse_step is None:
        given = [name for name in ("config", "learning_rate", "output_dir") if getattr(args, name) is not None]
        why = "is for the training of --collapse_step, and nothing is trained without it"
    else:
        given = [name for name, default in _SAMPLING.items() if getattr(args, name) != default]
        why = "has no part in --collapse_step"
    if given:
        raise ValueError(f"--{given[0]} {why}: leave it out.")
    if args.out is not None and not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}.")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Checks everything, loads the model, probes it, prints the report, and returns it.

    Raises:
        ValueError, OSError: something cannot work; the message says what, where and the remedy.
    """
    from vigor.data import load_prompts
    from vigor.probe.run import SIGNALS
    from vigor.probe.run import probe as run_probe
    from vigor.probe.text import tables, verdicts
    from vigor.scoring import check_signals

    n_prompts = N_PROMPTS if args.n_prompts is None else args.n_prompts
    if n_prompts < 1 or args.num_generations < 2 or args.temperature <= 0 or args.batch_size < 1:
        raise ValueError(
            f"--n_prompts {n_prompts}, --num_generations {args.num_generations}, --temperature {args.temperature} "
            f"and --batch_size {args.batch_size}: give at least 1 prompt and 2 completions, and positive numbers."
        )
    signals = args.signals or list(SIGNALS)
    check_signals(signals)
    args.model_name_or_path = args.model_name_or_path or args.world
    length = args.max_completion_length or (72 if args.prompts.startswith("lab:") else 512)
    tokenizer = load_tokenizer(args.model_name_or_path)
    room = tokenizer.model_max_length - length
    if room < 1:
        raise ValueError(
            f"--max_completion_length {length} leaves no room for a prompt in the model's context of "
            f"{tokenizer.model_max_length} tokens. Lower it."
        )
    data = load_prompts(
        args.prompts,
        prompt_column=args.prompt_column,
        answer_column=args.answer_column,
        system_prompt=args.system_prompt,
        limit=n_prompts,
        tokenizer=tokenizer,
        max_prompt_length=room if room < 10**9 else None,
        seed=1000 + args.seed,  # the lab's bases were pre-trained on questions of seed 0
    )
    check_signals(signals, data.dataset.column_names)
    rows = [dict(row) for row in data.dataset]
    for row in rows[args.labelled :] if args.labelled is not None else []:
        row["answer"] = None
    report = run_probe(
        load_model(args),
        tokenizer,
        rows,
        signals,
        num_generations=args.num_generations,
        max_completion_length=length,
        temperature=args.temperature,
        batch_size=args.batch_size,
        noise_prompts=args.noise_prompts,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    report["facts"] = {"model": args.model_name_or_path, "source": args.prompts, **report["facts"]}
    facts = report["facts"]
    print(
        f"{facts['prompts']} prompts of {printable(facts['source'])} × {facts['num_generations']} completions of "
        f"{printable(facts['model'])} "
        f"({facts['dtype']}); answers known for {facts['labelled_prompts']}"
    )
    for title, rows_of_table in tables(report):
        print(f"\n{title}")
        table(rows_of_table)
    print(f"\nForecast of a training on each signal\n{printable(verdicts(report))}")
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(f"\n{printable(args.out)}")
    return report
