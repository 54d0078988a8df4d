"""What a run will do and need, from its settings alone: `vigor train --dry_run`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one process, nothing sharded: what stays, and what each phase adds to it.

    Weights, gradients and optimizer state are counted; activations are a formula for decoder layers (8 hidden + 4
    feed-forward values a token and layer, or 1 hidden with gradient checkpointing). Fragmentation, CUDA's own memory
    and vLLM's share are not in it.
    """

    parameters: int
    trainable: int
    resident: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Resident bytes plus the largest phase."""
        return sum(self.resident.values()) + max(self.phases.values())

    @property
    def dominant(self) -> str:
        """The largest single part of the peak."""
        phase = max(self.phases, key=lambda name: self.phases[name])
        parts = {**self.resident, phase: self.phases[phase]}
        return max(parts, key=lambda name: parts[name])


def estimate_memory(model: str, args: Any, *, dtype: str | None, prompt_length: int, peft_config: Any = None) -> Memory:
    """Memory of one process that trains `model` under a `VigorConfig`, without loading its weights.

    Args:
        model: name or folder; only its config.json is read.
        args: the `VigorConfig`.
        dtype: of the weights, such as "float32"; None or "auto" is taken as float32, as TRL does.
        prompt_length: tokens of the longest prompt.
        peft_config: adapter to attach, if any.

    Raises:
        OSError: the model's config cannot be read.
    """
    config = AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
        if peft_config is not None:
            from peft import get_peft_model

            skeleton = get_peft_model(skeleton, peft_config)
    parameters = sum(p.numel() for p in skeleton.parameters())
    trainable = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    size = torch.empty((), dtype=getattr(torch, dtype if dtype not in (None, "auto") else "float32")).element_size()

    text = config.get_text_config()
    layers, hidden, vocabulary = text.num_hidden_layers, text.hidden_size, text.vocab_size
    heads = text.num_attention_heads
    kv = (getattr(text, "num_key_value_heads", None) or heads) * (getattr(text, "head_dim", None) or hidden // heads)
    feed_forward = getattr(text, "intermediate_size", None) or 4 * hidden
    length = prompt_length + args.max_completion_length
    rows = args.per_device_train_batch_size
    compute = 2 if args.bf16 or args.fp16 else size

    layer = (8 * hidden + 4 * feed_forward) * compute
    per_token = (layers * hidden * compute + layer) if args.gradient_checkpointing else layers * layer
    generated = rows * args.steps_per_generation
    resident = {"weights": parameters * size, "gradients": trainable * size, "optimizer (AdamW)": 2 * trainable * size}
    if args.beta > 0 and peft_config is None:
        resident["reference model"] = parameters * size
    phases = {
        "generation (KV cache)": generated * (length * layers * 2 * kv * compute + vocabulary * 4),
        "reward (one sequence's gradient, activations, logits)": trainable * size
        + length * (per_token + vocabulary * (compute + 8)),
        "update (activations)": rows * length * per_token,
    }
    if args.use_vllm:
        del phases["generation (KV cache)"]
    return Memory(parameters, trainable, resident, phases)


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
    lines += [
        f"model         {memory.parameters:,} parameters, {memory.trainable:,} trainable",
        f"memory        about {_gib(memory.peak)} a process at the peak, most of it {memory.dominant} (an estimate: "
        "expect ±30 %)",
        *(f"              {_gib(amount):>10}  {name}" for name, amount in parts.items()),
    ]
    return "\n".join(lines)


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))


def _watched(weight: float) -> str:
    return " (watched only)" if weight == 0 else ""


def _gib(amount: int) -> str:
    return f"{amount / _GIB:.2f} GiB" if amount >= 0.1 * _GIB else f"{amount / 2**20:.1f} MiB"
