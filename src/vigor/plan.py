"""What a run will do and need, from its settings alone: `vigor train --dry_run`."""

from __future__ import annotations

import math
from typing import Any

import torch

from vigor.planner.memory import Memory, Setup, Work, memory_of
from vigor.planner.model import read_model

_GIB = 2**30


def estimate_memory(model: str, args: Any, *, dtype: str | None, prompt_length: int, peft_config: Any = None) -> Memory:
    """Memory of one process that trains `model` under a `VigorConfig`, nothing sharded, without loading its weights.

    Args:
        model: name or folder; only its config.json is read.
        args: the `VigorConfig`.
        dtype: of the weights, such as "float32"; None or "auto" is taken as float32, as TRL does.
        prompt_length: tokens of the longest prompt.
        peft_config: adapter to attach, if any.

    Raises:
        OSError: the model's config cannot be read.
    """
    size = torch.empty((), dtype=getattr(torch, dtype if dtype not in (None, "auto") else "float32")).element_size()
    work = Work(
        prompts=args.generation_batch_size // args.num_generations,
        generations=args.num_generations,
        prompt_length=prompt_length,
        completion_length=args.max_completion_length,
        mean_length=args.max_completion_length,
        weight_bytes=size,
        compute_bytes=2 if args.bf16 or args.fp16 else size,
        beta=args.beta,
        iterations=args.num_iterations,
        loss_type=args.loss_type,
        fused=args.fused,
        correction=args.vllm_importance_sampling_correction,
    )
    setup = Setup(
        processes=1,
        rows=args.per_device_train_batch_size,
        accumulation=args.steps_per_generation,
        checkpointing=args.gradient_checkpointing,
        sampler=args.vllm_mode if args.use_vllm else "transformers",
        share=args.vllm_gpu_memory_utilization,
        sleep=args.vllm_enable_sleep_mode,
    )
    found = read_model(model, trust_remote_code=args.trust_remote_code, peft_config=peft_config)
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return memory_of(found, work, setup, device="cpu" if args.use_cpu else "cuda", gpu_memory=total)


def total_steps(args: Any, n_prompts: int) -> int:
    """Optimizer steps of the run: max_steps, or those of the epochs; what is left of a generation batch is dropped."""
    if args.max_steps > 0:
        return int(args.max_steps)
    generations = n_prompts // (args.generation_batch_size // args.num_generations)
    micro_steps = generations * args.steps_per_generation * args.num_iterations
    return math.ceil(math.ceil(micro_steps / args.gradient_accumulation_steps) * args.num_train_epochs)


def describe(args: Any, *, n_prompts: int, longest_prompt: int, rewards: dict[str, float], memory: Memory | str) -> str:
    """The plan as text: batch, steps, tokens, rewards, memory.

    Args:
        args: the `VigorConfig`.
        n_prompts: rows of the data set.
        longest_prompt: tokens of the longest prompt.
        rewards: weight of each reward.
        memory: the estimate, or why there is none.
    """
    per_generation = args.generation_batch_size // args.num_generations
    updates = args.steps_per_generation / args.gradient_accumulation_steps * args.num_iterations
    steps = total_steps(args, n_prompts)
    completions = math.ceil(steps / updates) * args.generation_batch_size
    epochs = steps / max(1, n_prompts // per_generation * updates)
    update = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    lines = [
        f"prompts       {n_prompts:,}; the longest has {longest_prompt} tokens",
        f"generation    {args.generation_batch_size} completions = {per_generation} prompts × {args.num_generations}, "
        f"at most {args.max_completion_length} tokens each, temperature {args.temperature:g}",
        f"batch         {args.world_size} processes × {args.per_device_train_batch_size} rows × "
        f"{args.gradient_accumulation_steps} accumulated = {update} completions an update",
        f"steps         {steps:,} optimizer steps ({epochs:.2f} epochs), {updates:g} per generation",
        f"tokens        at most {completions * args.max_completion_length:,} generated in {completions:,} completions",
        f"update        lr {args.learning_rate:g} {_name(args.lr_scheduler_type)}, β {args.beta:g}, "
        f"loss {args.loss_type}, truncated completions: {args.truncated}",
        "rewards       " + ", ".join(f"{name} × {weight:g}" + _watched(weight) for name, weight in rewards.items()),
    ]
    if isinstance(memory, str):
        return "\n".join([*lines, f"memory        unknown: {memory}"])
    parts = {**memory.resident, **memory.phases}
    fused = f"keep {_gib(memory.fused.keep)}, retain {_gib(memory.fused.retain)}"
    lines += [
        f"model         {memory.parameters:,} parameters, {memory.trainable:,} trainable",
        f"memory        about {_gib(memory.peak)} a process at the peak, most of it {memory.dominant} (an estimate: "
        "expect ±30 %)",
        *(f"              {_gib(amount):>10}  {name}" for name, amount in parts.items()),
        f"fused update  {args.fused}; of a whole batch it would hold: {fused}" * (args.fused != "off"),
    ]
    return "\n".join(line for line in lines if line)


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))


def _watched(weight: float) -> str:
    return " (watched only)" if weight == 0 else ""


def _gib(amount: int) -> str:
    return f"{amount / _GIB:.2f} GiB" if amount >= 0.1 * _GIB else f"{amount / 2**20:.1f} MiB"
