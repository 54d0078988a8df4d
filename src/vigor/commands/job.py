"""What `vigor train` was asked for, with every part checked; the model is not loaded yet."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigor import recipes
from vigor.commands.arguments import TrainArguments
from vigor.commands.checks import (
    check_length,
    check_rewards,
    resumed_from,
    reward_name,
    reward_of,
    weights_of,
)
from vigor.commands.settings import check_texts, fit
from vigor.reading import check, read_settings
from vigor.terminal import one_screen, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig

    from vigor.config import VigorConfig
    from vigor.data import PromptData
    from vigor.runfolder import RunFolder

MOST_LAB_PROMPTS = 1_000_000


@dataclass(frozen=True)
class Job:
    """A run whose every part has been checked; the model is not loaded yet."""

    run: TrainArguments
    args: VigorConfig
    model_args: ModelConfig
    settings: dict[str, Any]
    model: str
    tokenizer: PreTrainedTokenizerBase
    data: PromptData
    rewards: list[Any]
    folder: RunFolder
    checkpoint: Path | None
    """What to resume from."""
    trained: bool
    """All steps are done; only the model and the report are missing."""


def read_config(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes `--config` out of the arguments, reads the file, and sets the variables of its `env` block.

    Happens before torch is imported: OMP_NUM_THREADS and its like are read once, at that import.

    Raises:
        ValueError: no such recipe or file, or not a mapping of settings.
    """
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in argv:
        return argv, {}
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise ValueError("--config needs the name of a recipe or a YAML file (see `vigor recipes`).")
    path = recipes.resolve(argv[at + 1])
    config = read_settings(path)
    check(config, {"env?": {str: (str, int, float, bool)}}, str(path))
    for name, value in config.get("env", {}).items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in f"{name}{value}":
            raise ValueError(f"{path}: env: {name!r} is no variable that can be set.")
        os.environ[name] = str(value)
    return argv[:at] + argv[at + 2 :], config


def prepare(argv: Sequence[str], config: dict[str, Any]) -> Job:
    """Parses the settings and checks folder, rewards, tokenizer and every prompt.

    Raises:
        ValueError, OSError: something cannot work; the message says what, where and the remedy.
    """
    from trl import ModelConfig, TrlParser

    from vigor.config import VigorConfig
    from vigor.data import load_prompts
    from vigor.runfolder import RunFolder

    class Settings(TrlParser):
        """TRL's parser with our complaints."""

        def error(self, message: str) -> None:
            super().error(one_screen(printable(message)))

    classes = (TrainArguments, VigorConfig, ModelConfig)
    parser = Settings(
        classes,
        prog="vigor train",
        usage="vigor train [--config NAME|FILE] [--any_setting value …]",
        description="--config takes a YAML file of the settings below or the name of a recipe (see `vigor recipes`); "
        "flags override it. First ours, then those of TRL's GRPOConfig, then the model's. To start several processes: "
        "--accelerate_config NAME|FILE --num_processes N (docs/parallel.md).",
    )
    env = config.get("env", {})
    settable = fit({key: value for key, value in config.items() if key != "env"}, classes)
    known = {field.name for each in classes for field in fields(each)}
    if unknown := [name for name in settable if name not in known]:
        raise ValueError(f"--config: unknown settings {', '.join(unknown)}.")
    parser.set_defaults_with_config(**settable)
    if "output_dir" not in config and not any(arg.split("=")[0] == "--output_dir" for arg in argv):
        argv = [*argv, "--output_dir", default_folder(config)]
    settings = {**vars(parser.parse_args(argv)), "resume": False, **({"env": env} if env else {})}
    check_texts(settings)
    run, args, model_args = parser.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)
    if run.prompts is None or model_args.model_name_or_path is None:
        raise ValueError(
            "name the prompts and the model: --prompts FILE --model_name_or_path NAME, or a recipe that does, such as "
            "--config lab."
        )
    folder = RunFolder.open(args.output_dir, resume=run.resume)
    checkpoint = resumed_from(folder, args, settings) if run.resume else None
    model = model_path(model_args.model_name_or_path)
    args.reward_weights = weights_of(run.reward_funcs, args.reward_weights)
    rewards = [reward_of(name) for name in run.reward_funcs]
    tokenizer = _tokenizer(model, model_args, args)
    data = load_prompts(
        run.prompts,
        prompt_column=run.prompt_column,
        answer_column=run.answer_column,
        system_prompt=run.system_prompt,
        split=run.prompt_split,
        limit=run.max_prompts,
        skip_bad_rows=run.skip_bad_rows,
        tokenizer=tokenizer,
        max_prompt_length=_prompt_budget(run, args, tokenizer),
        seed=1000 + args.seed,  # the lab's bases were pre-trained on questions of seed 0
        lab_size=_lab_size(args),
    )
    if run.watch_accuracy and "answer" in data.dataset.column_names and "accuracy" not in map(reward_name, rewards):
        rewards.append(reward_of("accuracy"))
        args.reward_weights.append(0.0)
        if args.reward_weights_final is not None:
            args.reward_weights_final.append(0.0)
    check_rewards(rewards, args.reward_weights, data.dataset.column_names)
    trained = check_length(args, data.n_rows, folder, checkpoint)
    return Job(run, args, model_args, settings, model, tokenizer, data, rewards, folder, checkpoint, trained)


def _tokenizer(model: str, model_args: ModelConfig, args: VigorConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model_name_or_path {model}: no tokenizer can be loaded from there. Give a folder that holds model and "
            f"tokenizer, or a hub name, with the network at hand. ({str(error).splitlines()[0]})"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _prompt_budget(run: TrainArguments, args: VigorConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """--max_prompt_length, or what the model's context leaves beside the completion."""
    if run.max_prompt_length is not None:
        return run.max_prompt_length
    context = tokenizer.model_max_length
    if context > 10**9:  # transformers' way to say that the tokenizer knows no limit
        return None
    budget = context - (args.max_completion_length or 0)
    if budget < 1:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt in the model's context of "
            f"{context} tokens. Lower it."
        )
    return int(budget)


def _lab_size(args: VigorConfig) -> int:
    """As many prompts as the run reads, so that none repeats; one epoch of 4,096 where max_steps is not set."""
    generations = -(-args.max_steps * args.gradient_accumulation_steps // args.steps_per_generation)
    size = max(generations * args.generation_batch_size // args.num_generations, 1) if args.max_steps > 0 else 4096
    if size > MOST_LAB_PROMPTS:
        raise ValueError(
            f"--max_steps {args.max_steps} takes {size:,} questions of the lab, which are all made before the run; at "
            f"most {MOST_LAB_PROMPTS:,} are. Lower it, or write the questions to a file and set --num_train_epochs."
        )
    return size


def default_folder(config: dict[str, Any]) -> str:
    """A run folder named after the recipe and the time.

    Raises ValueError where several processes would each name their own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("name the run folder with --output_dir: several processes must agree on it.")
    name = Path(str(config.get("run_name", "run"))).name
    return str(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")


def model_path(name: str) -> str:
    """The folder of a built-in base; any other name as it is."""
    from vigor.lab.world import model_path

    return str(model_path(name)) if name in ("lab", "lab-misaligned") else name


def quiet_third_parties() -> None:
    """Deprecation notes between transformers and TRL are not the user's to mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\b")
    from datasets import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
