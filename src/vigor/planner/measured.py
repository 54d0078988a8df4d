"""Rates from measurements: results of benchmarks/gradnorm.py, or the metrics of a finished run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from vigor.flops import benchmark_shape, cost
from vigor.planner.gpus import GPU
from vigor.planner.model import Model
from vigor.planner.times import Rates, cost_of
from vigor.reading import NUMBER, ReadError, read_json
from vigor.runfolder import RunFolder

_SECONDS = {"seconds": NUMBER}
_RESULTS = {
    "device": str,
    "dtype": str,
    "density": NUMBER,
    "lora": int,
    "checkpointing": bool,
    "layers": int,
    "shapes": {str: {"train": _SECONDS, "batched": _SECONDS}},
}


def rates_of_benchmark(path: Path, gpu: GPU, otherwise: Rates) -> Rates:
    """The share of the GPU's operations that the benchmark's largest shape reached.

    Args:
        path: what benchmarks/gradnorm.py wrote with --out, measured on such a GPU.
        gpu: the GPU that is planned for.
        otherwise: rates that are not measured there.

    Raises:
        FileNotFoundError, ReadError: no such results, or measured with padding, adapters or checkpointing, or on a CPU.
    """
    found = read_json(path, _RESULTS)
    if found["device"] != "cuda":
        raise ReadError(
            f"{path} was measured on {found['device']!r}, which says nothing about a {gpu.name}: run "
            "benchmarks/gradnorm.py --device cuda --dtype bfloat16 there."
        )
    if found["density"] != 1 or found["lora"] or found["checkpointing"]:
        raise ReadError(f"{path} was measured with padding, LoRA or checkpointing; operations are counted without.")
    best: tuple[float, float, float] | None = None
    for text, results in found["shapes"].items():
        shape, tokens = benchmark_shape(text, found["layers"])
        rows = int(text.split("x")[2])
        c = cost(replace(shape, activation_bytes=2 if found["dtype"] == "bfloat16" else 4), tokens)
        whole = rows * c.plain
        if best is None or whole > best[0]:
            norms = rows * c.norms / results["batched"]["seconds"]
            best = whole, whole / results["train"]["seconds"], norms
    if best is None:
        raise ReadError(f"{path}: shapes is empty.")
    return replace(
        otherwise,
        training=best[1] / (gpu.tflops * 1e12),
        norms=best[2] / (gpu.tflops * 1e12),
        source=f"training and norms measured ({path}), sampling and links assumed",
    )


def rates_of_run(folder: Path, model: Model, gpu: GPU, otherwise: Rates) -> Rates:
    """What a run reached, from its medians over steps without the first.

    Args:
        folder: a run folder of `vigor train`, on GPUs like those that are planned for.
        model: of that run.
        gpu: the GPU that is planned for.
        otherwise: rates that a run does not show.

    Raises:
        FileNotFoundError, ReadError: the folder holds no metrics of two steps.
    """
    run = RunFolder(folder)
    settings, environment = run.read_config(), run.read_json("environment.json")
    steps = [each for each in run.read_metrics() if each.get("time/step") and each.get("completions/mean_length")]
    if len(steps) < 3:
        raise ReadError(f"{folder / 'metrics.jsonl'} holds {len(steps)} timed steps; give a run of at least 3.")
    rows = int(settings["per_device_train_batch_size"]) * int(settings["gradient_accumulation_steps"])
    completions = rows * int(environment["processes"])
    tokens = [(b["num_tokens"] - a["num_tokens"]) / completions for a, b in pairwise(steps)]
    c = cost_of(model, max(1, round(median(tokens))))
    again = c.forward * (2 if settings.get("gradient_checkpointing") else 0)
    iterations = int(settings.get("num_iterations") or 1)
    operations = rows * (c.norms + c.plain * iterations + again)
    seconds = median(each["time/reward"] + each["time/update"] for each in steps[1:])
    reached = operations / seconds / (gpu.tflops * 1e12)
    longest = median(each["completions/max_length"] for each in steps[1:])
    token = median(each["time/generation"] for each in steps[1:]) / max(1.0, longest)
    measured = replace(otherwise, training=reached, norms=reached, source=f"measured ({folder}), links assumed")
    if settings.get("use_vllm"):
        return replace(measured, bandwidth=min(1.0, model.parameters * 2 / token / (gpu.bandwidth * 1e9)))
    return replace(measured, token=token / model.shape.layers)
