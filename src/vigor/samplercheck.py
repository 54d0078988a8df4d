"""After each push of weights: does the sampler sample from the policy that is trained?

vLLM holds a copy of the policy. If an update does not reach it, or it samples from another model or distribution, the
run trains on completions that its policy did not write, and no reward or loss says so. But the sampler reports the
log-probability of each token it drew, and the trainer can compute the same number under the current policy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ROWS = 4
"""Completions a process that are scored for the check where the importance correction has not scored all of them."""


class SamplerMismatchError(FloatingPointError):
    """The sampler's log-probabilities are not those of the policy."""


def differences(sampler_BT: Tensor, policy_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """|log q - log p| in nats of the counted tokens that the sampler has scored (N,), float32.

    Args:
        sampler_BT: the sampler's log q of the tokens it drew; NaN where it has none.
        policy_BT: the trainer's log p of the same tokens.
        counted_BT: 1 on the tokens that the policy wrote; any dtype.
    """
    known = counted_BT.bool() & ~sampler_BT.isnan()
    return (sampler_BT.float() - policy_BT.float())[known].abs()


def check_continuous_batching(trainer: Any) -> None:
    """Refuses a setting that would round the trained weights for good.

    Raises:
        ValueError: transformers' continuous batching under mixed precision with weights of a wider type.
    """
    args = trainer.args
    if not args.use_transformers_continuous_batching or not (args.bf16 or args.fp16):
        return
    half = torch.bfloat16 if args.bf16 else torch.float16
    kinds = {p.dtype for p in trainer.model.parameters() if p.requires_grad and p.is_floating_point()}
    if wider := sorted(str(kind).removeprefix("torch.") for kind in kinds - {half}):
        name = str(half).removeprefix("torch.")
        raise ValueError(
            f"use_transformers_continuous_batching with {'bf16' if args.bf16 else 'fp16'}=True: TRL casts the trained "
            f"weights, which are {', '.join(wider)}, to {name} before each generation, and they stay so; updates of "
            f"learning_rate={args.learning_rate:g} would mostly be rounded away. Load them so on purpose (dtype="
            f"{name}), set {'bf16' if args.bf16 else 'fp16'}=False, or sample with use_vllm or plain generation."
        )


def check_sampler(trainer: Any, output: dict[str, Any]) -> None:
    """Stops the run if sampler and trainer disagree on a batch that was just sampled; in all processes alike.

    Args:
        trainer: a `VigorTrainer`; without vLLM, or with `max_sampler_mismatch` infinite, nothing is computed.
        output: of TRL's `_generate_and_score_completions`.

    Raises:
        SamplerMismatchError: their log-probabilities differ by more than `VigorConfig.max_sampler_mismatch` nats on
            average over all processes' compared tokens, or the sampler reported none.
    """
    allowed: float = trainer.args.max_sampler_mismatch
    if not trainer.use_vllm or math.isinf(allowed):
        return
    counted_BT = output["completion_mask"]
    if "tool_mask" in output:  # what a tool wrote was not sampled
        counted_BT = counted_BT * output["tool_mask"]
    policy_BT = output.get("old_per_token_logps")
    if policy_BT is None:
        policy_BT = _policy_logps(trainer, output)
    rows = len(policy_BT)
    off = differences(output["sampling_per_token_logps"][:rows], policy_BT, counted_BT[:rows])
    largest = off.max() if len(off) else off.new_zeros(())
    local = torch.stack([off.sum(), off.new_tensor(len(off)), counted_BT[:rows].sum().to(off), largest])
    totals = trainer.accelerator.gather(local[None])
    tokens, counted, worst = int(totals[:, 1].sum()), int(totals[:, 2].sum()), float(totals[:, 3].max())
    if not counted:
        return
    mean = float(totals[:, 0].sum()) / tokens if tokens else math.nan
    if trainer.model.training:
        trainer.record("sampling/mismatch", mean)
    if not mean <= allowed:
        raise SamplerMismatchError(_complaint(trainer.state.global_step + 1, mean, worst, tokens, allowed))


def _policy_logps(trainer: Any, output: dict[str, Any]) -> Tensor:
    """log p (R, T) of the first completions under the current policy: one forward pass without gradients."""
    first = {name: output[name][:ROWS] for name in ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")}
    ids = torch.cat([first["prompt_ids"], first["completion_ids"]], dim=1)
    mask = torch.cat([first["prompt_mask"], first["completion_mask"]], dim=1)
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, first["completion_ids"].shape[1]
        )
    return logps


def _complaint(step: int, mean: float, worst: float, tokens: int, allowed: float) -> str:
    if not tokens:
        found = "vLLM reported no log-probability of any token that it sampled"
    else:
        found = (
            f"vLLM's log-probabilities of the tokens that it sampled differ from the policy's by {mean:.3g} nats on "
            f"average ({tokens:,} tokens; the largest by {worst:.3g}), allowed are {allowed:g}"
        )
    return (
        f"step {step}: {found}. Most often the last update did not reach vLLM, or vLLM serves another model than "
        "--model_name_or_path, or it reports log-probabilities before the temperature (start the server with "
        "--logprobs-mode processed_logprobs). Restart vLLM and continue with --resume. Where rounding alone explains "
        "it (experts, quantised weights), raise --max_sampler_mismatch; inf turns the check off."
    )
