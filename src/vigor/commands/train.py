"""`vigor train`: check everything, then load the model, train it, and show what changed."""

from __future__ import annotations

import errno
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vigor import recipes
from vigor.checkpoint import CheckpointError, LockedError, locked, step_of
from vigor.commands.arguments import TrainArguments
from vigor.commands.settings import check_texts, fit
from vigor.launch import Launch, launch, wants_launch
from vigor.reading import check, read_settings
from vigor.terminal import one_screen, printable, refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig

    from vigor.config import VigorConfig
    from vigor.data import PromptData
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
_NO_WRITING = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG}


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


def train(argv: Sequence[str]) -> int:
    """Runs `vigor train` with these arguments.

    Returns the exit status: 0 done, 1 stopped with a message while it ran, 2 refused with a message, 143 or 130 stopped
    by SIGTERM or SIGINT.
    """
    if wants_launch(argv):
        try:
            return launch(_named(argv), preflight)
        except (OSError, ValueError) as error:
            return refuse("train", error)
    try:
        argv, config = read_config(argv)
    except (OSError, ValueError) as error:
        return refuse("train", error)
    from vigor.outside import RewardError
    from vigor.runfolder import RunFolderError

    quiet_third_parties()
    try:
        job = prepare(argv, config)
    except (OSError, ValueError) as error:
        return refuse("train", error)
    if job.run.dry_run:
        print(printable(plan(job)))
        return 0
    try:
        status = run(job)
    except (LockedError, RunFolderError) as error:  # taken by another run since it was found free
        status = refuse("train", error)
    except (CheckpointError, FloatingPointError, RewardError) as error:
        status = _stopped(error)
    except RuntimeError as error:
        if not _lost_another(error):
            raise
        return _stopped(
            f"another process of this run has ended, or its machine cannot be reached ({str(error).splitlines()[0]}). "
            "This one stops too; start them all again with --resume."
        )
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        if error.errno not in _NO_WRITING:
            raise
        status = _stopped(f"{error}. Nothing more can be written there; make room, and continue with --resume.")
    leave_process_group()
    return status


def preflight(asked: Launch) -> int:
    """What one of so many processes would refuse before it loads the model; prints the plan of a dry run.

    Changes `VigorConfig.planned_processes`: for a process that does nothing else. Returns the exit status, 0 or 2.
    """
    try:
        argv, config = read_config(asked.argv)
        from vigor.config import VigorConfig
        from vigor.rewards.base import Reward

        quiet_third_parties()
        VigorConfig.planned_processes = asked.processes
        job = prepare(argv, config)
        if asked.shards and job.args.device.type == "cpu":
            raise ValueError(
                f"--accelerate_config {asked.config.stem} shards parameters with FSDP, which accelerate does on "
                "accelerators only; on CPUs each process would silently hold them all. Use multi_gpu."
            )
        policy = {"grad_norm", "token_stats", "reference_logps"}
        reading = [reward.name for reward in job.rewards if isinstance(reward, Reward) and reward.needs & policy]
        if asked.zero_stage == 3 and reading:
            raise ValueError(
                f"reward {reading[0]!r} reads the policy, whose parameters DeepSpeed ZeRO-3 partitions: it would get "
                "the norms of parts. Use --accelerate_config fsdp2, which shards as much, or zero2."
            )
    except (OSError, ValueError) as error:
        return refuse("train", error)
    if job.run.dry_run:
        print(printable(plan(job)))
    return 0


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
        argv = [*argv, "--output_dir", _default_folder(config)]
    settings = {**vars(parser.parse_args(argv)), "resume": False, **({"env": env} if env else {})}
    check_texts(settings)
    run, args, model_args = parser.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)
    if run.prompts is None or model_args.model_name_or_path is None:
        raise ValueError(
            "name the prompts and the model: --prompts FILE --model_name_or_path NAME, or a recipe that does, such as "
            "--config lab."
        )
    folder = RunFolder.open(args.output_dir, resume=run.resume)
    checkpoint = _resumed_from(folder, args, settings) if run.resume else None
    model = _model_path(model_args.model_name_or_path)
    args.reward_weights = _weights(run.reward_funcs, args.reward_weights)
    rewards = [_reward(name) for name in run.reward_funcs]
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
    if run.watch_accuracy and "answer" in data.dataset.column_names and "accuracy" not in map(_name, rewards):
        rewards.append(_reward("accuracy"))
        args.reward_weights.append(0.0)
        if args.reward_weights_final is not None:
            args.reward_weights_final.append(0.0)
    _check_rewards(rewards, args.reward_weights, data.dataset.column_names)
    trained = _check_length(args, data.n_rows, folder, checkpoint)
    return Job(run, args, model_args, settings, model, tokenizer, data, rewards, folder, checkpoint, trained)


