"""`vigor eval`: benchmarks for a model, on lm-evaluation-harness, or two evaluations held against each other."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigor.commands import methods
from vigor.evaluation.suites import BENCHMARKS, SUITES, TRAINING_PROMPT, EvalError, select
from vigor.reading import ReadError, read_value
from vigor.terminal import printable, refuse

if TYPE_CHECKING:
    from vigor.evaluation.code_tasks import Runner
    from vigor.evaluation.run import Settings

CACHE_VARIABLE = "VIGOR_CACHE_DIR"

_EPILOG = f"""\
suites: {"; ".join(f"{name} = {' '.join(tasks)}" for name, tasks in SUITES.items())}

vigor eval lab --suite lab                                   the built-in model, offline
vigor eval runs/my-run --suite paper --data_dir data         local jsonl files
vigor eval Qwen/Qwen2.5-0.5B --tasks gsm8k --limit 100
vigor eval --compare runs/eval-base runs/eval-trained        paired tests

The same command again generates nothing; one that was interrupted goes on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vigor eval`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = (__doc__ or "").strip(), _EPILOG
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder, run folder, hub name, or a lab base")
    add("--tasks", nargs="+", metavar="NAME", help=f"{', '.join(BENCHMARKS)}")
    add("--suite", metavar="NAME", help=f"{', '.join(SUITES)} (default: lab for a lab base, else paper)")
    add("--data_dir", metavar="DIR", help="folder with local jsonl files (default: $VIGOR_DATA_DIR, else the hub)")
    add("--output_dir", type=Path, metavar="DIR", help="default: runs/eval-MODEL-SUITE; with --compare: none")
    add("--cache_dir", type=Path, metavar="DIR", help=f"of generations (default: ${CACHE_VARIABLE}, else "
        "~/.cache/vigor)")  # fmt: skip
    add("--limit", type=int, metavar="N", help="only the first problems of each task")
    add("--batch_size", default="16", metavar="N", help="texts generated together, or auto (default: 16)")
    add("--backend", default="hf", choices=("hf", "vllm"), help="default: hf")
    add("--revision", help="of a hub model")
    add("--dtype", default="auto", help="of the weights (default: as saved)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--model_args", nargs="+", default=[], metavar="KEY=VALUE", help="further arguments of the back-end, such as "
        "tensor_parallel_size=2")  # fmt: skip
    add("--prompt", default="training", metavar="training|none|TEXT", help="system prompt: the paper's training prompt "
        f"for mathematics ({TRAINING_PROMPT}), none, or a text for all tasks (default: "
        "training)")  # fmt: skip
    add("--chat_template", action=argparse.BooleanOptionalAction, help="default: where the tokenizer has one")
    add("--samples", type=int, metavar="N", help="texts a problem (default: the task's)")
    add("--temperature", type=float, metavar="T", help="0: greedy (default: the task's)")
    add("--max_new_tokens", type=int, metavar="N", help="longest answer (default: the task's)")
    add("--seed", type=int, default=0, help="of sampled text (default: 0)")
    add("--code_timeout", type=float, default=30.0, metavar="S", help="seconds that a program may run (default: 30)")
    add("--sandbox_url", metavar="URL", help="run generated code on a SandboxFusion server")
    add("--unsafe_local_exec", action="store_true", help="run generated code WITHOUT a sandbox: with your rights on "
        "this machine, it can read, change and delete your files, read your keys and use the network")  # fmt: skip
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results folders; runs no model")


def evaluate(args: argparse.Namespace) -> int:
    """Runs `vigor eval`; returns the exit status (0 done, 2 refused with a message)."""
    from vigor.evaluation.sandbox import SandboxUnavailable

    try:
        if args.compare is not None:
            _compare(args)
        else:
            _evaluate(args)
    except (EvalError, ReadError, OSError, SandboxUnavailable) as error:
        return refuse("eval", error)
    return 0


def _evaluate(args: argparse.Namespace) -> None:
    settings = read(args)
    from vigor.evaluation import results
    from vigor.evaluation.run import evaluate

    _quiet()
    outcome = evaluate(settings, lambda: make_runner(args), lambda text: print(printable(text), flush=True))
    methods.table(results.table(outcome.content))
    print(f"{outcome.generated:,} texts generated, {outcome.reused:,} from {printable(settings.cache)}")
    print(f"Results: {printable(settings.output_dir)}/results.json, results.md, problems/*.parquet")


def read(args: argparse.Namespace) -> Settings:
    """The settings that flags stand for. Raises EvalError for those that cannot work."""
    if args.model is None:
        raise EvalError("name a MODEL, or two results folders with --compare A B. `vigor eval --help` shows examples.")
    lab = args.model in ("lab", "lab-misaligned")
    suite = args.suite if args.suite or args.tasks else "lab" if lab else "paper"
    tasks = tuple(select(args.tasks, suite))
    if not 0 < args.code_timeout < float("inf"):
        raise EvalError(f"--code_timeout {args.code_timeout}: give a number of seconds above 0.")
    if args.unsafe_local_exec and args.sandbox_url:
        raise EvalError("--unsafe_local_exec and --sandbox_url exclude each other: say where the code is to run.")
    if importlib.util.find_spec("lm_eval") is None:
        raise EvalError("lm-evaluation-harness is not installed: pip install 'vigor-rl[eval]'")
    from vigor.evaluation.run import Settings, default_output

    folder = args.cache_dir or Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "vigor")
    return Settings(
        model=args.model,
        tasks=tasks,
        output_dir=args.output_dir or default_output(args.model, tasks, None if args.tasks else suite),
        cache=folder / "generations.sqlite",
        data_dir=args.data_dir,
        revision=args.revision,
        limit=args.limit,
        backend=args.backend,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        model_args=_pairs(args.model_args),
        prompt=args.prompt,
        chat_template=args.chat_template,
        samples=args.samples,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )


def make_runner(args: argparse.Namespace) -> Runner:
    """Where generated code runs. Raises SandboxUnavailable where it cannot."""
    from vigor.evaluation.sandbox import Limits, Program, Sandbox, SandboxFusion

    limits = Limits(timeout_s=args.code_timeout)
    if args.sandbox_url:
        try:
            server = SandboxFusion(args.sandbox_url, limits)
        except ValueError as error:
            raise EvalError(f"--sandbox_url: {error}") from error
        server.run([Program("print(1)")])
        return server
    return Sandbox(limits, unsafe_local_exec=args.unsafe_local_exec)


def _compare(args: argparse.Namespace) -> None:
    from vigor.evaluation import compare_results

    if args.model is not None:
        raise EvalError(f"--compare runs no model: leave {args.model} out.")
    first, second = args.compare
    found = compare_results.compare(first, second)
    methods.table(compare_results.table(found))
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        path = args.output_dir / "compare.md"
        path.write_text(compare_results.markdown(first, second, found), "utf-8")
        print(f"Table: {printable(path)}")


def _pairs(texts: list[str]) -> dict[str, Any]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise EvalError(f"--model_args {text}: give KEY=VALUE.")
        pairs[name] = read_value("model_args", value)
    return pairs


def _quiet() -> None:
    """The harness and transformers report what our own lines and table say already; errors stay."""
    import logging

    from transformers.utils import logging as transformers_logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
