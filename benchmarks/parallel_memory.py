"""Peak memory in parts, two processes (gloo, CPU): what the norms and a training pass add to the shards at rest.

    python benchmarks/parallel_memory.py                        FSDP2: about 3 minutes; a part of benchmarks/parallel.py
    python benchmarks/parallel_memory.py --sharding zero3       DeepSpeed ZeRO-3 (must be installed): about 6 minutes

A training pass is a forward and a backward pass over the same rows, from no gradients to the shards of all gradients;
the optimizer's step is left out. The loop is what the first call's self-check runs for one row. Models are wide and
rows few, so that parameters decide. Peaks are the kernel's (VmHWM, reset before each pass), in two processes of its own
for each model, which give freed memory back at once; the larger of the two counts. DeepSpeed's shards of gradients are
there from the start, so a training pass under ZeRO-3 does not add them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TOKENS = 16


@dataclass(frozen=True)
class Case:
    """A model, and how it is sharded."""

    name: str
    layers: int = 12
    width: int = 512
    vocabulary: int = 4000
    tied: bool = False
    rows: int = 4
    units: str = "tail"
    """As in accelerate: embedding and head apart. "layers": both in the root's unit."""
    checkpointing: bool = False
    sharding: str = "fsdp2"
    """Or "zero3": with DeepSpeed's own bounds, as in TRL's zero3. "zero3, least": with bounds that let go of weights at
    once and reduce few gradients at a time."""


CASES = (
    Case("12 layers, small vocabulary"),
    Case("12 layers, small vocabulary, head in the root's unit", units="layers"),
    Case("12 layers, small vocabulary, checkpointing", checkpointing=True),
    Case("4 layers, large vocabulary", layers=4, vocabulary=32000),
    Case("4 layers, large vocabulary, tied", layers=4, vocabulary=32000, tied=True),
    Case("4 layers, large vocabulary, head in the root's unit", layers=4, vocabulary=32000, units="layers"),
)

ZERO3_CASES = tuple(
    replace(case, name=case.name + said, sharding=sharding)
    for sharding, said in (("zero3", ""), ("zero3, least", ", least held"))
    for case in CASES
    if case.units == "tail"
)
BOUNDS = {
    "zero3": {},
    "zero3, least": {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
                     "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 2**20},
}  # fmt: skip


def model_of(case: Case) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocabulary, hidden_size=case.width, intermediate_size=case.width * 11 // 4,
        num_hidden_layers=case.layers, num_attention_heads=case.width // 64, num_key_value_heads=case.width // 64,
        tie_word_embeddings=case.tied, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def resident(field: str) -> float:
    """MB of this process: "VmRSS" now, "VmHWM" at most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def added(run: Callable[[], object], ready: Callable[[], None]) -> float:
    """MB above the state at rest, the largest of the processes, after a pass that warms up."""
    run()
    ready()
    gc.collect()
    dist.barrier()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    peak = torch.tensor(resident("VmHWM") - before)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    ready()
    return float(peak)


def in_parts(model: Any, case: Case) -> tuple[Any, Callable[[], None]]:
    """The model of which each process holds a part, and what drops its gradients."""
    import parallel

    if case.sharding == "fsdp2":
        parallel.shard(model, units=case.units)
        return model, lambda: model.zero_grad(set_to_none=True)
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, **BOUNDS[case.sharding]},
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    return engine, engine.optimizer.zero_grad


def passes(model: Any, case: Case) -> dict[str, Callable[[], object]]:
    from vigor.gradnorm import sequence_grad_norms

    torch.manual_seed(dist.get_rank())
    ids_BL = torch.randint(2, case.vocabulary, (case.rows, TOKENS))
    attention_BL, completion_BL = torch.ones_like(ids_BL), torch.ones_like(ids_BL)
    completion_BL[:, :4] = 0
    rows: tuple[Tensor, Tensor, Tensor] = (ids_BL, attention_BL, completion_BL)

    def training() -> None:
        logits_BLV = model(input_ids=ids_BL, attention_mask=attention_BL, use_cache=False).logits[:, 3:-1]
        logps = torch.log_softmax(logits_BLV, -1).gather(-1, ids_BL[:, 4:, None])
        del logits_BLV
        loss = -logps.mean()
        if case.sharding == "fsdp2":
            loss.backward()
        else:
            model.backward(loss)

    return {
        "norms": lambda: sequence_grad_norms(model, *rows, method="batched", self_check=False),
        "loop": lambda: sequence_grad_norms(model, *rows, method="loop"),
        "training": training,
    }


def work(folder: Path) -> None:
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    case = Case(**json.loads((folder / "case.json").read_text()))
    model = model_of(case).train()
    numbers = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, ready = in_parts(model, case)
    peaks = {name: added(run, ready) for name, run in passes(model, case).items()}
    if dist.get_rank() == 0:
        (folder / "memory.json").write_text(json.dumps({"case": case.name, "weights": numbers, **peaks}))
    dist.destroy_process_group()


def measure(cases: tuple[Case, ...] = CASES) -> list[dict[str, Any]]:
    """MB that each pass adds, by case."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MALLOC_MMAP_THRESHOLD_": "65536",
                   "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "DS_ACCELERATOR": "cpu"}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    found: list[dict[str, Any]] = []
    for case in cases:
        with TemporaryDirectory() as folder:
            (Path(folder) / "case.json").write_text(json.dumps(asdict(case)))
            argv, variables = [*command, "--work", folder], {**os.environ, **environment}
            done = subprocess.run(argv, capture_output=True, text=True, env=variables)
            if done.returncode:
                raise RuntimeError(done.stderr[-4000:])
            found.append(json.loads((Path(folder) / "memory.json").read_text()))
    return found


def table(found: list[dict[str, Any]]) -> str:
    """A table in Markdown, MB."""
    lines = ["| model | whole weights | training adds | norms add | the loop adds |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['case']} | {r['weights']:.0f} | {r['training']:.0f} | {r['norms']:.0f} | {r['loop']:.0f} |"
        for r in found
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharding", choices=("fsdp2", "zero3"), default="fsdp2")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
    else:
        print(table(measure(CASES if args.sharding == "fsdp2" else ZERO3_CASES)))
