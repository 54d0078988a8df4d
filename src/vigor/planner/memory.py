"""Bytes on one process: what stays there, and what each phase of a step adds. One model of memory for all commands.

Weights, gradients and optimizer state follow from counts and types. Activations are a formula for decoder layers,
compared with measured peaks in tests/test_planner_memory.py: a layer saves, for each token, two norms' inputs and
outputs, queries, keys, values and what attention returns, and four feed-forward values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from vigor.flops import Shape, matrices
from vigor.fusion import ONE_WEIGHT, Rung, decide
from vigor.gradnorm.head import HEAD_LOGITS
from vigor.gradnorm.memory import FusedBytes, fused_bytes
from vigor.gradnorm.microbatches import most_tokens
from vigor.gradnorm.squares import BLOCK
from vigor.gradnorm.vocabulary import SLICE_LOGITS, WHOLE_LOGITS
from vigor.planner.model import Model

SHARDINGS = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp2")
WHOLLY = ("zero3", "fsdp2")
"""Those that leave a process a part of the weights."""
HEAD_TILE = (4096, 32_768)
"""Tokens and vocabulary of a tile of the head in TRL's loss (trl/kernels/chunked_logprob.py)."""
CAUTION = 1.3
"""Activations, logits and caches are formulas: a set-up must fit even if they are so much larger."""
ZERO_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size: gradients that are reduced together."""
ZERO_LIVE = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance and stage3_max_live_parameters: weights that ZeRO-3 keeps whole for their next
use, those that it gathers ahead included. TRL's zero3 sets no others."""
ZERO_GROUP = 1_000_000_000
"""DeepSpeed's sub_group_size: parameters that ZeRO-3 steps together."""


@dataclass(frozen=True)
class Work:
    """What a step is to do, however it is set up."""

    prompts: int
    """A step, on all processes together."""
    generations: int
    """Completions of a prompt."""
    prompt_length: int
    completion_length: int
    """Most tokens of a completion: what memory must suffice for."""
    mean_length: float
    """Tokens of a completion on average: what time is spent on."""
    weight_bytes: int = 4
    """Of a parameter as loaded."""
    compute_bytes: int = 2
    """Of an activation."""
    beta: float = 0.0
    iterations: int = 1
    loss_type: str = "dapo"
    fused: str = "auto"
    correction: bool = True
    """TRL's importance correction, where vLLM samples."""

    @property
    def length(self) -> int:
        """Most tokens of a row."""
        return self.prompt_length + self.completion_length