def plan(job: Job) -> str:
    """What the run will do and need; nothing is written and no weights are read."""
    from trl import get_peft_config

    from vigor.data import encode_prompt
    from vigor.plan import describe, estimate_memory
    from vigor.planner.memory import Memory

    sample = job.data.dataset.select(range(min(1000, job.data.n_rows)))
    template = dict(job.args.chat_template_kwargs or {})
    longest = max(len(encode_prompt(job.tokenizer, prompt, template)) for prompt in sample["prompt"])
    memory: Memory | str
    try:
        memory = estimate_memory(
            job.model,
            job.args,
            dtype=job.model_args.dtype,
            prompt_length=longest,
            peft_config=get_peft_config(job.model_args),
        )
    except (OSError, ValueError) as error:
        memory = f"the model's config cannot be read ({str(error).splitlines()[0]})"
    weights = dict(zip(map(_name, job.rewards), job.args.reward_weights, strict=True))
    head = f"model         {job.model_args.model_name_or_path}\nprompts from  {job.data.source}"
    if job.data.n_bad_rows:
        head += f" ({job.data.n_bad_rows:,} bad rows left out)"
    body = describe(job.args, n_prompts=job.data.n_rows, longest_prompt=longest, rewards=weights, memory=memory)
    return f"{head}\n{body}\nfolder        {job.folder.path} (not made: this is a dry run)"


def run(job: Job) -> int:
    """Loads the model, trains it, saves it, and writes the run folder; returns the exit status.

    Raises:
        CheckpointError: the folder is another run's, or a checkpoint cannot be written or resumed from.
        NonFiniteError: see `VigorConfig.max_skipped_updates`.
    """
    from vigor.runfolder import LOCK, RunFolder

    if not job.args.distributed_state.is_main_process:
        return _run(job)
    with locked(job.folder.path, LOCK):
        if not job.run.resume:
            RunFolder.open(job.folder.path)  # another run may have come and gone since it was found free
        return _run(job)


