"""How well agreement and reference likelihood tell right completions from wrong ones, on the lab's base models.

    python benchmarks/agreement.py --out docs/results/agreement              # a few minutes on one core

Each test question is asked in two wordings (`vigor.lab.paraphrase`), each wording is sampled at temperature 1, and
every reward of the families "agreement" and "reference" scores the samples. The teacher of co_rewarding_2 is the base
itself with random numbers of its own, as at the first step of a run. Written: the within-group AUC (the chance that a
right completion scores above a wrong one of its prompt, ties counting half; 95 % bootstrap intervals over prompts), and
how often the majority's answer is right.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from auc import TASKS, bootstrap

VARIANTS = ("rlpr(baseline=none)", "reference_logprob(mean=True)")


def measure(task: str, world: str, questions: int, samples: int, seed: int) -> dict[str, Any]:
    """AUC of each reward, its interval, and the share of questions whose majority is right."""
    import torch

    from vigor.lab.decode import complete
    from vigor.lab.paraphrase import make_pairs
    from vigor.lab.separation import within_group_auc
    from vigor.lab.tasks import is_correct
    from vigor.lab.world import load
    from vigor.rewards import METHODS, get
    from vigor.rewards.agreement import boxed_answer, majority_at_k
    from vigor.rewards.base import TEACHER
    from vigor.rollouts import Rollouts
    from vigor.signals import PolicyPass

    torch.set_num_threads(1)
    model, tokenizer = load(world)
    rows = make_pairs(task, "test", questions)
    prompts = [str(row["prompt"]) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    sampled, teacher = (
        [
            group[1:]  # the first is greedy
            for group in complete(
                model, tokenizer, prompts, n_samples=samples, max_new_tokens=72, temperature=1.0, generator=generator
            )
        ]
        for _ in range(2)
    )
    rewards = [get(name) for name, m in METHODS.items() if m.family in ("agreement", "reference")]
    rewards += [get(spec) for spec in VARIANTS]
    scores: dict[str, list[list[float]]] = {reward.name: [] for reward in rewards}
    right: list[list[bool]] = []
    majorities = []
    for first in range(0, len(rows), 2):
        both = (first, first + 1)
        completions = [c for i in both for c in sampled[i]]
        rollouts = Rollouts.from_token_ids(
            [tokenizer(prompts[i])["input_ids"] for i in both for _ in range(samples)],
            [c.token_ids for c in completions],
            group_size=samples,
            pad_token_id=tokenizer.pad_token_id,
            completions=[c.text for c in completions],
            columns={
                "answer": [rows[first]["answer"]] * (2 * samples),
                "pair": [rows[first]["pair"]] * (2 * samples),
                TEACHER: [c.text for i in both for c in teacher[i]],
            },
        )
        policy = PolicyPass(model, rollouts, tokenizer=tokenizer)
        for reward in rewards:
            scores[reward.name] += reward.score(rollouts, policy).view(2, samples).tolist()
        for i in both:
            right.append([is_correct(c.text, str(rows[i]["answer"])) for c in sampled[i]])
            answers = [boxed_answer(c.text) for c in sampled[i]]
            majorities.append(majority_at_k(answers, str(rows[i]["answer"]), samples))
    mixed = [i for i, group in enumerate(right) if any(group) and not all(group)]
    results = {}
    for name, groups in scores.items():
        pairs = [(within_group_auc([groups[i]], [right[i]]), sum(right[i])) for i in mixed]
        sizes = [float(n * (samples - n)) for _, n in pairs]
        won = [(auc * size, size) for (auc, _), size in zip(pairs, sizes, strict=True)]
        results[name] = {"auc": within_group_auc(groups, right), "interval": bootstrap(won)}
    accuracy = sum(map(sum, right)) / (len(right) * samples)
    return {
        "rewards": results,
        "mixed_prompts": len(mixed),
        "accuracy": accuracy,
        "original": sum(map(sum, right[::2])) / (questions * samples),
        "paraphrase": sum(map(sum, right[1::2])) / (questions * samples),
        "majority": sum(majorities) / len(majorities),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", default="lab", choices=("lab", "lab-misaligned"))
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
    args = parser.parse_args()

    import torch

    started, results = time.monotonic(), {}
    for task in TASKS:
        results[task] = measure(task, args.world, args.questions, args.samples, args.seed)
        print(f"{task}: {time.monotonic() - started:.0f} s", flush=True)
    flags = " ".join(f"--{key} {getattr(args, key)}" for key in ("world", "questions", "samples", "seed"))
    mixed = ", ".join(f"{r['mixed_prompts']} on `{task}`" for task, r in results.items())
    lines = [
        f"# Within-group AUC of agreement and reference likelihood: `{args.world}`",
        "",
        f"Made by `python benchmarks/agreement.py {flags}` on {time.strftime('%Y-%m-%d')}: one CPU core, torch "
        f"{torch.__version__}, {(time.monotonic() - started) / 60:.0f} minutes. {args.questions} test questions in two "
        f"wordings each, {args.samples} completions of each wording, sampled from the base model at temperature 1. "
        "AUC: the chance that a right completion scores above a wrong one of its prompt, ties counting half, with a "
        f"95 % bootstrap interval over prompts; prompts with both kinds: {mixed}. A reward of 0 and 1 ties within each "
        "class, so that its AUC is 1 where the label is right and ½ or less where it is wrong.",
        "",
        f"| reward | {' | '.join(f'`{task}`' for task in results)} |",
        "|---|" + "---:|" * len(results),
    ]
    for name in next(iter(results.values()))["rewards"]:
        cells = [r["rewards"][name] for r in results.values()]
        shown = [f"{c['auc']:.3f} [{c['interval'][0]:.3f}, {c['interval'][1]:.3f}]" for c in cells]
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    lines += ["", "Accuracy in percent:", "", f"| | {' | '.join(f'`{task}`' for task in results)} |"]
    lines += ["|---|" + "---:|" * len(results)]
    for label, key in (
        ("sampled, first wording", "original"),
        ("sampled, other wording", "paraphrase"),
        (f"majority of {args.samples}", "majority"),
    ):
        lines.append(f"| {label} | " + " | ".join(f"{100 * r[key]:.1f}" for r in results.values()) + " |")
    print("\n".join(lines))
    if args.out:
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
        facts = {**vars(args), "out": str(args.out), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        args.out.with_suffix(".json").write_text(json.dumps({**facts, "tasks": results}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
