"""The trainer's side of checkpoints: what is saved beside the engine's own state, and how a run takes it up again.

The engine saves weights, optimizer, scheduler, the random generators of every process, and its counters. Here: the
rollouts that an optimizer step has not used up, what has been measured since the last log, the prompt order of later
epochs, the guard's count, and the settings without which all of this is meaningless.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import IntervalStrategy, TrainerCallback

from vigor import __version__, checkpoint
from vigor.checkpoint import CheckpointError
from vigor.disk import free_below, naming
from vigor.statedicts import refuse_code, weights_of

FIXED = (
    "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_generations",
    "num_iterations", "shuffle_dataset", "optim", "max_completion_length", "loss_type",
)  # fmt: skip
"""Settings that a resumed run must share with the one that wrote the checkpoint."""

PROMPTS_COMPARED = 2000
"""Prompts, evenly spaced in the data set, whose text tells whether it is still the same."""


class Checkpoints(TrainerCallback):
    """Writes a trainer's checkpoints so that each is whole or not there, and finds the one to resume from."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.writing = False
        self._loaded: dict[str, Any] | None = None
        self._fused: str | None = None
        self._hash: str | None = None

    def folder(self, root: str) -> str:
        """Where the engine puts what it writes: aside, while a checkpoint is in the making."""
        return os.path.join(root, checkpoint.WRITING) if self.writing else root

    # Saving

    def save(self, root: str, write: Callable[[], None]) -> None:
        """Writes the checkpoint of this step, all processes together, and deletes those past `save_total_limit`.

        Args:
            root: the folder of the checkpoints.
            write: writes `checkpoint-N` into `folder(root)`, in every process.

        Raises:
            CheckpointError: it could not be written; the checkpoints before it are as they were.
        """
        trainer, state, place = self.trainer, self.trainer.state, Path(root)
        name = f"checkpoint-{state.global_step}"
        commits = trainer.args.should_save
        try:
            with naming(place / checkpoint.WRITING / name):
                if commits:
                    place.mkdir(parents=True, exist_ok=True)
                    checkpoint.clear(place)
                trainer.accelerator.wait_for_everyone()
                self.writing = True
                write()
                written = Path(self.folder(root)) / name
                # The engine saw the folder beside its place.
                if commits and state.best_global_step == state.global_step:
                    state.best_model_checkpoint = str(place / name)
                    state.save_to_json(str(written / "trainer_state.json"))
                # Writers rename files of their own, and a walk must not miss one.
                trainer.accelerator.wait_for_everyone()
                checkpoint.sync_tree(written)
                trainer.accelerator.wait_for_everyone()
                if commits:
                    checkpoint.commit(place, name, self._about())
                    self._rotate(place)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            raise self._failed(place, error) from error
        finally:
            self.writing = False
        trainer.accelerator.wait_for_everyone()

    def _rotate(self, place: Path) -> None:
        """Deletes older checkpoints; that one cannot be deleted is no failure of the new one: it goes with the next."""
        best = self.trainer.state.best_model_checkpoint
        try:
            checkpoint.rotate(place, self.trainer.args.save_total_limit, None if best is None else Path(best).name)
        except OSError as error:
            self.trainer.say(f"An older checkpoint could not be deleted: {error}. The next one tries again.")

    def _about(self) -> dict[str, Any]:
        return {
            "step": self.trainer.state.global_step,
            "processes": self.trainer.accelerator.num_processes,
            "settings": self._settings(),
            "vigor": __version__,
        }

    def _settings(self) -> dict[str, Any]:
        data = self.trainer.train_dataset
        args = {name: getattr(self.trainer.args, name) for name in FIXED}
        args = {name: value if isinstance(value, int | str) else str(value) for name, value in args.items()}
        args["EMA teacher"] = self.trainer._teacher is not None
        if self.trainer.state_dicts is not None:
            args["FSDP"] = self.trainer.state_dicts
        if isinstance(data, Dataset):
            args["number of prompts"] = len(data)
            args["prompts (hash)"] = self._hash_of_prompts(data)
        return args

    def _hash_of_prompts(self, data: Dataset) -> str:
        if self._hash is None:
            some = data.select(range(0, len(data), len(data) // PROMPTS_COMPARED + 1))
            self._hash = hashlib.sha256(repr(list(some["prompt"])).encode()).hexdigest()[:16]
        return self._hash

    def _failed(self, place: Path, error: BaseException) -> CheckpointError:
        if isinstance(error, CheckpointException) and error.failures:  # of every process, with tracebacks
            error = next(iter(error.failures.values()))[0]
        if self.trainer.args.should_save:
            checkpoint.discard(place, f"checkpoint-{self.trainer.state.global_step}")
        before = [path.name for path in place.glob("checkpoint-*") if checkpoint.fault(path, hashes=False) is None]
        kept = ", ".join(sorted(before)) or "none"
        again = "continue with --resume" if before else "start again with a new --output_dir"
        return CheckpointError(
            f"the checkpoint of step {self.trainer.state.global_step} could not be written to {place} "
            f"({free_below(place)}): {error}. Whole before it: {kept}. Make space, or keep fewer with "
            f"--save_total_limit, and {again}."
        )

    # Resuming

    def verified(self, root: str, asked: str | bool | None) -> str | None:
        """The path of a whole checkpoint that fits this run.

        Args:
            root: the folder of the checkpoints.
            asked: as `Trainer.train` takes it: a path, True for the newest, None or False for none.

        Raises:
            CheckpointError: it is not whole, there is none, or it was written with other settings or processes.
        """
        if not asked:
            return None
        answer: list[Any] = [None, None]
        if self.trainer.args.should_save:  # one process reads, all of them hear
            try:
                path, rejected = find(Path(root)) if asked is True else (named(Path(asked)), [])
                self._refuse_others(path)
                refuse_code(path)
                for each in rejected:
                    self.trainer.say(str(each))
                answer = [str(path), None]
            except CheckpointError as error:
                answer = [None, str(error)]
        if self.trainer.accelerator.num_processes > 1:
            broadcast_object_list(answer)
        if answer[1] is not None:
            raise CheckpointError(answer[1])
        return str(answer[0])

    def _refuse_others(self, path: Path) -> None:
        about, now = checkpoint.about(path), self._about()
        refuse_processes(path, about, now["processes"])
        changed = differences(about["settings"], now["settings"])
        if changed:
            raise CheckpointError(
                f"{path} was written with other settings: {', '.join(changed)}. Its place in the prompts and its "
                "optimizer state would be those of another run. Set them back; or start a new run from its weights, "
                f"with {weights_of(path, 'model_name_or_path=')}."
            )

    # What the engine does not save

    def write_state(self, folder: str) -> None:
        """Writes this process's part of a checkpoint."""
        os.makedirs(folder, exist_ok=True)
        torch.save(capture(self.trainer), self._file(folder))

    def read_state(self, folder: str) -> None:
        """Reads this process's part of a checkpoint; `on_train_begin` puts it in place."""
        self._loaded = torch.load(self._file(folder), map_location="cpu", weights_only=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Runs after the engine has set its own counters."""
        if self._loaded is None:
            return
        restore(self.trainer, self._loaded)
        self._fused, self._loaded = self._loaded["fused"], None
        # Each epoch draws its order from one generator; the engine skips whole epochs without drawing.
        for _epoch in range(int(state.epoch or 0) if self.trainer.sampler is not None else 0):
            next(iter(self.trainer.sampler), None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Has the last step logged, before its checkpoint rather than after; and says once if the update is computed in
        another way than before, which rounds differently."""
        if state.global_step >= state.max_steps and args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log = True
        rung = self.trainer._fusion.rung
        if self._fused is not None and rung is not None and rung.mode != self._fused:
            self.trainer.say(
                f"fused update: {rung.mode}, where the run before the checkpoint had {self._fused}: the same training, "
                f"though not bit for bit. fused={self._fused!r} keeps it."
            )
        self._fused = None

    def _file(self, folder: str) -> str:
        return os.path.join(folder, f"vigor_state_{self.trainer.accelerator.process_index}.pt")


def capture(trainer: Any) -> dict[str, Any]:
    """What of a trainer's state the engine does not save, in types that torch.load takes with weights_only."""
    unused = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0
    return {
        "micro_step": trainer._step,
        "rollouts": [portable(batch) for batch in trainer._buffered_inputs] if unused else None,
        "table": _plain(_without_images(trainer._logs)) if unused else None,
        "metrics": _plain(trainer._metrics["train"]),
        "loss": {
            "since_log": trainer._tr_loss.detach().cpu(),
            "logged_step": trainer._globalstep_last_logged,
        },
        "guard": trainer._guard.state_dict(),
        "fused": None if trainer._fusion.rung is None else trainer._fusion.rung.mode,
    }


def restore(trainer: Any, state: dict[str, Any]) -> None:
    """Puts back what `capture` took."""
    trainer._step = state["micro_step"]
    if state["rollouts"] is not None:
        device = trainer.accelerator.device
        trainer._buffered_inputs = [
            {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
            for batch in state["rollouts"]
        ]
    if state["table"] is not None:
        for key, value in state["table"].items():
            if isinstance(value, dict):
                for name, column in value.items():
                    trainer._logs[key][name].extend(column)
            else:
                trainer._logs[key].extend(value)
    for name, values in state["metrics"].items():
        trainer._metrics["train"][name].extend(values)
    trainer._tr_loss = state["loss"]["since_log"].to(trainer.accelerator.device)
    trainer._globalstep_last_logged = state["loss"]["logged_step"]
    trainer._guard.load_state_dict(state["guard"])


def find(root: Path) -> tuple[Path, list[checkpoint.Rejected]]:
    """The newest whole checkpoint and what was passed over; CheckpointError if there is none."""
    path, rejected = checkpoint.newest(root)
    if path is None:
        listed = "".join(f"\n  {each}" for each in rejected)
        raise CheckpointError(f"{root} holds no checkpoint to resume from.{listed}")
    return path, rejected


def named(path: Path) -> Path:
    """The path itself; CheckpointError if it is no whole checkpoint."""
    if why := checkpoint.fault(path):
        raise CheckpointError(f"{path} cannot be resumed from: {why}. Name another, or True for the newest whole one.")
    return path


def refuse_processes(path: Path, about: dict[str, Any], processes: int) -> None:
    """Raises CheckpointError if a checkpoint is of another number of processes."""
    if about["processes"] != processes:
        raise CheckpointError(
            f"{path} was written by {about['processes']} processes, this run has {processes}: each has random "
            "generators, rollouts and a share of the prompts of its own, so that the run would be another one. Resume "
            f"with {about['processes']} processes; or start a new run from its weights, with "
            f"{weights_of(path, '--model_name_or_path ')}."
        )


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """ "name: old → new" of each setting that differs."""
    names = [*before, *(name for name in now if name not in before)]
    return [f"{n}: {before.get(n)!r} → {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]


def portable(batch: dict[str, Any]) -> dict[str, Any]:
    """A training batch on the CPU, in types that torch.load takes with weights_only."""
    return {key: value.cpu() if isinstance(value, torch.Tensor) else _plain(value) for key, value in batch.items()}


def _without_images(logs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in logs.items() if key != "images"}


def _plain(value: Any) -> Any:
    """The value in Python's own types; what has none, as its text."""
    if type(value) in (str, int, float, bool, type(None)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple) or hasattr(value, "maxlen"):
        return [_plain(each) for each in value]
    return str(value)
