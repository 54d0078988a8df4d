"""`vigor train`: check everything, then load the model, train it, and show what changed."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigor.checkpoint import CheckpointError, LockedError, locked, sync_tree
from vigor.commands.checks import reward_name
from vigor.commands.job import Job, default_folder, prepare, quiet_third_parties, read_config
from vigor.disk import REFUSALS, FullError, free_below, naming, refuse_full
from vigor.launch import Launch, launch, read_launch, wants_launch
from vigor.terminal import printable, refuse

if TYPE_CHECKING:
    from vigor.runfolder import RunFolder


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
    except (FullError, LockedError, RunFolderError) as error:  # taken by another run since it was found free
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
        if error.errno not in REFUSALS:
            raise
        status = _stopped(_unwritten(error, job.folder))
    leave_process_group()
    return status


def preflight(asked: Launch) -> int:
    """What one of so many processes would refuse before it loads the model; prints the plan of a dry run.

    Changes `VigorConfig.planned_processes`: for a process that does nothing else. Returns the exit status, 0 or 2.
    """
    try:
        argv, config = read_config(asked.argv)
        from vigor.config import VigorConfig
        from vigor.demands import check_even
        from vigor.rewards.base import Reward

        quiet_third_parties()
        VigorConfig.planned_processes = asked.processes
        job = prepare(argv, config)
        if asked.shards and job.args.device.type == "cpu":
            raise ValueError(
                f"--accelerate_config {asked.config.stem} shards parameters with FSDP, which accelerate does on "
                "accelerators only; on CPUs each process would silently hold them all. Use multi_gpu."
            )
        if asked.zero_stage == 3:
            check_even(reward for reward in job.rewards if isinstance(reward, Reward))
        if asked.zero_stage and asked.precision in ("bf16", "fp16") and not (job.args.bf16 or job.args.fp16):
            raise ValueError(
                f"--accelerate_config {asked.config.stem} has DeepSpeed compute in {asked.precision}, the run is one "
                f"in float32. Add --mixed_precision no, or --{asked.precision} true."
            )
    except (OSError, ValueError) as error:
        return refuse("train", error)
    if job.run.dry_run:
        print(printable(plan(job)))
    return 0


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
    weights = dict(zip(map(reward_name, job.rewards), job.args.reward_weights, strict=True))
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
        refuse_full(folder.path, *_least_bytes(job, trainer))
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
    _save_model(trainer, folder.path / "model")
    after = _lab_scores(job, trainer, "after") if main else {}
    if main:
        folder.write_json("results.json", {"before": before, "after": after})
        write_report(folder)
        print_results(folder)
    trainer.accelerator.wait_for_everyone()
    return 0


def _least_bytes(job: Job, trainer: Any) -> tuple[int, str]:
    """Bytes that are certainly written, and what they are: the trained weights once, and once more in a checkpoint."""
    from vigor.gradnorm.partitioned import whole_shape

    adapter = job.model_args.use_peft
    weights = [p for p in trainer.model.parameters() if p.requires_grad or not adapter]
    size = sum(whole_shape(p).numel() * p.element_size() for p in weights)
    if job.checkpoint is None and job.args.save_strategy != "no":
        return 2 * size, "model/ and one checkpoint"
    return size, "the weights in model/"


def _save_model(trainer: Any, place: Path) -> None:
    """Writes the trained model, all processes together; it gets its name when it is whole.

    Raises OSError.
    """
    written, main = place.with_name(f".{place.name}"), trainer.accelerator.is_main_process
    push, trainer.args.push_to_hub = trainer.args.push_to_hub, False  # not under this name
    with naming(written):
        try:
            if main:
                shutil.rmtree(written, ignore_errors=True)
            trainer.accelerator.wait_for_everyone()
            trainer.save_model(str(written))
            trainer.accelerator.wait_for_everyone()
            if main:
                sync_tree(written)
                shutil.rmtree(place, ignore_errors=True)
                os.rename(written, place)
        except Exception:
            shutil.rmtree(written, ignore_errors=True)
            raise
    trainer.args.push_to_hub = push
    if push:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


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
    if trainer.is_fsdp_enabled or trainer.is_zero3:
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


def _named(argv: Sequence[str]) -> list[str]:
    """The arguments with a run folder that all processes will agree on."""
    rest, config = read_config(argv)
    if "output_dir" in config or any(arg.split("=")[0] == "--output_dir" for arg in rest):
        return list(argv)
    if (machines := read_launch(rest).machines) > 1:
        raise ValueError(f"--num_machines {machines}: name with --output_dir one folder that all of them see.")
    return [*argv, "--output_dir", default_folder(config)]


def _lost_another(error: RuntimeError) -> bool:
    """Whether the connection to another process broke: torch has a type for NCCL's errors, and none for gloo's."""
    from torch.distributed import DistError

    broken = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, DistError) or any(text in str(error) for text in broken)


def _unwritten(error: OSError, folder: RunFolder) -> str:
    """What could not be written, why, and how to go on."""
    whole, _ = folder.last_checkpoint(hashes=False)
    if whole is None:
        again = f"start again, with another --output_dir or without {folder.path}: no checkpoint is whole yet"
    else:
        again = f"continue with --resume, from {whole.name}"
    path = error.filename or "a file that the error does not name"
    free = f" ({free_below(path)})" if os.sep in path else ""
    return f"{path} cannot be written: {error.strerror}{free}. Make space there, and {again}."


def _stopped(error: object) -> int:
    refuse("train", error)
    return 1