@dataclass(frozen=True)
class Setup:
    """How a step is set up; the processes are those that train."""

    processes: int
    rows: int
    """Of a process and micro-batch."""
    accumulation: int
    checkpointing: bool
    sharding: str = "none"
    sampler: str = "transformers"
    """Or "colocate" or "server", for vLLM."""
    share: float = 0.0
    """Of a GPU's memory, for colocated vLLM."""
    sleep: bool = False
    """Colocated vLLM gives its memory back while the model is trained."""
    tensor_parallel: int = 1
    servers: int = 0
    """GPUs of the vLLM server."""


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one process: what stays, and what each phase adds to it.

    CUDA's own memory and fragmentation are not in it.
    """

    parameters: int
    trainable: int
    resident: dict[str, int]
    phases: dict[str, int]
    fused: FusedBytes
    """What the fused update would hold of a whole generation batch; it takes that only where it is free."""

    @property
    def peak(self) -> int:
        """Resident bytes plus the largest phase."""
        return sum(self.resident.values()) + max(self.phases.values())

    @property
    def cautious(self) -> int:
        """The same with every estimated phase larger by `CAUTION`; what vLLM reserves is exact."""
        phases = (size if "vLLM" in name else int(size * CAUTION) for name, size in self.phases.items())
        return sum(self.resident.values()) + max(phases)

    @property
    def dominant(self) -> str:
        """The largest single part of the peak."""
        phase = max(self.phases, key=lambda name: self.phases[name])
        parts = {**self.resident, phase: self.phases[phase]}
        return max(parts, key=lambda name: parts[name])


def memory_of(model: Model, work: Work, setup: Setup, *, device: str = "cuda", gpu_memory: int = 0) -> Memory:
    """The memory of one training process.

    Args:
        device: type of the device; a CPU takes smaller micro-batches for the norms.
        gpu_memory: bytes of a GPU, of which colocated vLLM takes `setup.share`; 0 where it is not known.
    """
    held = _resident(model, work, setup)
    phases = {
        "reward (norms of a micro-batch)": reward_bytes(model, work, setup, device=device),
        "update (activations of a micro-batch)": update_bytes(model, work, setup, device=device),
    }
    if setup.sampler == "transformers":
        phases = {"generation (KV cache)": _generation_bytes(model, work, setup), **phases}
    elif setup.sampler == "colocate" and (vllm := int(setup.share * gpu_memory)):
        if setup.sleep:
            phases = {"generation (vLLM)": vllm, **phases}
        else:
            held["vLLM"] = vllm
    if setup.sharding.startswith("zero"):
        part = model.trainable // setup.processes
        stepped = min(part, ZERO_GROUP) if setup.sharding == "zero3" else part
        phases["optimizer's step (float32 gradients)"] = 4 * stepped
    if work.fused in ("keep", "retain"):
        phases["update (fused: held for the whole batch)"] = fused_update_bytes(
            model, work, setup, work.fused, device=device
        )
    return Memory(model.parameters, model.trainable, held, phases, fused_of(model, work, setup))


def _resident(model: Model, work: Work, setup: Setup) -> dict[str, int]:
    P, trained, n, size = model.parameters, model.trainable, setup.processes, work.weight_bytes
    if setup.sharding in ("zero1", "zero2"):
        c = work.compute_bytes  # DeepSpeed holds weights and gradients in this type, and float32 ones in its optimizer
        held = {
            "weights": P * c,
            "gradients": trained * c // (n if setup.sharding == "zero2" else 1),
            "optimizer (AdamW, float32 weights)": 12 * trained // n,
            "communication buffers": min(ZERO_BUCKET, trained) * c,
        }
    elif setup.sharding == "zero3":
        c = work.compute_bytes
        live = max(min(P, ZERO_LIVE + model.layer), model.layer + model.outer)  # in training; in the norms' pass
        held = {
            "weights": P * c // n,
            "gradients": trained * c // n,
            "optimizer (AdamW, float32 weights)": 12 * trained // n,
            "gathered weights": live * c,
            "communication buffers": ZERO_BUCKET * c,  # made whole at once, however few gradients there are
        }
    elif setup.sharding == "fsdp2":
        frozen = (P - trained) * size  # under mixed precision accelerate makes trained parameters float32
        wide = 4 if work.compute_bytes < 4 else size
        held = {
            "weights": (trained * wide + frozen) // n,
            "gradients": trained * wide // n,
            "optimizer (AdamW)": 2 * trained * wide // n,
            "gathered units": (2 * model.layer + model.outer) * work.compute_bytes,
        }
        if setup.accumulation > 1:  # no_sync: they are reduced at the last micro-batch only
            held["gradients before their reduction"] = trained * work.compute_bytes
    else:
        own = 4 if model.rank else size  # PEFT makes adapters float32
        held = {
            "weights": (P - trained) * size + trained * own,
            "gradients": trained * own,
            "optimizer (AdamW)": 2 * trained * own,
        }
        if setup.sharding == "ddp":
            held["communication buffers"] = trained * own
    if work.beta > 0 and not model.rank:
        held["reference model"] = P * size // (n if setup.sharding in WHOLLY else 1)
    return held


def saved_per_token(s: Shape, c: int, *, adapters: bool = False) -> int:
    """Bytes that one decoder layer saves of a token for its backward pass, in activations of c bytes."""
    wide, narrow = s.heads * s.head_dim, s.kv_heads * s.head_dim
    norms = 4 if adapters else 6  # a norm whose scale is frozen need not save what it scales
    values = norms * s.hidden + 4 * wide + 2 * narrow + 4 * s.intermediate
    return values * c + (8 * s.hidden if c < 4 else 0)  # the norms compute in float32 and keep their inputs so


def _backward_peak(model: Model, tokens: int, c: int, head: int, products: int, *, checkpointing: bool) -> int:
    """Most bytes of a pass: the head's work comes first, on top of what the decoder saved, then that shrinks."""
    s = model.shape
    layer = tokens * saved_per_token(s, c, adapters=bool(model.rank))
    if not checkpointing:
        return s.layers * layer + max(head, products)
    return tokens * s.layers * s.hidden * c + max(head, layer + products)


def update_bytes(model: Model, work: Work, setup: Setup, *, device: str) -> int:
    """A micro-batch of TRL's update: activations, and the head's tiles and float32 gradients."""
    s, c = model.shape, work.compute_bytes
    counted = setup.rows * work.completion_length
    tile = min(counted, HEAD_TILE[0]) * min(s.vocabulary, HEAD_TILE[1])
    copies = c if device == "cuda" else 32  # a kernel works in the tile; elsewhere torch makes eight copies of it
    head = tile * copies + counted * s.hidden * 4 + (0 if model.rank else s.vocabulary * s.hidden * 4)
    return _backward_peak(model, setup.rows * work.length, c, head, 0, checkpointing=setup.checkpointing)


