"""What VigorTrainer adds to a GRPO step on the lab, and where a step's time goes.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py            # about 3 minutes
    OMP_NUM_THREADS=1 python benchmarks/step_time.py --profile  # and the functions that take it

Plain TRL (`GRPOTrainer`, a reward that costs nothing) and `VigorTrainer` with the reward `vigor` take turns in one
process on the same model and batch shape; learning rate 0 keeps the policy, and so the lengths it samples, the same.
Numbers to trust are ratios of medians within one run.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from vigor import VigorConfig, VigorTrainer
from vigor.lab.tasks import make_rows
from vigor.lab.world import load

warnings.filterwarnings("ignore", category=FutureWarning)


class Wall(TrainerCallback):
    """Seconds of each optimizer step, and how they split where the trainer says."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.steps, self.parts = trainer, [], []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if isinstance(self.trainer, VigorTrainer):
            self.trainer.take_seconds()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self.started)
        if isinstance(self.trainer, VigorTrainer):
            self.parts.append(self.trainer.take_seconds())


def settings(folder: str, steps: int, rows: int) -> dict[str, Any]:
    return dict(
        output_dir=folder, use_cpu=True, gradient_checkpointing=False, per_device_train_batch_size=rows,
        num_generations=8, max_completion_length=72, max_steps=steps, learning_rate=0.0, save_strategy="no",
        disable_tqdm=True, log_completions=False, logging_steps=1,
    )  # fmt: skip


def no_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def run(kind: str, steps: int, rows: int, folder: str) -> Wall:
    """A few steps of one kind; the first is warm-up and left out."""
    model, tokenizer = load("lab")
    data = Dataset.from_list(make_rows("lab:math", "train", steps * rows))
    common: dict[str, Any] = dict(train_dataset=data, processing_class=tokenizer)
    trainer: GRPOTrainer
    if kind == "trl":
        args = GRPOConfig(bf16=False, report_to="none", **settings(folder, steps, rows))
        trainer = GRPOTrainer(model, no_reward, args, **common)
    else:
        trainer = VigorTrainer(model, "vigor", VigorConfig(**settings(folder, steps, rows)), **common)
    trainer.remove_callback(PrinterCallback)
    wall = Wall(trainer)
    trainer.add_callback(wall)
    trainer.train()
    wall.steps, wall.parts = wall.steps[1:], wall.parts[1:]
    return wall


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps a round and kind, the first left out")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()

    trl: list[float] = []
    ours: list[float] = []
    parts: dict[str, list[float]] = {"generation": [], "reward": [], "update": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            trl += run("trl", args.steps, args.rows, folder).steps
            wall = run("vigor", args.steps, args.rows, folder)
            ours += wall.steps
            for step, part in zip(wall.steps, wall.parts, strict=True):
                parts["generation"].append(part["generation"])
                parts["reward"].append(part["reward"])
                parts["update"].append(step - part["generation"] - part["reward"])
        if args.profile:
            profiler = cProfile.Profile()
            profiler.runcall(run, "vigor", args.steps, args.rows, folder)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    bare = [step - reward for step, reward in zip(ours, parts["reward"], strict=True)]
    result = {
        "threads": torch.get_num_threads(),
        "steps": len(ours),
        "trl_seconds": median(trl),
        "vigor_seconds": median(ours),
        "ratio_without_reward": median(bare) / median(trl),
        "ratio_with_reward": median(ours) / median(trl),
        "split": {name: median(values) for name, values in parts.items()},
    }
    low, _, high = quantiles([step / median(trl) for step in bare], n=4)
    print(f"{len(ours)} steps of each, {args.rows} completions a step, {result['threads']} thread(s)")
    print(f"plain GRPOTrainer            {result['trl_seconds']:.3f} s a step")
    print(f"VigorTrainer, reward vigor   {result['vigor_seconds']:.3f} s = {result['ratio_with_reward']:.2f} ×")
    print(f"  without the reward's own   {median(bare):.3f} s = {result['ratio_without_reward']:.2f} × ", end="")
    print(f"(quartiles {low:.2f} to {high:.2f})")
    print("  " + ", ".join(f"{name} {median(values):.3f} s" for name, values in parts.items()))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
