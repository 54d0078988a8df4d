"""Seconds of a step, phase by phase: operations and bytes, counted, over rates that are assumed or measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from vigor.flops import Cost, adapter_cost, cost
from vigor.planner.gpus import GIB, Machine
from vigor.planner.memory import Setup, Work, kv_bytes, norm_tokens
from vigor.planner.model import Model


@dataclass(frozen=True)
class Rates:
    """What share of a data sheet's numbers is reached."""

    training: float
    """Of the operations, in a forward and backward pass of training."""
    norms: float
    """Of the operations, in the norms' pass."""
    bandwidth: float
    """Of the memory's bandwidth, while vLLM samples."""
    links: float
    """Of the links between GPUs."""
    token: float
    """Seconds that transformers' generate takes for a token of all sequences, at least, for each layer."""
    engine: float
    """Seconds that vLLM takes for a token of all sequences, at least."""
    group: float
    """Seconds that a tensor-parallel group takes longer for each layer's token, to exchange."""
    source: str
    """Where these come from."""


ASSUMED = Rates(0.4, 0.35, 0.6, 0.6, 1e-3, 5e-3, 3e-5, "assumed")
"""Of well-fed dense models on data-centre GPUs. The norms' pass runs at 0.87 to 0.92 of the plain pass's speed on a CPU
(docs/performance.md: floors over measured ratios)."""
PREFILL_SHARE = 0.8
"""Of vLLM's own memory beside the weights, what holds keys and values."""


@dataclass(frozen=True)
class Times:
    """Seconds of one optimizer step."""

    generation: float
    reward: float
    reference: float
    """Forward passes: of the reference model, and of the policy for the importance correction."""
    update: float
    communication: float
    """What computing does not hide, and pushing the weights to vLLM."""

    @property
    def step(self) -> float:
        """All phases, one after the other."""
        return self.generation + self.reward + self.reference + self.update + self.communication


@cache
def cost_of(model: Model, tokens: int) -> Cost:
    """Operations on one sequence, with adapters or without."""
    return adapter_cost(model.shape, tokens, model.rank) if model.rank else cost(model.shape, tokens)


def times_of(model: Model, work: Work, setup: Setup, machine: Machine, rates: Rates, *, rung: str = "off") -> Times:
    """The phases of one optimizer step.

    Args:
        rung: of the fused update: "keep", "retain" or "off".
    """
    rows = setup.rows * setup.accumulation
    T = max(1, round(work.prompt_length + work.mean_length))
    c = cost_of(model, T)
    peak = machine.gpu.tflops * 1e12
    again = c.forward if setup.checkpointing else 0.0  # the forward pass that checkpointing repeats
    if rung == "off":
        reward = rows * (c.norms + again) / (peak * rates.norms)
        update = rows * (c.plain + again) * work.iterations / (peak * rates.training)
    else:
        reward = rows * (c.norms + again) / (peak * rates.norms)
        whole = c.keep if rung == "keep" else c.retain + again
        update = rows * max(0.0, whole - c.norms) / (peak * rates.training)
    corrects = setup.sampler != "transformers" and work.correction
    passes = (work.beta > 0) + (corrects or work.iterations > 1)
    reference = rows * passes * c.forward / (peak * rates.training)
    exchange, waited = _exchange(model, work, setup, machine, rates)
    hidden = update + {"fsdp2": reward + reference, "zero3": reference}.get(setup.sharding, 0.0)
    push = 0.0
    if setup.sampler != "transformers":
        n = setup.processes if setup.sampler == "colocate" else machine.in_one + 1
        push = model.parameters * 2 / (machine.link(min(n, machine.gpus)) * rates.links)
    return Times(
        generation=generation_seconds(model, work, setup, machine, rates),
        reward=reward,
        reference=reference,
        update=update,
        communication=max(0.0, exchange - hidden / 2) + waited + push,
    )


