"""Model Collapse Step: how long a model stands a training on its own majority vote, made as rough as it can be.

Source: "How Far Can Unsupervised RLVR Scale LLM Training?", arXiv 2603.08660. There the measure is the number of
training steps after which Reward Accuracy has fallen below 1 %; models that last longer gain more from labels later.
Reward Accuracy is TTRL's (arXiv 2504.16084): the share of completions whose reward from the vote is the one that the
answer would have given. One prompt an update and 8 completions a prompt bring the collapse forward without changing the
order of models.

    reward_accuracy(step) = mean over the completions of the step of 1[majority_vote = accuracy]
    collapse_step         = the first step with reward_accuracy < 0.01

A step is a batch of fresh completions; `n_prompts` updates are made from it. Departures from the paper:
 1. It trains on the majority vote only: of the rewards that the paper tries it is the one for which Reward Accuracy, a
    comparison of zeros and ones, is defined.
 2. The number of prompts a step, the learning rate and the optimizer are the caller's; their values in the paper's
    measurement were not in the texts at hand. Compare models under equal settings only.
 3. The paper advertises the measure as free of labels. Its definition is not: Reward Accuracy needs the answers.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vigor.compare.runs import train_command

if TYPE_CHECKING:
    import pandas as pd

THRESHOLD = 0.01
NUM_GENERATIONS = 8
STOP_S = 30.0
"""Seconds that the training has to end once its collapse is seen."""
POLL_S = 0.5


@dataclass(frozen=True)
class Point:
    """A batch of fresh completions, before the updates that are made from it."""

    step: int
    """Batches before this one, each with its updates."""
    reward_accuracy: float
    accuracy: float
    """Share of right completions."""


class CollapseError(RuntimeError):
    """The training ended before it had measured anything, or with an error; the message has its last words."""


def point(completions: pd.DataFrame, step: int) -> Point:
    """One batch's Reward Accuracy and accuracy.

    Args:
        completions: columns `majority_vote` and `accuracy`, each 0, 1 or NaN; rows without a known answer are left out.
        step: batches before it.

    Raises:
        ValueError: no row has a known answer.
    """
    known = completions[completions["accuracy"].notna() & completions["majority_vote"].notna()]
    if not len(known):
        raise ValueError(
            "none of the prompts has an answer that can be checked, and the Model Collapse Step compares the vote with "
            "answers. Give prompts with answers (--answer_column)."
        )
    agree = (known["majority_vote"] == known["accuracy"]).mean()
    return Point(step, float(agree), float(known["accuracy"].mean()))


def collapse_step(curve: Sequence[Point], threshold: float = THRESHOLD) -> int | None:
    """The first step with Reward Accuracy below the threshold; None where there is none."""
    return next((at.step for at in curve if at.reward_accuracy < threshold), None)


def settings(recipe: Mapping[str, Any], *, n_prompts: int, steps: int, **own: Any) -> dict[str, Any]:
    """Settings of `vigor train` for the destructive training.

    Args:
        recipe: what they start from: learning rate, dtype, lengths and the like.
        n_prompts: prompts of a step; as many updates follow, of one prompt each.
        steps: batches at most.
        **own: settings that go before the recipe's: model, prompts, seed.
    """
    chosen = {
        "reward_funcs": ["majority_vote", "accuracy"],
        "reward_weights": [1.0, 0.0],
        "num_generations": NUM_GENERATIONS,
        "per_device_train_batch_size": NUM_GENERATIONS,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": n_prompts,
        "max_steps": n_prompts * steps,
        "logging_steps": n_prompts,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "lab_eval_prompts": 0,
    }
    return {**recipe, **{name: value for name, value in own.items() if value is not None}, **chosen}


def measure(
    chosen: Mapping[str, Any], folder: Path, *, threshold: float = THRESHOLD, say: Callable[[Point], None]
) -> list[Point]:
    """Trains in a process of its own, which ends as soon as the collapse is seen.

    Args:
        chosen: `settings`.
        folder: of the run; must be new or empty. Settings and log lie beside it.
        threshold: Reward Accuracy below which the model has collapsed.
        say: called with every point.

    Returns:
        The curve; its last point is the collapse, if there was one.

    Raises:
        CollapseError: see there.
        ValueError: no prompt has an answer.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
    file.write_text(yaml.safe_dump(dict(chosen), sort_keys=False, allow_unicode=True), "utf-8")
    command = train_command(file, folder, False)
    curve: list[Point] = []
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT)
        try:
            running = True
            while running and collapse_step(curve, threshold) is None:
                running = process.poll() is None
                for each in _new(folder, len(curve)):
                    curve.append(each)
                    say(each)
                    if each.reward_accuracy < threshold:
                        break
                if running:
                    time.sleep(POLL_S)
        finally:
            _end(process)
    status = process.returncode
    if collapse_step(curve, threshold) is None and status != 0:
        words = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        raise CollapseError(f"the training ended with status {status}: {' '.join(words[-3:])} (all of it: {log})")
    return curve


def _new(folder: Path, seen: int) -> list[Point]:
    """Points of the files that were written since; one that is still being written waits for the next look."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = []
    for step, path in enumerate(sorted((folder / "completions").glob("*.parquet"))):
        if step >= seen:
            try:
                found.append(point(pq.read_table(path).to_pandas(), step))
            except (OSError, pa.ArrowInvalid):
                break
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
