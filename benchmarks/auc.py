"""How well each intrinsic signal tells right completions from wrong ones of the same prompt, on the lab's base models.

    python benchmarks/auc.py --out docs/results/auc              # about 10 minutes on one core
    python benchmarks/auc.py --world lab-misaligned --prompts 50

Samples completions of test prompts at temperature 1, scores them with every intrinsic reward of the registry on one
policy pass, and writes the within-group AUC: the chance that a right completion scores above a wrong one of its prompt,
ties counting half. Groups that are all right or all wrong have no pair and do not count. Intervals are 95 % bootstrap
intervals over prompts. Beside it stands Kendall's tau-b between each signal and the exact norm's score, within groups,
averaged over the groups in which both vary.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = ("lab:math", "lab:math-hard", "lab:code")
LENGTH = "(shortest)"
"""Not a reward: minus the number of tokens, to tell a signal from a preference for short completions."""
Groups = list[list[float]]


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Tau-b, which allows for ties; None where one of the two does not vary."""
    agreeing = tied_x = tied_y = pairs = 0
    for i in range(len(x)):
        for j in range(i):
            a, b = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
            agreeing += a * b
            tied_x += a == 0
            tied_y += b == 0
            pairs += 1
    below = math.sqrt((pairs - tied_x) * (pairs - tied_y))
    return agreeing / below if below else None


def bootstrap(pairs: list[tuple[float, float]], rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of Σ won / Σ pairs when prompts are drawn again, from (won, pairs) of each prompt."""
    rng = random.Random(0)
    values = []
    for _ in range(rounds):
        drawn = rng.choices(pairs, k=len(pairs))
        values.append(sum(won for won, _ in drawn) / sum(n for _, n in drawn))
    values.sort()
    return values[round(0.025 * (rounds - 1))], values[round(0.975 * (rounds - 1))]


def scores_of(
    task: str, world: str, prompts: int, samples: int, seed: int
) -> tuple[dict[str, Groups], list[list[bool]]]:
    """Each signal's scores and whether the completions are right, by prompt."""
    import torch

    from vigor.lab.decode import complete
    from vigor.lab.tasks import is_correct, make_rows
    from vigor.lab.world import load
    from vigor.rewards import METHODS, get
    from vigor.rollouts import Rollouts
    from vigor.signals import PolicyPass

    torch.set_num_threads(1)
    model, tokenizer = load(world)
    rows = make_rows(task, "test", prompts)
    generator = torch.Generator().manual_seed(seed)
    groups = complete(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        n_samples=samples,
        max_new_tokens=72,
        temperature=1.0,
        generator=generator,
    )
    rewards = [get(name) for name, method in METHODS.items() if method.family == "intrinsic"]
    rewards.append(get("self_certainty(legacy_shift=True)"))
    needs = frozenset().union(*(reward.needs for reward in rewards))
    found: dict[str, Groups] = {name: [] for name in [*(reward.name for reward in rewards), LENGTH]}
    right = []
    for row, group in zip(rows, groups, strict=True):
        completions = group[1:]  # the first is greedy
        rollouts = Rollouts.from_token_ids(
            [tokenizer(row["prompt"])["input_ids"]] * samples,
            [completion.token_ids for completion in completions],
            group_size=samples,
            pad_token_id=tokenizer.pad_token_id,
            prompts=[row["prompt"]] * samples,
            completions=[completion.text for completion in completions],
        )
        policy = PolicyPass(model, rollouts, tokenizer=tokenizer, needs=needs)
        for reward in rewards:
            found[reward.name].append(reward.score(rollouts, policy).tolist())
        found[LENGTH].append([-float(len(completion.token_ids)) for completion in completions])
        right.append([is_correct(completion.text, row["answer"]) for completion in completions])
    return found, right


def measure(found: dict[str, Groups], right: list[list[bool]]) -> dict[str, dict[str, Any]]:
    """AUC, its interval, and tau to the exact norm, by signal."""
    from vigor.lab.separation import within_group_auc

    mixed = [i for i, group in enumerate(right) if any(group) and not all(group)]
    results = {}
    for name, groups in found.items():
        pairs = []
        for i in mixed:
            auc, rights = within_group_auc([groups[i]], [right[i]]), sum(right[i])
            n = rights * (len(right[i]) - rights)
            assert auc is not None
            pairs.append((auc * n, float(n)))
        taus = [tau for a, b in zip(groups, found["vigor"], strict=True) if (tau := kendall(a, b)) is not None]
        results[name] = {
            "auc": within_group_auc(groups, right),
            "interval": bootstrap(pairs),
            "tau": sum(taus) / len(taus),
            "mixed_prompts": len(mixed),
        }
    return results


def table(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Markdown rows, best on the first task first."""
    head = ["signal", *(f"AUC `{task}`" for task in results), *(f"τ `{task}`" for task in results)]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (2 * len(results))]
    first = next(iter(results.values()))
    for name in sorted(first, key=lambda name: -first[name]["auc"]):
        cells = [f"{r[name]['auc']:.3f} [{r[name]['interval'][0]:.3f}, {r[name]['interval'][1]:.3f}]"
                 for r in results.values()]  # fmt: skip
        cells += [f"{r[name]['tau']:.2f}" for r in results.values()]
        lines.append(f"| {name if name == LENGTH else f'`{name}`'} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", default="lab", choices=("lab", "lab-misaligned"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
    args = parser.parse_args()

    import torch

    started, results = time.monotonic(), {}
    for task in TASKS:
        found, right = scores_of(task, args.world, args.prompts, args.samples, args.seed)
        results[task] = measure(found, right)
        print(f"{task}: {time.monotonic() - started:.0f} s", flush=True)
    mixed = ", ".join(f"{next(iter(r.values()))['mixed_prompts']} on `{task}`" for task, r in results.items())
    flags = " ".join(f"--{key} {getattr(args, key)}" for key in ("world", "prompts", "samples", "seed"))
    lines = [
        f"# Within-group AUC of the intrinsic signals: `{args.world}`",
        "",
        f"Made by `python benchmarks/auc.py {flags}` on {time.strftime('%Y-%m-%d')}: one CPU core, torch "
        f"{torch.__version__}, seed {args.seed}, {(time.monotonic() - started) / 60:.0f} minutes. {args.samples} "
        f"completions of each of the first {args.prompts} test prompts, sampled from the base model at temperature 1. "
        "AUC: the chance that a right completion scores above a wrong one of its prompt, ties counting half, with a "
        f"95 % bootstrap interval over prompts; prompts with both kinds: {mixed}. τ: Kendall's tau-b to `vigor`'s "
        f"score within the group, averaged over groups. {LENGTH} is no reward: it prefers fewer tokens. Where "
        "two rewards have the same score and differ in its shape within the group, as `vigor` and `vigor_zscore` do, "
        "their rows are the same.",
        "",
        *table(results),
    ]
    print("\n".join(lines))
    if args.out:
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
        facts = {**vars(args), "out": str(args.out), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        args.out.with_suffix(".json").write_text(json.dumps({**facts, "tasks": results}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
