"""What a checkpoint costs the lab run: seconds of a save, and its share of the time at one save per 10 steps.

    OMP_NUM_THREADS=1 python benchmarks/save_time.py        # about 2 minutes

One run of the recipe `lab` saves after every second step; each save is timed as a whole, and the parts that are ours
(syncing, hashing, renaming) apart from the engine's writing. The share is median save / (10 × median step).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from vigor import VigorConfig, VigorTrainer, checkpoint
from vigor.lab.tasks import make_rows
from vigor.lab.world import load

warnings.filterwarnings("ignore", category=FutureWarning)
EVERY = 10


class Steps(TrainerCallback):
    """Seconds of each optimizer step, saves not included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def timed(owner: Any, name: str, into: list[float]) -> None:
    """Notes the seconds of each call of `owner.name`."""
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            into.append(time.perf_counter() - began)

    setattr(owner, name, call)


def run(folder: str, steps: int) -> dict[str, float]:
    model, tokenizer = load("lab")
    args = VigorConfig(
        folder, use_cpu=True, gradient_checkpointing=False, per_device_train_batch_size=64, num_generations=8,
        max_completion_length=72, max_steps=steps, learning_rate=1e-4, save_strategy="steps", save_steps=2,
        save_total_limit=2, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list(make_rows("lab:math", "train", steps * 8))
    trainer = VigorTrainer(model, "vigor", args, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    clock, saves, syncs, commits = Steps(), [], [], []
    trainer.add_callback(clock)
    timed(trainer, "_save_checkpoint", saves)
    timed(checkpoint, "sync_tree", syncs)
    timed(checkpoint, "commit", commits)
    trainer.train()
    size = sum(path.stat().st_size for path in Path(folder, "checkpoints", f"checkpoint-{steps}").rglob("*"))
    step, save = median(clock.seconds[1:]), median(saves[1:])
    return {
        "steps": steps,
        "saves": len(saves),
        "MB a checkpoint": round(size / 1e6, 2),
        "seconds a step": round(step, 4),
        "seconds a save": round(save, 4),
        "of which sync": round(median(syncs[1:]), 4),
        "of which hash, rename, mark": round(median(commits[1:]), 4),
        f"share at one save per {EVERY} steps": round(save / (EVERY * step), 5),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", help="where to write: a disk's speed is its own (default: a temporary folder)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        print(json.dumps(run(scratch, given.steps), indent=2))