def _run(job: Job) -> int:
    from transformers import PrinterCallback
    from trl import get_peft_config, get_quantization_config

    from vigor.interrupt import Interrupt, exit_status
    from vigor.progress import MetricsFile, ProgressBar, StepClock
    from vigor.report import print_results, write_report
    from vigor.trainer import VigorTrainer

    args, folder, checkpoint = job.args, job.folder, job.checkpoint
    args.distributed_state.wait_for_everyone()  # the trainer makes the folder: not before every process found it free
    args.disable_tqdm = True
    args.model_init_kwargs = {
        "revision": job.model_args.model_revision,
        "attn_implementation": job.model_args.attn_implementation,
        "dtype": job.model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = VigorTrainer(
        job.model,
        job.rewards,
        args,
        train_dataset=job.data.dataset,
        processing_class=job.tokenizer,
        peft_config=get_peft_config(job.model_args),
        quantization_config=get_quantization_config(job.model_args),
    )
    if trainer.accelerator.is_main_process:
        folder.start(job.settings)
        if job.data.n_bad_rows:
            print(f"{job.data.n_bad_rows:,} bad rows left out of {printable(job.data.source)}.")
    trainer.remove_callback(PrinterCallback)
    interrupt = Interrupt(trainer)
    for callback in (StepClock(trainer), MetricsFile(folder), ProgressBar(trainer.reward_func_names), interrupt):
        trainer.add_callback(callback)

    main = trainer.accelerator.is_main_process
    before = _lab_scores(job, trainer, "before") if main else {}
    trainer.accelerator.wait_for_everyone()
    if job.trained:
        trainer.load_weights(str(checkpoint))
    else:
        with interrupt.catching():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if interrupt.stopped_by is not None:
        step = trainer.state.global_step
        trainer.say(f"Stopped after step {step}, which is saved. Continue with --resume --output_dir {folder.path}")
        return exit_status(interrupt.stopped_by)
    trainer.save_model(str(folder.path / "model"))
    after = _lab_scores(job, trainer, "after") if main else {}
    if main:
        folder.write_json("results.json", {"before": before, "after": after})
        write_report(folder)
        print_results(folder)
    trainer.accelerator.wait_for_everyone()
    return 0


def leave_process_group() -> None:
    """Ends the communication between processes while Python still runs.

    Left to the interpreter's exit, gloo's threads may abort the process after all its work is done. What still refers
    to the group (the wrapped model, in cycles with its trainer) must be gone before.
    """
    from accelerate import PartialState

    gc.collect()
    PartialState().destroy_process_group()


def _lab_scores(job: Job, trainer: Any, when: str) -> dict[str, Any]:
    """Scores of the model on every lab task, where the prompts are the lab's."""
    if not job.run.prompts.startswith("lab:") or job.run.lab_eval_prompts == 0:  # type: ignore[union-attr]
        return {}
    if trainer.is_fsdp_enabled:
        print("The model is not scored on the lab: its parameters are sharded, and one process alone does the scoring.")
        return {}
    from vigor.lab.evaluate import evaluate
    from vigor.lab.tasks import TASKS

    print(f"Scoring the model {when} training: {job.run.lab_eval_prompts} test prompts a task …", flush=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        task: evaluate(
            model, job.tokenizer, task, n_prompts=job.run.lab_eval_prompts, n_samples=job.run.lab_eval_samples
        ).as_dict()
        for task in TASKS
    }


def _reward(name: str) -> Any:
    """One of our rewards, or the function that a dotted path names."""
    from vigor import rewards

    if "." in name and os.getcwd() not in sys.path:  # for the user's own modules, here or in an option
        sys.path.insert(0, os.getcwd())
    if rewards.is_reward_spec(name) or "." not in name:
        return rewards.get(name)
    module, _, attribute = name.rpartition(".")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--reward_funcs {name}: cannot import it ({error}).") from error
    return function


def _name(reward: Any) -> str:
    from vigor.rewards.base import Reward

    return reward.name if isinstance(reward, Reward) else str(reward.__name__)


def _weights(names: list[str], weights: list[float] | None) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"--reward_weights has {len(weights)} numbers for {len(names)} rewards ({', '.join(names)}): give one each."
        )
    return list(weights)


def _check_rewards(rewards: list[Any], weights: list[float], columns: list[str]) -> None:
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


def _resumed_from(folder: RunFolder, args: VigorConfig, settings: dict[str, Any]) -> Path:
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
        refuse_processes(path, about(path), args.distributed_state.num_processes)
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


def _check_length(args: VigorConfig, n_prompts: int, folder: RunFolder, checkpoint: Path | None) -> bool:
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


def _model_path(name: str) -> str:
    from vigor.lab.world import model_path

    return str(model_path(name)) if name in ("lab", "lab-misaligned") else name


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
    return max(generations * args.generation_batch_size // args.num_generations, 1) if args.max_steps > 0 else 4096


def _named(argv: Sequence[str]) -> list[str]:
    """The arguments with a run folder that all processes will agree on."""
    rest, config = read_config(argv)
    if "output_dir" in config or any(arg.split("=")[0] == "--output_dir" for arg in rest):
        return list(argv)
    return [*argv, "--output_dir", _default_folder(config)]


def _default_folder(config: dict[str, Any]) -> str:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("name the run folder with --output_dir: several processes must agree on it.")
    name = Path(str(config.get("run_name", "run"))).name
    return str(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")


def quiet_third_parties() -> None:
    """Deprecation notes between transformers and TRL are not the user's to mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\b")
    from datasets import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()


def _lost_another(error: RuntimeError) -> bool:
    """Whether the connection to another process broke: torch has a type for NCCL's errors, and none for gloo's."""
    from torch.distributed import DistError

    broken = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, DistError) or any(text in str(error) for text in broken)


def _stopped(error: object) -> int:
    refuse("train", error)
    return 1
