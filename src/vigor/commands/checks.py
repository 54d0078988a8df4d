"""The parts of a run, each refused where it cannot work: rewards, weights, length, and what to resume from."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vigor.checkpoint import CheckpointError, step_of
from vigor.terminal import one_screen, printable

if TYPE_CHECKING:
    from vigor.config import VigorConfig
    from vigor.runfolder import RunFolder

_TAKEN = ("prompts", "completions", "completion", "completion_ids", "image", "images", "trainer_state", "log_extra",
          "log_metric", "environment", "environments", "tools")  # fmt: skip
"""Data set columns that TRL would read as its own keyword or as pictures."""
_SEALED = {"model_name_or_path", "model_revision", "dtype", "use_peft", "load_in_4bit", "load_in_8bit", "prompts",
           "prompt_column", "prompt_split", "system_prompt", "max_prompts", "max_prompt_length",
           "skip_bad_rows"}  # fmt: skip
"""Settings that a resumed run shares with its beginning, besides those that every checkpoint holds."""
_FREE = {"resume", "dry_run", "output_dir", "env", "logging_dir"}
"""Settings that do not touch the course of a run."""


def reward_of(name: str) -> Any:
    """One of our rewards, or the function that a dotted path names."""
    from vigor import rewards

    if "." in name and os.getcwd() not in sys.path:  # for the user's own modules, here or in an option
        sys.path.insert(0, os.getcwd())
    if rewards.is_reward_spec(name) or "." not in name:
        return rewards.get(name)
    module, _, attribute = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"--reward_funcs {name}: neither one of our rewards (`vigor methods`) nor the dotted path of a function, "
            "such as my_pkg.rewards.brevity."
        )
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--reward_funcs {name}: cannot import it ({error}).") from error
    return function


def reward_name(reward: Any) -> str:
    """As in the logs."""
    from vigor.rewards.base import Reward

    return reward.name if isinstance(reward, Reward) else str(reward.__name__)


def weights_of(names: list[str], weights: list[float] | None) -> list[float]:
    """The weights given, or 1 each. Raises ValueError where there are not as many as rewards."""
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"--reward_weights has {len(weights)} numbers for {len(names)} rewards ({', '.join(names)}): give one each."
        )
    return list(weights)


def check_rewards(rewards: list[Any], weights: list[float], columns: list[str]) -> None:
    """Refuses columns that TRL would take, weights that train nothing, and rewards whose column is missing."""
    from vigor.rewards.base import Reward

    if taken := [column for column in columns if column in _TAKEN]:
        raise ValueError(
            f"the prompts have a column {taken[0]!r}, which TRL takes for its own. Rename or remove that column."
        )
    if not any(weights):
        raise ValueError("--reward_weights: every weight is 0, so nothing would be trained. Give one reward a weight.")
    for reward in rewards:
        for column in reward.columns if isinstance(reward, Reward) else ():
            if column not in columns:
                raise ValueError(
                    f"reward {reward.name!r} reads the column {column!r}, but the prompts have {', '.join(columns)}. "
                    "Name it with --answer_column, or leave this reward out."
                )


def check_length(args: VigorConfig, n_prompts: int, folder: RunFolder, checkpoint: Path | None) -> bool:
    """Refuses runs without a step to do, and returns whether only the end is missing: the model and the report."""
    from vigor.plan import total_steps

    needed = args.generation_batch_size // args.num_generations
    if n_prompts < needed:
        raise ValueError(
            f"{n_prompts} prompts are fewer than one generation takes: {args.generation_batch_size} completions / "
            f"{args.num_generations} = {needed} prompts. Lower per_device_train_batch_size or "
            "gradient_accumulation_steps, or bring more prompts."
        )
    trained = False
    if checkpoint is not None:
        done, steps = step_of(checkpoint), total_steps(args, n_prompts)
        trained = done >= steps
        if trained and folder.finished:
            raise ValueError(
                f"--resume: {folder.path} is finished, {done} of {steps} steps. To go on, raise --max_steps or "
                "--num_train_epochs."
            )
    if args.eval_strategy != "no":
        raise ValueError(
            "eval_strategy: vigor train scores no data set while it trains. Leave it 'no', and score checkpoints "
            "afterwards."
        )
    return trained


def resumed_from(folder: RunFolder, args: VigorConfig, settings: dict[str, Any]) -> Path:
    """The newest whole checkpoint, if it fits the settings; tells which were passed over and what has changed.

    Raises ValueError: nothing is whole, or a setting differs that makes the checkpoint another run's.
    """
    from accelerate.utils import broadcast_object_list

    from vigor.checkpoint import about
    from vigor.resume import FIXED, differences, refuse_processes

    main = args.distributed_state.is_main_process
    found: list[Any] = [*folder.last_checkpoint()] if main else [None, []]
    if args.distributed_state.num_processes > 1:
        broadcast_object_list(found)
    path, rejected = found
    for each in rejected if main else ():
        print(printable(each), file=sys.stderr)
    if path is None:
        raise ValueError(f"--resume: {folder.path / 'checkpoints'} holds no whole checkpoint. Start anew.")
    try:
        refuse_processes(path, about(path), args.world_size)
    except CheckpointError as error:
        raise ValueError(f"--resume: {error}") from error
    if not (folder.path / "config.yaml").is_file():
        raise ValueError(f"--resume: {folder.path / 'config.yaml'} is missing, so the run's settings are not known.")
    before = folder.read_config()
    sealed: dict[str, tuple[Any, Any]] = {}
    free: dict[str, tuple[Any, Any]] = {}
    for name in (before.keys() | settings.keys()) - _FREE:
        fixed = name in _SEALED or name in FIXED or name.startswith("lora_")
        (sealed if fixed else free)[name] = before.get(name), yaml.safe_load(yaml.safe_dump(settings.get(name)))
    if changed := differences(*_sides(sealed)):
        raise ValueError(
            f"--resume: {folder.path} was started with other settings: {', '.join(changed)}. The checkpoint's place in "
            "the prompts, its optimizer state or its weights would be those of another run. Set them back; or start a "
            f"new run from its weights, with --model_name_or_path {path} and a new --output_dir."
        )
    if main and (changed := differences(*_sides(free))):
        told = f"Resuming with other settings than before: {', '.join(changed)}. The run goes on with the new ones."
        print(one_screen(printable(told)))
    return Path(path)


def _sides(pairs: dict[str, tuple[Any, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = sorted(pairs)
    return {name: pairs[name][0] for name in names}, {name: pairs[name][1] for name in names}
