"""Whether, and how, a run takes its update from the pass that scores it: keep, retain or off, and why.

The ladder: "keep" (one forward, one backward) where every token of a row has one weight in the loss and the memory
suffices; "retain" (one forward, two backwards) where tokens are weighted one by one, or keeping would not fit; else
"off" (a forward and a backward for the norms, then TRL's own update).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from vigor.gradnorm.fused import Fused, FusedNorms
from vigor.gradnorm.head import replaced_forward
from vigor.gradnorm.memory import FusedBytes, fused_bytes
from vigor.rewards.base import Reward
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

FUSED_ROW = "fused_row"
"""Key of a training batch: each row's place in the batch that was scored."""
SHARE = 0.5
"""Of the free memory, what may be held between the norms and the update."""
ONE_WEIGHT = ("grpo", "bnpo", "dr_grpo", "dapo")
"""Losses that, on the first update after sampling, weigh all tokens of a row alike."""


@dataclass(frozen=True)
class Rung:
    """A decision: "keep", "retain" or "off", and its reason."""

    mode: str
    reason: str

    def __str__(self) -> str:
        return f"fused update: {self.mode} ({self.reason})"


def obstacle(trainer: Any, rewards: list[Reward]) -> str | None:
    """Why this run cannot take its update from the scoring pass at all; None if it can."""
    args = trainer.args
    if not any("full_norm" in reward.needs for reward in rewards):
        return "no reward takes the gradient norm over all trainable parameters at the policy's temperature"
    if trainer.adding:
        name = next(iter(trainer.adding.values())).name
        return f"reward {name!r} adds a term to the loss, which has a forward pass of its own"
    if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations):
        return (
            f"completions are trained on for more than one optimizer step (steps_per_generation="
            f"{args.steps_per_generation} × num_iterations={args.num_iterations}, gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}), so that the weights differ from those that were scored"
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "FSDP and DeepSpeed reduce gradients in a backward pass of their own"
    if args.n_gpu > 1:
        return "DataParallel replicates the model in each forward pass"
    if rate := max((m.p for m in trainer.model.modules() if isinstance(m, nn.Dropout)), default=0.0):
        return f"the update would train without the model's dropout of {rate:g}; set disable_dropout=True if it may"
    if trainer.aux_loss_enabled:
        return "the loss has the experts' load-balancing term; set router_aux_loss_coef=0 to do without"
    if vars(trainer).get("_entropy_bonus_enabled"):  # since TRL 1.15
        return "the loss has an entropy bonus"
    if args.use_liger_kernel:
        return "use_liger_kernel=True computes the loss in a kernel of its own"
    if args.cast_lm_head_to_fp32:
        return "cast_lm_head_to_fp32 changes the head for the update only"
    return None


def token_weights(trainer: Any) -> str | None:
    """Why tokens of one row have different weights in the loss; None if they do not."""
    args = trainer.args
    if trainer.beta:
        return f"beta={trainer.beta:g} weighs tokens by their KL term"
    if args.loss_type not in ONE_WEIGHT:
        return f"loss_type={args.loss_type!r} weighs tokens one by one"
    if trainer.top_entropy_quantile < 1:
        return f"top_entropy_quantile={trainer.top_entropy_quantile:g} leaves tokens out"
    if args.use_vllm and args.vllm_importance_sampling_correction:
        return "vLLM's log-probabilities correct tokens one by one"
    return None


def decide(asked: str, blocked: str | None, tokenwise: str | None, needed: FusedBytes, free: int) -> Rung:
    """The rung for a batch.

    Args:
        asked: `VigorConfig.fused`.
        blocked: see `obstacle`.
        tokenwise: see `token_weights`.
        needed: what the batch would hold.
        free: bytes of free memory.
    """
    if asked == "off":
        return Rung("off", "as configured")
    if blocked is not None:
        return Rung("off", blocked)
    if asked != "auto":
        return Rung(asked, "as configured")
    budget = int(SHARE * free)
    room = f"{_size(free)} free"
    if tokenwise is None and needed.keep <= budget:
        return Rung("keep", f"one forward and one backward a step; holds about {_size(needed.keep)}, {room}")
    why = tokenwise or f"to keep it takes about {_size(needed.keep)}"
    if needed.retain <= budget:
        return Rung("retain", f"{why}; the graph is kept, about {_size(needed.retain)}, {room}")
    return Rung("off", f"{why}, and the graph about {_size(needed.retain)}, with {room}: smaller batches would fit")


def check(asked: str, blocked: str | None, tokenwise: str | None) -> None:
    """Raises ValueError if what was asked for by name cannot be."""
    if asked in ("keep", "retain") and blocked is not None:
        raise ValueError(f"fused={asked!r}: {blocked}. Set fused='auto' or 'off'.")
    if asked == "keep" and tokenwise is not None:
        raise ValueError(f"fused='keep' needs one weight a row: {tokenwise}. Set fused='auto' or 'retain'.")


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, what PyTorch has reserved and does not use included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


class Fusion:
    """A trainer's side of it: decides for each scored batch, holds what its pass left, and delivers that to the loss.

    Raises:
        ValueError: `fused` asks by name for what this run cannot have.
    """

    def __init__(self, trainer: Any, rewards: list[Reward]) -> None:
        self.trainer = trainer
        self.asked: str = trainer.args.fused
        self.blocked, self.tokenwise = obstacle(trainer, rewards), token_weights(trainer)
        check(self.asked, self.blocked, self.tokenwise)
        self.rung: Rung | None = None
        self.rows: Tensor | None = None
        """Rows of the batch whose loss is being computed; None where the loss is TRL's own affair."""
        self._fused: FusedNorms | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What the loss asks of the scoring pass: TRL logs the entropy of every batch."""
        fuses = self.asked != "off" and self.blocked is None
        return frozenset({"entropy"}) if fuses else frozenset()

    def mode_for(self, rollouts: Rollouts) -> Fused | None:
        """The mode of this batch's scoring pass; says so where it is another than before."""
        if self.blocked is not None or self.asked == "off":
            rung = Rung("off", self.blocked or "as configured")
        else:
            accelerator = self.trainer.accelerator
            model = accelerator.unwrap_model(self.trainer.model)
            mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
            dtype = mixed.get(accelerator.mixed_precision, next(model.parameters()).dtype)
            lengths_B = rollouts.attention_mask_BL.bool().sum(1)
            needed = fused_bytes(model, lengths_B, rollouts.lengths_B, dtype=dtype)
            rung = decide(self.asked, self.blocked, self.tokenwise, needed, free_bytes(accelerator.device))
        if self.rung is None or rung.mode != self.rung.mode:
            self.trainer.say(str(rung))
        self.rung = rung
        return None if rung.mode == "off" else rung.mode  # type: ignore[return-value]

    def take(self, policy: PolicyPass, prompt_ids: list[list[int]]) -> None:
        """Keeps what a scored batch's pass left."""
        self._fused = policy.fused
        if policy.fuse is not None and policy.fused is None:
            self.blocked = "the model cannot be scored so"
        if policy.fused is not None:
            self._starts = torch.tensor([len(ids) for ids in prompt_ids], device=policy.fused.logps_BL.device)
            self._entropy_BL = policy.token_stats("entropy").entropy_BL

    @property
    def ready(self) -> bool:
        """Whether the last scored batch can give its update."""
        return self._fused is not None

    def deliver(self, model: nn.Module, tokens: int) -> tuple[Tensor, Tensor, None]:
        """(R, tokens) log-probabilities and entropies of the completions of `rows`, as TRL's loss wants them."""
        assert self.rows is not None and self._fused is not None
        rows, fused = self.rows, self._fused
        self.rows = None

        def logps(*_: Any, **__: Any) -> Tensor:
            return fused.token_logps(rows.tolist())

        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:  # DDP reduces the gradients of a forward pass that it has seen begin
            fused.zeros = True
            with replaced_forward(accelerator.unwrap_model(model), logps):
                logps_RL = model(input_ids=rows)
        else:
            logps_RL = logps()
        length = logps_RL.shape[1]
        at_RT = self._starts[rows, None] + torch.arange(tokens, device=rows.device)
        at_RT = at_RT.clamp(max=length - 1)  # beyond a row's end, where nothing is counted
        return logps_RL.gather(1, at_RT), self._entropy_BL[rows].gather(1, at_RT), None
