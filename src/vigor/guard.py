"""The guard before each optimizer step: loss, gradient norm and rewards must be finite in every process.

Where one is not, the update is left out before it touches a weight, and what led to it is written to
`dumps/step-N/`: the weights, the batches of every process, and dump.json. `vigor replay` computes it again from there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from vigor.checkpoint import write_durably
from vigor.disk import free_below, naming
from vigor.resume import portable

REPLAYED = (
    "loss_type", "beta", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "top_entropy_quantile",
    "temperature", "max_completion_length", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos",
    "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "use_bias_correction_kl", "off_policy_mask_threshold",
    "disable_dropout", "cast_lm_head_to_fp32", "bf16", "fp16", "use_cpu", "seed", "gradient_checkpointing",
)  # fmt: skip
"""Settings that the loss of a batch depends on."""


class NonFiniteError(FloatingPointError):
    """A loss, gradient norm or reward is NaN or infinite, and no more updates may be left out."""


class Guard:
    """A trainer's side of it: sees each batch and its loss, and decides before the optimizer steps.

    Raises:
        ValueError: updates may be left out under DeepSpeed, whose own optimizer cannot be held back.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.limit: int = trainer.args.max_skipped_updates
        self.skipped = 0
        """Updates left out so far in this run."""
        self._batches: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._of_rollouts: list[str] = []
        self._reasons: dict[str, None] = {}
        if self.limit < 0:
            raise ValueError(f"max_skipped_updates={self.limit}: give 0 (stop at the first) or a number of updates.")
        if self.limit and trainer.is_deepspeed_enabled:
            raise ValueError(
                f"max_skipped_updates={self.limit}: DeepSpeed updates the weights by itself, and no update can be left "
                "out. Set it to 0, which stops the run."
            )

    def new_rollouts(self) -> None:
        """What was wrong with the rewards of the rollouts before is past."""
        self._of_rollouts = []

    def reward_trouble(self, what: str) -> None:
        """The rewards of the current rollouts are not to be trained on."""
        self._of_rollouts.append(what)

    @property
    def troubled(self) -> bool:
        """Whether the current rollouts are not to be trained on."""
        return bool(self._of_rollouts)

    def saw(self, inputs: dict[str, Any], loss: Tensor) -> None:
        """A micro-batch and its loss, before its backward pass."""
        self._batches.append(inputs)
        self._losses.append(loss.detach())
        self._reasons.update(dict.fromkeys(self._of_rollouts))

    def before_update(self, model: nn.Module, grad_norm: Any) -> None:
        """Leaves this update out if it is not finite, in all processes alike.

        Raises:
            NonFiniteError: as many updates have been left out as `max_skipped_updates` allows.
        """
        losses = [float(loss) for loss in self._losses]
        norm = float(grad_norm) if grad_norm is not None else 0.0
        scaled = self.trainer.accelerator.scaler is not None
        reasons = [*self._reasons]
        if bad := [loss for loss in losses if not math.isfinite(loss)]:
            reasons.append(f"the loss is {bad[0]} in {len(bad)} of {len(losses)} micro-batches")
        if not math.isfinite(norm) and not scaled:  # fp16's scaler tries scales that overflow, and skips by itself
            reasons.append(f"the gradient norm is {norm}")
        if told := self._agree(reasons):
            self._leave_out(model, told, losses, norm, scaled)
        self._batches, self._losses, self._reasons = [], [], {}

    def _agree(self, reasons: list[str]) -> str:
        """The reasons of the first process that has any; "" where every process is content."""
        accelerator = self.trainer.accelerator
        text = "; ".join(reasons)
        if accelerator.num_processes == 1:
            return text
        first = torch.tensor([accelerator.process_index if reasons else accelerator.num_processes])
        source = int(accelerator.gather(first.to(accelerator.device)).min())
        if source == accelerator.num_processes:
            return ""
        told = [f"{text} (process {source} of {accelerator.num_processes})"]
        broadcast_object_list(told, from_process=source)
        return told[0]

    def _leave_out(self, model: nn.Module, why: str, losses: list[float], norm: float, scaled: bool) -> None:
        trainer, step = self.trainer, self.trainer.state.global_step + 1
        stops = self.skipped == self.limit
        message = f"step {step}: {why}. The weights are untouched."
        if self.skipped == 0 or stops:  # a dump holds the weights: the first and the last tell enough
            folder = Path(trainer.args.output_dir) / "dumps" / f"step-{step}"
            try:
                with naming(folder):
                    self._dump(folder, why, losses, norm)
                message += f" Weights and batch are in {folder}: `vigor replay {folder}` computes the step again."
            except OSError as error:
                shutil.rmtree(_writing(folder), ignore_errors=True)
                message += f" They could not be written to {error.filename} ({error.strerror}; {free_below(folder)})."
                stops = stops or trainer.accelerator.num_processes > 1  # others wait for this one within the dump
        if stops:
            left = f" {self.skipped} updates were left out before, as many as allowed." if self.limit else ""
            raise NonFiniteError(
                f"{message}{left} Most often the policy has diverged: lower learning_rate, or train in float32 or "
                "bfloat16 rather than float16. Where single batches are bad, max_skipped_updates leaves some out."
            )
        self.skipped += 1
        if not scaled:
            model.zero_grad(set_to_none=True)  # without gradients, torch's optimizers leave weight and state alone
        trainer.say(f"{message} This update is left out, {self.skipped} of at most {self.limit}.")

    def _dump(self, folder: Path, why: str, losses: list[float], norm: float) -> None:
        """Writes the dump, all processes together; it gets its name when it is whole."""
        trainer, writing = self.trainer, _writing(folder)
        accelerator = trainer.accelerator
        if trainer.args.should_save:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        accelerator.wait_for_everyone()
        trainer.save_model(str(writing / "model"), _internal_call=True)
        batch = {"batches": [portable(inputs) for inputs in self._batches], "losses": losses}
        torch.save(batch, writing / f"batch-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if trainer.args.should_save:
            about = {
                "step": trainer.state.global_step + 1,
                "why": why,
                "grad_norm": repr(norm),  # JSON has no NaN
                "processes": accelerator.num_processes,
                "settings": {name: value for name, value in vars(trainer.args).items() if name in REPLAYED},
                "steps_per_generation": trainer.args.steps_per_generation,
                "vllm_weights": bool(trainer.use_vllm and trainer.vllm_importance_sampling_correction),
                "base_model": trainer.accelerator.unwrap_model(trainer.model).config._name_or_path,
                "process_id": os.getpid(),
            }
            write_durably(writing / "dump.json", json.dumps(about, indent=2) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(writing, folder)
        accelerator.wait_for_everyone()

    def state_dict(self) -> dict[str, int]:
        """The count, for a checkpoint."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes a checkpoint's count."""
        self.skipped = state["skipped"]


def _writing(folder: Path) -> Path:
    """Where a dump lies until it is whole."""
    return folder.with_name(f".{folder.name}")