def reward_bytes(model: Model, work: Work, setup: Setup, *, device: str, fused: bool = False) -> int:
    """A micro-batch of the norms: no parameter gradient; the head a few rows at a time; products in float32."""
    s, c = model.shape, work.compute_bytes
    rows = max(1, norm_tokens(model, work, setup, device=device, fused=fused) // work.length)
    tokens = min(rows, setup.rows * setup.accumulation) * work.length
    products = 4 * tokens * max(m.p + m.q for m in matrices(s)[:-1]) + 2 * 4 * BLOCK
    whole = fused or setup.sharding in WHOLLY
    head = _norms_head(s, work, tokens, c, whole=whole)
    return _backward_peak(model, tokens, c, head, products, checkpointing=setup.checkpointing)


def _norms_head(s: Shape, work: Work, tokens: int, c: int, *, whole: bool) -> int:
    """Logits of one part of the head's work, and their log-softmax, which becomes their gradient; wider if c is 2.

    `whole`: a row's logits are held at once, however many they are.
    """
    row = work.completion_length * s.vocabulary
    logits = row * min(max(1, HEAD_LOGITS // row), max(1, tokens // work.length))
    if row > WHOLE_LOGITS and not whole:
        return 12 * SLICE_LOGITS  # a slice's logits, their exponentials and their gradient
    return logits * (2 * c if c >= 4 else 8 + 2 * c)


def norm_tokens(model: Model, work: Work, setup: Setup, *, device: str, fused: bool = False) -> int:
    """Tokens of a micro-batch of the norms."""
    tokens = setup.rows * setup.accumulation * work.length
    return most_tokens(device, tokens, _matrix_sides(model), whole=fused, checkpointing=setup.checkpointing)


@cache
def _matrix_sides(model: Model) -> int:
    """Inputs and outputs of all matrices, of a token."""
    return sum(sum(p.shape) for p in model.skeleton.parameters() if p.ndim == 2)


def fused_update_bytes(model: Model, work: Work, setup: Setup, mode: str, *, device: str) -> int:
    """The fused update: what is held of the whole batch, or a micro-batch's pass where that is more."""
    needed = fused_of(model, work, setup)
    held = needed.keep if mode == "keep" else needed.retain
    head = _norms_head(model.shape, work, work.length, work.compute_bytes, whole=True)
    return max(held + head, reward_bytes(model, work, setup, device=device, fused=True))


def _generation_bytes(model: Model, work: Work, setup: Setup) -> int:
    """transformers' generate on all of a generation's rows: cache, the prompts' pass, and float32 logits of a step."""
    s, rows = model.shape, setup.rows * setup.accumulation
    prompts = rows * work.prompt_length * 2 * s.intermediate * work.compute_bytes
    gathered = model.parameters * work.compute_bytes if setup.sharding in WHOLLY else 0
    return rows * (kv_bytes(s, work.length, work.compute_bytes) + s.vocabulary * 12) + prompts + gathered


def kv_bytes(s: Shape, tokens: int, c: int) -> int:
    """Keys and values of a sequence."""
    return tokens * s.layers * 2 * s.kv_heads * s.head_dim * c


def fused_of(model: Model, work: Work, setup: Setup) -> FusedBytes:
    """What the fused update would hold, from the estimate that the trainer decides by."""
    one = _fused_row(model, work.length, work.completion_length, work.compute_bytes, setup.checkpointing)
    rows = setup.rows * setup.accumulation
    return FusedBytes(one.keep * rows, one.retain * rows)


@cache
def _fused_row(model: Model, length: int, counted: int, c: int, checkpointing: bool) -> FusedBytes:
    for module in model.skeleton.train().modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = checkpointing
    dtype = {2: torch.bfloat16, 4: torch.float32}.get(c, torch.float64)
    return fused_bytes(model.skeleton, torch.tensor([length]), torch.tensor([counted]), dtype=dtype)


def rung_of(work: Work, setup: Setup, memory: Memory, free: int) -> Rung:
    """The fused update that the trainer would choose (see vigor.fusion), with so many bytes free."""
    blocked = tokenwise = None
    if setup.sharding not in ("none", "ddp"):
        blocked = "FSDP and DeepSpeed reduce gradients in a backward pass of their own"
    elif work.iterations > 1:
        blocked = f"completions are trained on {work.iterations} times"
    if work.beta:
        tokenwise = f"beta={work.beta:g} weighs tokens by their KL term"
    elif work.loss_type not in ONE_WEIGHT:
        tokenwise = f"loss_type={work.loss_type!r} weighs tokens one by one"
    elif setup.sampler != "transformers" and work.correction:
        tokenwise = "vLLM's log-probabilities correct tokens one by one"
    return decide(work.fused, blocked, tokenwise, memory.fused, max(0, free))
