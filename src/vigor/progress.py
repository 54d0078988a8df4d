"""What a run shows while it runs, and the callbacks that write it down."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vigor.disk import STDOUT, naming
from vigor.runfolder import RunFolder
from vigor.terminal import printable

SHOWN_LINES = 20
"""Lines that a run prints where there is no terminal to draw a bar on."""


class StepClock(TrainerCallback):
    """Times each optimizer step and splits it: generation, reward, and the rest (the update)."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.started = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter()
        self.trainer.take_seconds()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        seconds = {"step": time.perf_counter() - self.started, **self.trainer.take_seconds()}
        seconds["update"] = seconds["step"] - seconds["generation"] - seconds["reward"]
        for name, value in seconds.items():
            self.trainer.record(f"time/{name}", value)


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl of the run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs and not _is_summary(logs):
            self.folder.append_metrics({"step": state.global_step, **logs})


class ProgressBar(TrainerCallback):
    """A bar on a terminal, about twenty lines elsewhere."""

    def __init__(self, reward_names: list[str]) -> None:
        self.reward_names = reward_names
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or _is_summary(logs):
            return
        line = describe(logs, self.reward_names)
        if self.bar is not None:
            self.bar.set_postfix_str(line)
        elif state.global_step == 1 or state.global_step % max(1, state.max_steps // SHOWN_LINES) == 0:
            with naming(STDOUT):
                print(f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  {line}", flush=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _is_summary(logs: dict[str, Any]) -> bool:
    """True for the record at the end of training, unless TRL merged the metrics of the last steps into it."""
    return "train_runtime" in logs and "reward" not in logs


def describe(logs: dict[str, Any], reward_names: list[str]) -> str:
    """One line of what matters: each reward, length, entropy, seconds a step and where they went."""
    parts = []
    for name in reward_names:
        # A ranked reward has mean 0 by construction; the score under it is what moves.
        value = logs.get(f"scores/{name}", logs.get(f"rewards/{name}/mean"))
        if value is not None:
            parts.append(f"{name} {value:.3g}")
    for key, label in (("completions/mean_length", "length"), ("entropy", "entropy")):
        if logs.get(key) is not None:
            parts.append(f"{label} {logs[key]:.3g}")
    if logs.get("time/step") is not None:
        split = " ".join(f"{name} {logs[f'time/{name}']:.2f}" for name in ("generation", "reward", "update"))
        parts.append(f"{logs['time/step']:.2f} s ({split})")
    return printable("  ".join(parts))