def generation_seconds(model: Model, work: Work, setup: Setup, machine: Machine, rates: Rates) -> float:
    """Until the last sequence ends, which is taken to fill the budget; GPUs of a tensor-parallel group share the work.

    A token of all sequences takes what reading weights and cache takes, or the operations, whichever is longer.
    """
    s, c = model.shape, 2
    total = work.prompts * work.generations
    if setup.sampler == "transformers":
        ways, waves, group = setup.processes, 1, 1
        running = total / ways
        share = machine.gpu.bandwidth * 1e9 * rates.bandwidth
    else:
        group = setup.tensor_parallel
        ways = 1 if setup.sampler == "server" else setup.processes // group
        waves = math.ceil(total / ways / concurrent(model, work, setup, machine))
        running = total / ways / waves
        share = machine.gpu.bandwidth * 1e9 * rates.bandwidth * group
    context = work.prompt_length + work.mean_length / 2
    weights = model.parameters * c
    alive = work.mean_length / work.completion_length  # of the sequences of a wave, on average over its tokens
    cache = running * alive * kv_bytes(s, 1, c) * context
    operations = 2 * model.parameters * running * alive / (machine.gpu.tflops * 1e12 * rates.training * group)
    token = max((weights + cache) / share, operations, rates.engine) + rates.group * s.layers * (group > 1)
    once = 0.0
    if setup.sampler == "transformers":
        cache = running * kv_bytes(s, 1, c) * context  # finished sequences are padded until the last one ends
        token = max((weights + cache) / share, operations / alive, rates.token * s.layers)
        gathered = weights / (machine.link(setup.processes) * rates.links)
        if setup.sharding == "fsdp2":
            token += gathered  # anew for each token
        elif setup.sharding == "zero3":
            once = gathered  # by TRL, all weights (ds3_gather_for_generation)
    prefill = running * waves * 2 * model.parameters * work.prompt_length
    if setup.sampler != "transformers":
        prefill /= work.generations  # a prompt's cache is shared by its group
    computed = prefill / (machine.gpu.tflops * 1e12 * rates.training * group)
    return once + waves * work.completion_length * token + computed


def cache_room(model: Model, setup: Setup, machine: Machine) -> float:
    """Bytes for keys and values in one vLLM engine; negative where its weights do not fit."""
    share = 0.9 if setup.sampler == "server" else setup.share
    room = share * machine.gpu.memory * GIB * setup.tensor_parallel - model.parameters * 2
    return room * PREFILL_SHARE if room > 0 else room


def concurrent(model: Model, work: Work, setup: Setup, machine: Machine) -> float:
    """Sequences that one vLLM engine holds at a time."""
    context = work.prompt_length / work.generations + work.mean_length
    return max(1.0, cache_room(model, setup, machine) / (kv_bytes(model.shape, 1, 2) * context))


def _exchange(model: Model, work: Work, setup: Setup, machine: Machine, rates: Rates) -> tuple[float, float]:
    """Seconds of all gradient and weight traffic of a step: what computing may hide, and what it waits for."""
    n = setup.processes
    if n == 1:
        return 0.0, 0.0
    link = machine.link(n) * rates.links
    part = (n - 1) / n
    c = work.compute_bytes
    rounds = setup.accumulation * work.iterations
    if setup.sharding == "ddp":
        return 2 * part * model.trainable * work.weight_bytes / link, 0.0
    if setup.sharding in ("zero1", "zero2"):
        reductions = rounds if setup.sharding == "zero2" else 1
        return part * (reductions * model.trainable * c + model.parameters * c) / link, 0.0
    norm_rounds = math.ceil(setup.rows * setup.accumulation * work.length / _whole_rows(model, work, setup))
    training = part * 2 * rounds * model.parameters * c / link  # forward, and backward
    norms = part * 2 * norm_rounds * model.parameters * c / link
    reduced = part * model.trainable * c / link
    if setup.sharding == "zero3":  # each micro-batch is reduced; the norms' pass gathers a layer when it is wanted
        return training + rounds * reduced, norms
    return training + norms + reduced, 0.0


def _whole_rows(model: Model, work: Work, setup: Setup) -> int:
    """Tokens of a norms' micro-batch: whole rows, one at least."""
    tokens = norm_tokens(model, work, setup, device="cuda")
    return max(1, tokens // work.length) * work.length
