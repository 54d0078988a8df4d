"""`vigor score`: check every row, then load the model and score the completions, a window at a time."""

from __future__ import annotations

import argparse
import hashlib
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from vigor.terminal import printable, refuse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vigor score`."""
    parser.add_argument("--completions", required=True, metavar="FILE", help="jsonl, json, csv or parquet: prompt, and "
                        "completion or a list of completions")  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=".jsonl or .parquet to write")
    parser.add_argument("--signals", nargs="+", default=["vigor"], metavar="NAME", help="rewards of `vigor methods`, "
                        "with options as in 'vigor(parameters=lora)' (default: vigor)")  # fmt: skip
    parser.add_argument("--best_of", metavar="SIGNAL", help="write the best completion of each prompt by this signal")
    parser.add_argument("--prompt_column", help="column with the prompt (default: prompt, problem, question, messages)")
    parser.add_argument("--answer_column", help="column with the reference answer (default: answer, if there is one)")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave out rows that cannot be used")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits: that of sampling")
    parser.add_argument("--batch_size", type=int, default=16, help="completions scored together (default: 16)")
    parser.add_argument("--resume", action="store_true", help="continue a run that was killed")
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a model and say where it runs."""
    parser.add_argument("--model_name_or_path", required=True, metavar="NAME", help="folder, hub name, or a lab base")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the "
                        "weights (default: as saved)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")


def score(args: argparse.Namespace) -> int:
    """Runs `vigor score`; returns the exit status (0 done, 2 refused with a message)."""
    try:
        run(args)
    except (OSError, ValueError) as error:
        return refuse("score", error)
    return 0


def run(args: argparse.Namespace) -> None:
    """Checks everything, loads the model, scores, and writes the file.

    Raises:
        ValueError, OSError: something cannot work; the message says what, where and the remedy.
    """
    from tqdm.auto import tqdm

    from vigor.scoring import check_signals, read_samples, score_completions
    from vigor.scoring.output import PREFIX, PartFile, rows_of
    from vigor.scoring.rows import check_file

    if args.best_of is not None and args.best_of not in args.signals:
        args.signals = [*args.signals, args.best_of]
    rewards = check_signals(args.signals)
    part = PartFile(args.out, settings(args), args.resume)
    tokenizer = load_tokenizer(args.model_name_or_path)
    columns = {"prompt_column": args.prompt_column, "answer_column": args.answer_column}
    census = check_file(args.completions, tokenizer, skip_bad_rows=args.skip_bad_rows, **columns)
    check_signals(args.signals, census.columns)
    if taken := [PREFIX + r.name for r in rewards if PREFIX + r.name in (census.columns or ())]:
        raise ValueError(f"{args.completions} has a column {taken[0]!r} already: rename or remove it.")
    if census.bad_rows:
        print(f"{census.bad_rows:,} bad rows of {printable(args.completions)} left out.")
    model = load_model(args)
    done = part.begin()
    samples = read_samples(args.completions, tokenizer=tokenizer, reject=lambda line, reason: None, **columns)
    skipped, rest = skip_finished(samples, done)
    bar = tqdm(total=census.completions, initial=skipped, unit="completion", disable=not sys.stderr.isatty())
    surplus = done - skipped  # rows of a group that was cut in two: computed again, not written again
    options = {"temperature": args.temperature, "batch_size": args.batch_size}
    for sample, scores in score_completions(model, tokenizer, rest, args.signals, **options):
        written = rows_of(sample, scores)
        part.append(written[surplus:])
        surplus = max(0, surplus - len(written))
        bar.update(len(scores))
    bar.close()
    count = part.finish(next((r.name for r in rewards if args.best_of and _same(r.name, args.best_of)), None))
    print(f"{census.completions:,} completions of {census.rows:,} rows scored; {count:,} rows in {printable(args.out)}")


def skip_finished(samples: Any, done: int) -> tuple[int, Any]:
    """(completions of the prompts that need not be seen again, the remaining rows), `done` rows being written.

    A signal may compare the completions of neighbouring rows with one prompt, so that the last of them that is not
    wholly written must be seen from its beginning.
    """
    group: list[Any] = []
    before = seen = 0  # completions before the group at hand; completions read
    for sample in samples:
        if group and sample.prompt != group[0].prompt:
            group, before = [], seen
        group.append(sample)
        seen += len(sample.completions)
        if seen > done:
            return before, chain(group, samples)
    return before, iter(group if seen > done else [])


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What must not change when a run is continued; the file by its content."""
    path = Path(args.completions)
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    kept = ("model_name_or_path", "signals", "temperature", "dtype", "prompt_column", "answer_column", "skip_bad_rows")
    return {"completions": digest.hexdigest(), **{key: vars(args)[key] for key in kept}}


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    from vigor.commands.job import model_path

    try:
        return AutoTokenizer.from_pretrained(model_path(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model_name_or_path {name}: no tokenizer can be loaded from there. Give a folder that holds model and "
            f"tokenizer, or a hub name, with the network at hand. ({str(error).splitlines()[0]})"
        ) from error


def load_model(args: argparse.Namespace) -> Any:
    """The model, in eval mode on its device."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from vigor.commands.job import model_path

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_path(args.model_name_or_path), dtype=args.dtype)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and model.num_parameters() < 10_000_000:
        torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    return model.to(device).eval()


def _same(name: str, spec: str) -> bool:
    from vigor.rewards import get

    return get(spec).name == name
