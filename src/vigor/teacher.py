"""The EMA teacher of a run: follows the policy after each optimizer step, and is saved and loaded with checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from vigor.ema import EMA, TeacherPlan
from vigor.rewards.base import TEACHER, Reward

FILE = "teacher.safetensors"


class Teacher(TrainerCallback):
    """An average of the policy's trainable weights, and when it moves."""

    def __init__(self, model: nn.Module, plan: TeacherPlan) -> None:
        """The teacher starts as the model, which must not be wrapped for distribution."""
        self.model = model
        self.plan = plan
        self.ema = EMA(model, device="cpu" if plan.on_cpu else None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the teacher by the rate of the step whose rollouts come next."""
        self.ema.update(self.model, self.plan.rate(state.global_step + 1, state.max_steps))

    def save(self, folder: str) -> None:
        """Writes the average, float32 or wider, into a checkpoint's folder."""
        save_file({name: tensor.contiguous() for name, tensor in self.ema.state_dict().items()}, _path(folder))

    def load(self, folder: str) -> None:
        """Takes the average of a checkpoint.

        Raises:
            FileNotFoundError: the checkpoint holds no teacher.
        """
        if not os.path.isfile(_path(folder)):
            raise FileNotFoundError(
                f"{folder} holds no {FILE}: the run that wrote it had no teacher. Resume with its own rewards."
            )
        self.ema.load_state_dict(load_file(_path(folder)))


def teacher_for(trainer: Any, ours: Sequence[Reward]) -> Teacher | None:
    """The teacher that a reward asks for, called after each optimizer step; None where no reward asks.

    Raises:
        ValueError: rewards ask for different ones, or the run cannot sample from one.
    """
    plans = {reward.teacher: reward.name for reward in ours if reward.teacher is not None}
    if not plans:
        return None
    names = ", ".join(plans.values())
    if len(plans) > 1:
        raise ValueError(f"rewards {names} ask for different teachers; a run has one. Give them the same settings.")
    if trainer.use_vllm or trainer.tools or trainer._is_vlm or trainer.is_fsdp_enabled or trainer.is_zero3:
        raise ValueError(
            f"reward {names!r} samples from a teacher by swapping the policy's weights, which this release does in "
            "one turn of text with whole parameters only: not with use_vllm, tools, images, FSDP or ZeRO-3."
        )
    if TEACHER in (trainer.train_dataset.column_names or []):
        raise ValueError(f"the data set has a column {TEACHER!r}, which reward {names!r} fills: rename the column.")
    teacher = Teacher(trainer.accelerator.unwrap_model(trainer.model), next(iter(plans)))
    trainer.add_callback(teacher)
    return teacher


def fork_generators(device: torch.device) -> Any:
    """A context that leaves the random generators of CPU and device as it found them."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _path(folder: str) -> str:
    return os.path.join(folder, FILE)
