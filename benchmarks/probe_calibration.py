"""How often `vigor probe`'s forecast is right: probe, then train, on a dozen of the lab's worlds.

    python benchmarks/probe_calibration.py --out docs/results/probe     # about 15 minutes on one core

The worlds: the two shipped bases; bases between them, by linear interpolation of their weights (they share the first
stage of pre-training, so that the line between them is made of working models); and bases that go on from `lab` for
some hundred steps on texts of other noise (`vigor.lab.corpus.Noise`). For each world the truth is a short training with
the recipe `lab` and the change of sampled accuracy on test questions, paired by question. The probe sees training
questions of another seed. What is finished is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIXES = {"mix-75": 0.75, "mix-90": 0.9, "mix-95": 0.95, "mix-98": 0.98, "mix-110": 1.1}
"""Share of `lab-misaligned` in the weights; above 1 the line goes on behind it."""
TUNED: dict[str, dict[str, Any]] = {
    "shortcuts": {"shares": {"good": 0.55, "sloppy": 0.20, "run_on": 0.05, "shortcut": 0.20}},
    "wordy-shortcuts": {"shares": {"good": 0.50, "sloppy": 0.25, "shortcut": 0.25}, "fillers": 1.0},
    "guesses": {"shares": {"good": 0.40, "guess": 0.50, "unboxed": 0.10}, "fillers": 0.5},
}
"""Noise of the bases that go on from `lab`."""
WORLDS = ("lab", *MIXES, "lab-misaligned", *TUNED)
TUNING_STEPS = 300
MARGIN = 0.05
"""A change of accuracy that counts: help where the whole interval lies above it, collapse where below its negative."""


def make_world(name: str, folder: Path) -> None:
    """Writes the base of a world in the layout of transformers."""
    import torch

    from vigor.lab import build
    from vigor.lab.corpus import Noise, Shares
    from vigor.lab.world import load

    torch.set_num_threads(1)
    model, _ = load("lab-misaligned" if name == "lab-misaligned" else "lab")
    if name in MIXES:
        other, share = load("lab-misaligned")[0].state_dict(), MIXES[name]
        model.load_state_dict({key: value.lerp(other[key], share) for key, value in model.state_dict().items()})
    elif name in TUNED:
        noise = Noise(**{**TUNED[name], "shares": Shares(**TUNED[name]["shares"])})
        stage = build.Stage(noise, TUNING_STEPS, 1e-3, first_text=2_000_000, warmup=20)
        build.train(model, stage, seed=0)
    build.save(model, folder)


def shares(folder: Path, prompts: int, samples: int) -> list[float]:
    """The sampled accuracy of each test question of lab:math."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vigor.lab.decode import complete
    from vigor.lab.tasks import is_correct, make_rows

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    rows, generator = make_rows("lab:math", "test", prompts), torch.Generator().manual_seed(0)
    for start in range(0, prompts, 150):
        part = rows[start : start + 150]
        texts = [row["prompt"] for row in part]
        sampling = {"n_samples": samples, "max_new_tokens": 72, "temperature": 1.0, "generator": generator}
        for row, group in zip(part, complete(model, tokenizer, texts, **sampling), strict=True):
            found.append(sum(is_correct(c.text, row["answer"]) for c in group[1:]) / samples)
    return found


def train(reward: str, world: Path, folder: Path, steps: int) -> None:
    """A short training with the recipe `lab`, unless it is there."""
    if (folder / "model" / "model.safetensors").is_file():
        return
    command = [sys.executable, "-m", "vigor", "train", "--config", "lab", "--model_name_or_path", str(world)]
    command += ["--reward_funcs", reward, "--max_steps", str(steps), "--output_dir", str(folder)]
    command += ["--lab_eval_prompts", "0"]
    with Path(f"{folder}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def change(before: list[float], after: list[float], rounds: int = 2000) -> dict[str, Any]:
    """Mean change, its 95 % bootstrap interval over questions, and what that is called."""
    differences, rng = [b - a for a, b in zip(before, after, strict=True)], random.Random(0)
    n = len(differences)
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(rounds))
    low, high = means[round(0.025 * (rounds - 1))], means[round(0.975 * (rounds - 1))]
    label = "will help" if low > MARGIN else "will collapse" if high < -MARGIN else "neutral"
    return {"before": sum(before) / n, "after": sum(after) / n, "interval": [low, high], "truth": label}


def probe(world: Path, out: Path, prompts: int) -> dict[str, Any]:
    """What `vigor probe` says of a world; an earlier answer is read again."""
    if not out.is_file():
        command = [sys.executable, "-m", "vigor", "probe", "--prompts", "lab:math", "--model_name_or_path", str(world)]
        command += [
            "--signals",
            "vigor",
            "--noise_prompts",
            "0",
            "--batch_size",
            "256",
            "--n_prompts",
            str(prompts),
            "--out",
            str(out),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text("utf-8"))


def fit(values: list[float], changes: list[float]) -> float:
    """The break-even: the middle of the widest gap among those that put the fewest worlds on the wrong side."""
    order = sorted(zip(values, changes, strict=True))
    best = (len(order) + 1, 0.0, 0.5)
    for (low, _), (high, _) in itertools.pairwise(order):
        middle = (low + high) / 2
        wrong = sum((value > middle) != (change > 0) for value, change in order)
        best = min(best, (wrong, low - high, middle))
    return best[2]


