"""The README's table: every reward of this release on the lab, same base, same prompts, same budget, several seeds.

    python benchmarks/lab_table.py --out docs/results/lab        # 15 runs, about half an hour on 2 cores

Runs `vigor train --config lab` once a (reward, seed), reads the runs' results.json, and writes a Markdown table, the
learning curves, and everything as JSON. A finished run is not repeated. Intervals are Student's t over seeds: they hold
the spread between runs, not that between test prompts, which are the same for all.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

REWARDS = ("accuracy", "vigor", "self_certainty", "format", "random")
TASKS = ("lab:math", "lab:math-hard", "lab:code")
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantiles of Student's t with n - 1 degrees of freedom, by n."""


def train(reward: str, seed: int, config: str, steps: int, runs: Path) -> Path:
    """One run; returns its folder."""
    folder = runs / f"{config}-{reward}-{seed}"
    if (folder / "results.json").is_file():
        return folder
    if folder.exists():
        raise SystemExit(f"{folder} holds an unfinished run: remove it.")
    command = [sys.executable, "-m", "vigor", "train", "--config", config, "--reward_funcs", reward]
    command += ["--seed", str(seed), "--max_steps", str(steps), "--output_dir", str(folder)]
    with (runs / f"{folder.name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return folder


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over seeds, such as "72.3 ± 2.1"."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = T_QUANTILE[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.1f} ± {half:.1f}"


def table(results: dict[str, list[dict[str, Any]]], decoding: str) -> list[str]:
    """Markdown rows: base, then each reward, accuracy in percent."""
    base = next(iter(results.values()))[0]["before"]
    lines = ["| reward | " + " | ".join(f"`{task}`" for task in TASKS) + " |", "|---|" + "---:|" * len(TASKS)]
    lines.append("| base model | " + " | ".join(f"{100 * base[task][decoding]:.1f}" for task in TASKS) + " |")
    for reward, runs in results.items():
        cells = [interval([100 * run["after"][task][decoding] for run in runs]) for task in TASKS]
        lines.append(f"| `{reward}` | " + " | ".join(cells) + " |")
    return lines


def plot(folders: dict[str, list[Path]], path: Path) -> None:
    """Training accuracy and entropy against the step: mean over seeds, band from lowest to highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = (("rewards/accuracy/mean", "accuracy of the samples (lab:math)"), ("entropy", "entropy (nats a token)"))
    for i, (key, title) in enumerate(panels):
        axes = figure.add_subplot(1, 2, i + 1)
        for reward, runs in folders.items():
            logs = [(run / "metrics.jsonl").read_text("utf-8").splitlines() for run in runs]
            curves = [smooth([json.loads(line)[key] for line in lines]) for lines in logs]
            middle = [mean(at) for at in zip(*curves, strict=True)]
            (line,) = axes.plot(range(1, len(middle) + 1), middle, label=reward)
            low, high = ([f(at) for at in zip(*curves, strict=True)] for f in (min, max))
            axes.fill_between(range(1, len(middle) + 1), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def smooth(values: list[float], window: int = 10) -> list[float]:
    """Running mean over the last `window` values."""
    return [mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="lab")
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--runs", type=Path, default=Path("runs/lab-table"))
    parser.add_argument("--out", type=Path, required=True, help="path without suffix: .md, .json and .png are written")
    args = parser.parse_args()

    args.runs.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    jobs = [(reward, seed) for seed in args.seeds for reward in args.rewards]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda job: train(*job, args.config, args.steps, args.runs), jobs))
    folders: dict[str, list[Path]] = {reward: [] for reward in args.rewards}
    for (reward, _), folder in zip(jobs, done, strict=True):
        folders[reward].append(folder)
    results = {
        reward: [json.loads((run / "results.json").read_text()) for run in runs] for reward, runs in folders.items()
    }
    environment = json.loads((done[0] / "environment.json").read_text())
    score = results[args.rewards[0]][0]["before"][TASKS[0]]
    seeds = ", ".join(map(str, args.seeds))
    lines = [
        f"# Results: `{args.config}`",
        "",
        f"Made by `python {' '.join(sys.argv)}` on {environment['date'][:10]}: {environment['cpu_count']} CPU cores, "
        f"torch {environment['packages']['torch']}, one thread a run. Config `{args.config}`, {args.steps} steps, "
        f"seeds {seeds}; {score['n_prompts']} test prompts a task, {score['n_samples']} samples each. Accuracy in "
        "percent, mean over seeds ± 95 % interval (Student's t over seeds). Trained on `lab:math` only.",
        "",
        "Sampled accuracy (temperature 1):",
        "",
        *table(results, "sampled"),
        "",
        "Greedy accuracy:",
        "",
        *table(results, "greedy"),
        "",
        "Gain in sampled accuracy by seed, points:",
        "",
        "| reward | " + " | ".join(f"seed {s}: math / hard / code" for s in args.seeds) + " |",
        "|---|" + "---|" * len(args.seeds),
        *(
            f"| `{reward}` | "
            + " | ".join(
                " / ".join(f"{100 * (r['after'][t]['sampled'] - r['before'][t]['sampled']):+.1f}" for t in TASKS)
                for r in runs
            )
            + " |"
            for reward, runs in results.items()
        ),
        "",
        f"![Curves]({args.out.with_suffix('.png').name})",
    ]
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
    args.out.with_suffix(".json").write_text(json.dumps({"environment": environment, "results": results}, indent=1))
    plot(folders, args.out.with_suffix(".png"))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
