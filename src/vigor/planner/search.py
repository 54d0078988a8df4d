"""The cheapest set-up that fits, found by trying all; and where none does, the smallest changes that would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from vigor.fusion import Rung
from vigor.planner.gpus import CUDA_BYTES, FRAGMENTED, GIB, Machine
from vigor.planner.memory import SHARDINGS, Memory, Setup, Work, kv_bytes, memory_of, rung_of
from vigor.planner.model import Model
from vigor.planner.times import Rates, Times, cache_room, times_of

ROWS = (1, 2, 4, 8, 16, 32)
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
GROUPS = (1, 2, 4, 8)
SAMPLERS = ("transformers", "colocate", "server")
ENOUGH = 4096
"""Tokens of a micro-batch at which matrix products run at full speed on a GPU."""
EQUAL = 0.03
"""Set-ups whose times differ by less are equally fast; the simplest of them is chosen."""
MOST_GPUS = 1024
SHORTEST = 256
"""Where the search for more GPUs and for shorter completions ends."""
_SIMPLE = {"none": 0, "ddp": 1, "fsdp2": 2, "zero2": 3, "zero1": 4, "zero3": 5}
"""FSDP2 comes with torch; DeepSpeed is one more dependency, and its stage 3 moves the most over the links."""


@dataclass(frozen=True)
class Plan:
    """A set-up with what it needs and takes."""

    model: Model
    work: Work
    setup: Setup
    memory: Memory
    times: Times
    rung: Rung
    """What the fused update would be, and why."""

    @property
    def needed(self) -> float:
        """GiB that a GPU must have for it."""
        return (self.memory.cautious + CUDA_BYTES) / (1 - FRAGMENTED) / GIB


def setups(model: Model, work: Work, machine: Machine, samplers: Iterable[str] = SAMPLERS) -> Iterator[Setup]:
    """All set-ups of the step on these GPUs: whole numbers of rows and micro-batches on every process."""
    for sampler in samplers:
        for base in _sampling(model, machine, sampler):
            total = work.prompts * work.generations
            if base.processes < 1 or total % base.processes:
                continue
            local = total // base.processes
            for rows in (rows for rows in ROWS if local % rows == 0):
                for sharding in SHARDINGS[1:] if base.processes > 1 else SHARDINGS[:1]:
                    for checkpointing in (False, True):
                        yield replace(
                            base,
                            rows=rows,
                            accumulation=local // rows,
                            sharding=sharding,
                            checkpointing=checkpointing,
                        )


def _sampling(model: Model, machine: Machine, sampler: str) -> Iterator[Setup]:
    base = Setup(machine.gpus, 1, 1, False, sampler=sampler)
    groups = [group for group in GROUPS if model.shape.heads % group == 0 and group <= machine.in_one]
    if sampler == "transformers":
        yield base
    elif sampler == "colocate":
        for group in (group for group in groups if machine.gpus % group == 0):
            for share in SHARES:
                for sleep in (False, True):
                    yield replace(base, tensor_parallel=group, share=share, sleep=sleep)
    else:
        # One engine: vLLM serves dense models without data parallelism. Where there are several machines, it has one to
        # itself, because accelerate starts as many processes on each of the others.
        for group in groups:
            taken = machine.in_one if machine.gpus > machine.in_one else group
            yield replace(base, processes=machine.gpus - taken, servers=group, tensor_parallel=group)


def evaluate(model: Model, work: Work, setup: Setup, machine: Machine, rates: Rates) -> Plan:
    """A set-up's memory and time."""
    memory = memory_of(model, work, setup, gpu_memory=int(machine.gpu.memory * GIB))
    free = machine.usable - sum(memory.resident.values())
    rung = rung_of(work, setup, memory, free)
    times = times_of(model, work, setup, machine, rates, rung=rung.mode)
    return Plan(model, work, setup, memory, times, rung)


def fits(plan: Plan, machine: Machine) -> bool:
    """Whether the GPUs suffice: for the training processes, and for one whole sequence in vLLM."""
    if plan.memory.cautious > machine.usable:
        return False
    if plan.setup.sampler == "transformers":
        return True
    room = cache_room(plan.model, plan.setup, machine)
    return room >= kv_bytes(plan.model.shape, plan.work.length, 2)


def all_plans(model: Model, work: Work, machine: Machine, rates: Rates, samplers: Iterable[str]) -> list[Plan]:
    """Every set-up that fits, the best first."""
    found = [evaluate(model, work, setup, machine, rates) for setup in setups(model, work, machine, samplers)]
    fitting = [plan for plan in found if fits(plan, machine)]
    if not fitting:
        return []
    least = min(plan.times.step for plan in fitting)
    return sorted(fitting, key=lambda plan: _order(plan, least))


def best_plan(
    model: Model, work: Work, machine: Machine, rates: Rates, samplers: Iterable[str] = SAMPLERS
) -> Plan | None:
    """The simplest of the fastest set-ups that fit; None if none does."""
    return next(iter(all_plans(model, work, machine, rates, samplers)), None)


def _order(plan: Plan, least: float) -> tuple[object, ...]:
    s = plan.setup
    slower = max(0.0, plan.times.step / least - 1 - EQUAL)
    simple = (_SIMPLE[s.sharding], SAMPLERS.index(s.sampler), s.tensor_parallel, s.sleep, s.checkpointing)
    full = s.rows * plan.work.length >= ENOUGH
    return (slower, *simple, not full, plan.memory.peak)


def remedies(
    model: Model,
    work: Work,
    machine: Machine,
    rates: Rates,
    samplers: Iterable[str] = SAMPLERS,
    *,
    adapters: Model | None = None,
) -> list[str]:
    """What would make it fit, each alone; the search for more GPUs ends at `MOST_GPUS`."""
    samplers = tuple(samplers)
    found = []
    if adapters is not None and best_plan(adapters, work, machine, rates, samplers):
        found.append(f"LoRA adapters of rank {adapters.rank} instead of all parameters (--peft always)")
    gpus = machine.gpus * 2
    while gpus <= MOST_GPUS:
        if best_plan(model, work, replace(machine, gpus=gpus), rates, samplers):
            found.append(f"{gpus} GPUs of this kind")
            break
        gpus *= 2
    for memory in (24, 40, 48, 80, 96, 140, 180, 192, 288):
        if memory > machine.gpu.memory:
            larger = replace(machine, gpu=replace(machine.gpu, memory=memory))
            if best_plan(model, work, larger, rates, samplers):
                found.append(f"GPUs of {memory} GiB instead of {machine.gpu.memory:g}")
                break
    shorter = work.completion_length // 2
    while shorter >= SHORTEST:
        less = replace(work, completion_length=shorter, mean_length=min(work.mean_length, shorter))
        if best_plan(model, less, machine, rates, samplers):
            found.append(f"--max_completion_length {shorter} instead of {work.completion_length}")
            break
        shorter //= 2
    return found


def least_needed(
    model: Model, work: Work, machine: Machine, rates: Rates, samplers: Iterable[str] = SAMPLERS
) -> Plan | None:
    """The set-up that needs the least memory a GPU; None if the batch cannot be split over the GPUs at all."""
    everything = (evaluate(model, work, setup, machine, rates) for setup in setups(model, work, machine, samplers))
    return min(everything, key=lambda plan: plan.memory.cautious, default=None)
