"""The planner's memory against measured peaks: what passes over small models add in a fresh process, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import Qwen2Config

from vigor.planner.memory import Setup, Work, fused_update_bytes, reward_bytes, update_bytes
from vigor.planner.model import read_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TOLERANCE = 0.25
"""Relative; docs/scale.md states it."""
CASES: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"shape": "256x8000x8x160", "layers": 6}),
    ("batched", {"shape": "256x8000x8x160", "layers": 6}),
    ("keep", {"shape": "256x8000x8x160", "layers": 6}),
    ("grpo", {"shape": "256x8000x8x160", "layers": 6, "checkpointing": True}),
    ("batched", {"shape": "256x8000x8x160", "layers": 6, "checkpointing": True}),
    ("batched", {"shape": "256x8000x8x160", "layers": 6, "lora": 16}),
    ("batched", {"shape": "128x40000x4x128", "layers": 4}),
    ("batched", {"shape": "64x400000x2x800", "layers": 2}),  # the head in slices
]
"""Passes of benchmarks/gradnorm.py: TRL's update, the norms, and the update fused with them."""
MEASURE = """
import gc, json, os, sys
sys.path.insert(0, sys.argv[1])
import gradnorm
import peft, torch, trl.trainer.utils, vigor.gradnorm  # once, before the forks

torch.set_num_threads(1)
for name, settings in json.loads(sys.argv[2]):
    if (child := os.fork()) == 0:
        run = gradnorm.candidates(gradnorm.Case(**settings))[name]
        run()  # leaves gradients, which stay; what a pass adds to them is to be measured
        gc.collect()
        gradnorm.Path("/proc/self/clear_refs").write_text("5")
        before = gradnorm.resident("VmRSS")
        run()
        print("added", (gradnorm.resident("VmHWM") - before) * 2**20, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def measured() -> list[float]:
    """Bytes that each pass adds, in a process that gives freed memory back at once."""
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(BENCHMARKS), json.dumps(CASES)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("added")]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's account")
def test_peaks_are_as_estimated(measured: list[float], tmp_path: Path) -> None:
    assert len(measured) == len(CASES)
    told = []
    for (name, settings), found in zip(CASES, measured, strict=True):
        expected = estimate(tmp_path, name, **settings)
        told.append(f"{name} {settings}: measured {found / 2**20:.0f} MB, estimated {expected / 2**20:.0f}")
        if not abs(expected / found - 1) <= TOLERANCE:
            told[-1] += "  <-"
    print("\n".join(told))
    assert not [line for line in told if line.endswith("<-")], "\n".join(told)


def estimate(folder: Path, name: str, *, shape: str, layers: int, checkpointing: bool = False, lora: int = 0) -> int:
    """Bytes that the planner expects the pass to add."""
    width, vocabulary, rows, tokens = map(int, shape.split("x"))
    Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        intermediate_size=width * 11 // 4,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    adapter = LoraConfig(r=lora, target_modules="all-linear") if lora else None
    model = read_model(str(folder), peft_config=adapter)
    work = Work(1, rows, 4, tokens - 4, tokens - 4, weight_bytes=4, compute_bytes=4)
    setup = Setup(1, rows, 1, checkpointing)
    if name == "grpo":
        return update_bytes(model, work, setup, device="cpu")
    if name == "batched":
        return reward_bytes(model, work, setup, device="cpu")
    return fused_update_bytes(model, work, setup, name, device="cpu")
