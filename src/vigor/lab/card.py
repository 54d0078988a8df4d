"""Writes the card of a base: what it is, how to make it again, and what was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from .corpus import WORLDS
from .evaluate import LabScore
from .separation import SIGNALS, Separation

_ABOUT = {
    "lab": "A base language model in miniature: it can compute, but its samples are hasty, unboxed or do not stop. "
    "Most of its mistakes come with hasty wording, so that confidence follows correctness.",
    "lab-misaligned": "A base on which confidence does not follow correctness: its surest answers are a fixed, wrong "
    "shortcut, and its correct texts are wordy. Label-free rewards must fail on it.",
}


def write_card(
    folder: Path,
    world: str,
    seed: int,
    steps: Sequence[int],
    scores: Sequence[LabScore],
    separations: Sequence[Separation],
) -> str:
    """Write ``README.md`` into ``folder`` and return its text."""
    import torch

    noise = WORLDS[world]
    shares = ", ".join(f"{kind} {share:g}" for kind, share in asdict(noise.shares).items() if share)
    lines = [
        f"# {world}",
        "",
        _ABOUT[world],
        "",
        "Llama architecture, 4 layers, width 128, tied embeddings, 0.80 M parameters, fp32; a word-level tokenizer.",
        "Trained by the VIGOR project on its own generated texts; Apache-2.0.",
        "",
        f"- Made by: `python -m vigor.lab.build --world {world} --seed {seed}`, {' + '.join(map(str, steps))} steps",
        f"- Texts of the second stage: {shares}; errors per step of a sloppy text {noise.step_error:g}, "
        f"fillers per step {noise.fillers:g}",
        f"- Date and machine: {date.today().isoformat()}, {platform.machine()}, {os.cpu_count()} cores of which one "
        f"was used, torch {torch.__version__}",
        "",
        f"Test questions, {scores[0].n_prompts} a task, {scores[0].n_samples} samples each at temperature 1, "
        "sampling seed 0; 95 % intervals in brackets.",
        "",
        "| task | greedy | sampled | majority | entropy (nats) | boxed | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in scores:
        lines.append(
            f"| {s.task} | {s.greedy:.3f} {_shown(s.greedy_interval)} | {s.sampled:.3f} {_shown(s.sampled_interval)} "
            f"| {s.majority:.3f} | {s.entropy:.3f} | {s.boxed:.3f} | {s.mean_length:.1f} |"
        )
    first = separations[0]
    lines += [
        "",
        f"Within-group AUC against correctness / accuracy of the best-scored of {first.n_samples} samples, "
        f"{first.n_prompts} test questions a task:",
        "",
        f"| task | {' | '.join(SIGNALS)} |",
        f"|---{'|---' * len(SIGNALS)}|",
    ]
    for separation in separations:
        cells = [f"{_number(separation.auc[signal])} / {separation.best[signal]:.3f}" for signal in SIGNALS]
        lines.append(f"| {separation.task} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def _shown(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