def verdict(low: float, high: float, even: float) -> str:
    """As `vigor.probe.forecast` decides."""
    return "will help" if low > even else "will collapse" if high < even else "neutral"


def table(worlds: dict[str, dict[str, Any]], basis: str) -> list[str]:
    """Markdown rows: each world with its truth, and the forecast with a break-even fitted to the others."""
    lines = ["| world | accuracy before | after | change, points | truth | AUC | what decides | forecast | right |"]
    lines.append("|---|---:|---:|---:|---|---:|---:|---|---|")
    for name, w in sorted(worlds.items(), key=lambda item: item[1]["after"] - item[1]["before"]):
        e, (low, high) = w[basis]["estimate"], w["interval"]
        lines.append(
            f"| `{name}` | {100 * w['before']:.1f} | {100 * w['after']:.1f} | {100 * (w['after'] - w['before']):+.1f} "
            f"[{100 * low:+.1f}, {100 * high:+.1f}] | {w['truth'].removeprefix('will ')} | {w[basis]['auc']:.2f} "
            f"| {e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}] | {w[basis]['forecast'].removeprefix('will ')} "
            f"| {'yes' if w[basis]['forecast'] == w['truth'] else 'no'} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of a training")
    parser.add_argument("--prompts", type=int, default=64, help="that the probe sees")
    parser.add_argument("--runs", type=Path, default=Path("runs/probe"))
    parser.add_argument("--out", type=Path, required=True, help="path without suffix: .md and .json are written")
    args = parser.parse_args()

    import torch

    args.runs.mkdir(parents=True, exist_ok=True)
    worlds: dict[str, dict[str, Any]] = {}
    for name in WORLDS:
        folder = args.runs / name
        if not (folder / "model.safetensors").is_file():
            make_world(name, folder)
        measured = args.runs / f"{name}.truth.json"
        if not measured.is_file():
            train("vigor", folder, args.runs / f"{name}-vigor", args.steps)
            before, after = (shares(path, 300, 4) for path in (folder, args.runs / f"{name}-vigor" / "model"))
            measured.write_text(json.dumps(change(before, after)), "utf-8")
        worlds[name] = json.loads(measured.read_text("utf-8"))
        found = probe(folder, args.runs / f"{name}.probe.json", args.prompts)["signals"]["vigor"]
        worlds[name]["plain"] = {"estimate": found["auc"], "auc": found["auc"]["value"]}
        worlds[name]["answers"] = {"estimate": found["rival_auc"], "auc": found["auc"]["value"]}
        worlds[name]["majority"] = {"estimate": found["majority_rival_auc"], "auc": found["majority_auc"]["value"]}
        print(name, worlds[name], flush=True)
    lines, evens = [], {}
    titles = {
        "answers": "With answers: rival AUC",
        "majority": "Without answers: rival AUC against the most common answer",
        "plain": "With answers: plain AUC",
    }
    for basis, title in titles.items():
        for name, world in worlds.items():
            others = [w for other, w in worlds.items() if other != name]
            even = fit([w[basis]["estimate"]["value"] for w in others], [w["after"] - w["before"] for w in others])
            estimate = world[basis]["estimate"]
            world[basis]["forecast"] = verdict(estimate["low"], estimate["high"], even)
            world[basis]["break_even_without_it"] = even
        listed = list(worlds.values())
        evens[basis] = fit([w[basis]["estimate"]["value"] for w in listed], [w["after"] - w["before"] for w in listed])
        hits = sum(w[basis]["forecast"] == w["truth"] for w in listed)
        wrong = sum({w[basis]["forecast"], w["truth"]} == {"will help", "will collapse"} for w in listed)
        held = [w[basis]["break_even_without_it"] for w in listed]
        lines += [
            "",
            f"## {title}",
            "",
            f"Leave-one-world-out: {hits} of {len(listed)} forecasts right, {wrong} with the opposite verdict. "
            f"(To say *help* everywhere would be right {sum(w['truth'] == 'will help' for w in listed)} times.) "
            f"Break-even {evens[basis]:.2f} over all worlds, {min(held):.2f} to {max(held):.2f} with one left out.",
            "",
            *table(worlds, basis),
        ]
    head = [
        "# Results: the probe's forecast",
        "",
        f"Made by `python {' '.join(sys.argv)}` on {time.strftime('%Y-%m-%d')}: one thread of a 2-core CPU, torch "
        f"{torch.__version__}, seed 0. {len(worlds)} worlds. Truth: recipe `lab`, reward `vigor`, {args.steps} steps, "
        "one seed; change of sampled accuracy on 300 test questions of `lab:math` × 4 samples, with a 95 % bootstrap "
        f"interval over questions; *help* where the interval lies above +{100 * MARGIN:.0f} points, *collapse* below "
        f"-{100 * MARGIN:.0f}, else *neutral*. Probe: {args.prompts} other questions × 16 completions, before "
        "training. The forecast of a world uses a break-even fitted to the other worlds. What the numbers mean: "
        "[Probe](../probe.md).",
    ]
    args.out.with_suffix(".md").write_text("\n".join(head + lines) + "\n", "utf-8")
    facts = {"steps": args.steps, "prompts": args.prompts, "torch": torch.__version__, "break_even": evens}
    text = json.dumps({**facts, "date": time.strftime("%Y-%m-%d"), "worlds": worlds}, indent=1)
    args.out.with_suffix(".json").write_text(text + "\n", "utf-8")
    print("\n".join(head + lines))


if __name__ == "__main__":
    main()
