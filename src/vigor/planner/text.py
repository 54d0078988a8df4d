"""A plan in words, and as the flags of `vigor train`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vigor.planner.gpus import BETWEEN_MACHINES, CUDA_BYTES, FRAGMENTED, GIB, Machine
from vigor.planner.memory import CAUTION, Setup, Work
from vigor.planner.search import Plan
from vigor.planner.times import Rates

_SHARDED = {
    "none": "one process",
    "ddp": "DDP",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "fsdp2": "FSDP2",
}
_CONFIG = {"ddp": "multi_gpu", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}


def train_flags(plan: Plan, machine: Machine, dtype: str) -> list[str]:
    """What `vigor train` takes for this plan, beside prompts and rewards."""
    setup, work = plan.setup, plan.work
    flags: dict[str, object] = {"model_name_or_path": plan.model.name, "dtype": dtype}
    if setup.processes > 1:
        flags |= {"accelerate_config": _CONFIG[setup.sharding], "num_processes": setup.processes}
        if (machines := -(-setup.processes // machine.in_one)) > 1:
            flags["num_machines"] = machines
    flags |= {
        "num_generations": work.generations,
        "max_completion_length": work.completion_length,
        "per_device_train_batch_size": setup.rows,
        "gradient_accumulation_steps": setup.accumulation,
        "gradient_checkpointing": setup.checkpointing,
        "beta": work.beta,
        "num_iterations": work.iterations,
        "bf16": True,
    }
    if plan.model.rank:
        flags |= {"use_peft": True, "lora_r": plan.model.rank, "lora_target_modules": "all-linear"}
    if setup.sampler != "transformers":
        flags |= {"use_vllm": True, "vllm_mode": setup.sampler}
    if setup.sampler == "colocate":
        flags |= {
            "vllm_gpu_memory_utilization": setup.share,
            "vllm_tensor_parallel_size": setup.tensor_parallel,
            "vllm_enable_sleep_mode": setup.sleep,
            "vllm_max_model_length": work.length,
        }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def server_command(plan: Plan) -> str | None:
    """How to start the vLLM server, where there is one."""
    setup = plan.setup
    if setup.sampler != "server":
        return None
    return (
        f"VLLM_SERVER_DEV_MODE=1 vllm serve {plan.model.name} --tensor-parallel-size {setup.tensor_parallel} "
        f"--max-model-len {plan.work.length} "
        '--weight-transfer-config \'{"backend": "nccl"}\' --logprobs-mode processed_logprobs --max-logprobs -1'
    )


def described(setup: Setup) -> str:
    """A set-up in a line."""
    parts = [_SHARDED[setup.sharding] + (f" on {setup.processes} GPUs" if setup.processes > 1 else "")]
    if setup.sampler == "transformers":
        parts.append("sampling with transformers")
    elif setup.sampler == "colocate":
        asleep = ", asleep while the model trains" if setup.sleep else ""
        parts.append(f"vLLM beside it on {setup.share:.0%} of each GPU{asleep}{_grouped(setup)}")
    else:
        parts.append(f"vLLM on {setup.servers} other GPU{'s' * (setup.servers > 1)}")
    checkpointing = "gradient checkpointing" if setup.checkpointing else "no gradient checkpointing"
    return "; ".join([*parts, f"{setup.rows} rows × {setup.accumulation} micro-batches a process, {checkpointing}"])


def _grouped(setup: Setup) -> str:
    return f", {setup.tensor_parallel} GPUs a copy" if setup.tensor_parallel > 1 else ""


def report(plan: Plan, others: Sequence[Plan], counts: tuple[int, int], machine: Machine, rates: Rates) -> list[str]:
    """The chosen plan.

    Args:
        others: the best of each other kind, fitting or not.
        counts: set-ups that fit, and that were tried.
    """
    memory, times, work = plan.memory, plan.times, plan.work
    limit = machine.gpu.memory
    lines = [
        f"set-up        {described(plan.setup)}",
        f"why           the simplest of the fastest of {counts[0]} set-ups that fit, of {counts[1]} tried",
        *_why_not_fsdp2(plan, others, limit),
        f"memory        about {memory.peak / GIB:.1f} GiB a GPU; {plan.needed:.1f} of {limit:g} with what is assumed",
        *(
            f"              {size / GIB:>8.2f} GiB  {name}"
            for name, size in {**memory.resident, **memory.phases}.items()
        ),
        f"time          about {_seconds(times.step)} a step: generation {_seconds(times.generation)}, "
        f"reward {_seconds(times.reward)}, reference {_seconds(times.reference)}, update {_seconds(times.update)}, "
        f"communication {_seconds(times.communication)}",
        f"tokens        {work.prompts * work.generations * work.mean_length / times.step:,.0f} sampled a second; "
        f"{machine.gpus * times.step / 3600:.3g} GPU hours a step",
        f"fused update  {plan.rung.mode}: {plan.rung.reason}",
    ]
    if others:
        lines.append("otherwise")
        lines += [
            f"              {_seconds(other.times.step):>8}  {other.needed:6.1f} GiB  {described(other.setup)}"
            + ("" if other.needed <= limit else "   DOES NOT FIT")
            for other in others
        ]
    if plan.setup.sharding in ("none", "ddp") and work.weight_bytes == 2 and not plan.model.rank:
        lines.append(
            "note          weights of 16 bits without a float32 copy round small updates away: --dtype float32, FSDP2 "
            "and ZeRO keep one"
        )
    return [*lines, *sureness(rates)]


def _why_not_fsdp2(plan: Plan, others: Sequence[Plan], limit: float) -> list[str]:
    """Why DeepSpeed is worth installing, where ZeRO-3 was chosen: FSDP2 needs nothing more and leaves as little."""
    rivals = [other for other in others if other.setup.sharding == "fsdp2"]
    if plan.setup.sharding != "zero3" or not rivals:
        return []
    if fitting := [each for each in rivals if each.needed <= limit]:
        result = f"takes {_seconds(min(each.times.step for each in fitting))}"
    else:
        result = f"needs at least {min(each.needed for each in rivals):.1f} GiB"
    reason = (
        "it gathers all weights for each token that transformers samples, ZeRO-3 once"
        if plan.setup.sampler == "transformers"
        else "it holds whole gradients until the last micro-batch of a step, ZeRO-3 reduces them after each"
    )
    return [f"why ZeRO-3    FSDP2, which needs no DeepSpeed, {result}: {reason}"]


def sureness(rates: Rates) -> list[str]:
    """Which numbers are counted, which estimated, which assumed."""
    return [
        "how sure      counted: parameters; bytes of weights, gradients and optimizer; operations",
        "              estimated: activations, logits and caches, by formula; a set-up must fit with "
        f"{CAUTION - 1:.0%} more of them",
        f"              assumed: {CUDA_BYTES / GIB:g} GiB for CUDA and {FRAGMENTED:.0%} of a GPU lost to fragmentation;"
        f" {BETWEEN_MACHINES:g} GB/s a GPU between machines unless given",
        f"              rates {rates.source}: {rates.training:.3g} of a GPU's operations in training, "
        f"{rates.norms:.3g} for the norms, {rates.bandwidth:.3g} of its bandwidth in vLLM, {rates.links:.3g} of "
        "its links",
    ]


def as_json(plan: Plan, flags: Sequence[str], machine: Machine, rates: Rates) -> dict[str, Any]:
    """The plan's numbers: bytes and seconds."""
    return {
        "model": {"name": plan.model.name, "parameters": plan.model.parameters, "trainable": plan.model.trainable},
        "gpu": vars(machine.gpu),
        "gpus": machine.gpus,
        "work": vars(plan.work),
        "setup": vars(plan.setup),
        "memory": {"resident": plan.memory.resident, "phases": plan.memory.phases, "peak": plan.memory.peak},
        "gib_needed": plan.needed,
        "seconds": {**vars(plan.times), "step": plan.times.step},
        "fused": vars(plan.rung),
        "rates": vars(rates),
        "flags": list(flags),
        "server": server_command(plan),
    }


def work_line(work: Work, mean: str) -> str:
    """What a step is to do."""
    return (
        f"step          {work.prompts} prompts × {work.generations} completions; prompts of {work.prompt_length} "
        f"tokens, completions of at most {work.completion_length}, on average {work.mean_length:g} ({mean})"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"
