"""What a mix of rewards costs: the reward phase of `vigor` alone against that of several rewards on one policy pass.

    python benchmarks/signals.py                              # about 5 minutes on one core
    python benchmarks/signals.py --shapes 512x8000x8x128 --rounds 9 --out docs/results/signals

For each shape (width x vocabulary x rows x tokens; Qwen2 architecture, 8 layers, tied embeddings, random weights, the
first four tokens of each row its prompt) the candidates take turns, and what counts is the ratio to `vigor` of the same
round. CPU time, one thread, glibc told to keep freed memory as a caching allocator does. Peak memory (Linux only) is
what a candidate adds to a fresh process.

    vigor        the reward alone: the gradient norms' pass
    together     vigor, self_certainty, entropy and logprob; the pass is told ahead (`needs`)
    apart        the same four, the pass told nothing: a forward pass more
    everything   all intrinsic rewards that one pass serves
    token_stats  self_certainty, entropy and logprob without vigor: the forward pass by itself
    log_softmax  what token_stats replaces: the whole (rows x tokens x vocabulary) log-softmax, and its entropies
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

from gradnorm import ALLOCATOR, resident

SHAPES = ("512x8000x8x128", "256x32000x8x128", "512x32000x8x128", "1024x32000x4x128")
TOGETHER = ("vigor", "self_certainty", "entropy", "logprob")
EVERYTHING = (
    *TOGETHER, "vigor_focal", "logit_grad_norm", "em_rl_token", "em_rl_sequence", "logprob_sum", "logprob_min",
    "mean_prob", "max_prob", "margin", "collision", "token_rank",
)  # fmt: skip


def candidates(shape: str) -> dict[str, Callable[[], object]]:
    """The things to time, by name."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config
    from transformers.utils import logging

    from vigor.rewards import get
    from vigor.rollouts import Rollouts
    from vigor.signals import PolicyPass

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, vocabulary, rows, tokens = map(int, shape.split("x"))
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=8,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        intermediate_size=width * 11 // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, vocabulary, (rows, tokens))
    completion = torch.ones_like(ids)
    completion[:, :4] = 0
    rollouts = Rollouts(ids, torch.ones_like(ids), completion, group_size=rows)

    def phase(names: tuple[str, ...], *, told: bool) -> Callable[[], object]:
        rewards = [get(name) for name in names]
        needs = frozenset().union(*(reward.needs for reward in rewards)) if told else frozenset()

        def run() -> list[torch.Tensor]:
            policy = PolicyPass(model, rollouts, micro_batch=rows, needs=needs)
            return [reward(rollouts, policy) for reward in rewards]

        return run

    @torch.no_grad()
    def log_softmax() -> list[torch.Tensor]:
        logps = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        chosen = logps.gather(-1, ids[:, 1:, None])
        return [chosen, -(logps.exp() * logps).sum(-1), -logps.mean(-1)]

    return {
        "vigor": phase(("vigor",), told=True),
        "together": phase(TOGETHER, told=True),
        "apart": phase(TOGETHER, told=False),
        "everything": phase(EVERYTHING, told=True),
        "token_stats": phase(TOGETHER[1:], told=True),
        "log_softmax": log_softmax,
    }


def print_peak(shape: str, name: str) -> None:
    made = candidates(shape)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is in use
    before = resident("VmRSS")
    made[name]()
    print(resident("VmHWM") - before)


def peak(shape: str, name: str) -> float:
    """MB that one candidate adds to the peak of a fresh process."""
    command = [sys.executable, __file__, "--peak", name, "--shapes", shape]
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def time_shape(shape: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of the ratio to `vigor`, and seconds, by candidate."""
    made = candidates(shape)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for run in made.values():  # warm-up, with the norms' self-check
        run()
    for _ in range(rounds):
        for name, run in made.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    results = {}
    for name, values in seconds.items():
        ratios = [value / reference for value, reference in zip(values, seconds["vigor"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        results[name] = {"ratio": median(ratios), "low": low, "high": high, "seconds": median(values)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="width x vocabulary x rows x tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return print_peak(args.shapes[0], args.peak)
    if any(os.environ.get(key) != value for key, value in ALLOCATOR.items()):
        os.environ.update(ALLOCATOR)  # read by glibc at start only
        os.execv(sys.executable, [sys.executable, *sys.argv])

    import torch

    everything = {}
    for shape in args.shapes:
        everything[shape] = time_shape(shape, args.rounds)
        for name in everything[shape]:
            everything[shape][name]["peak_mb"] = peak(shape, name)
    names = list(next(iter(everything.values())))
    lines = [
        "# What a mix of rewards costs",
        "",
        f"Made by `python benchmarks/signals.py --rounds {args.rounds}` on {time.strftime('%Y-%m-%d')}: one thread of "
        f"{os.cpu_count()} CPU cores, torch {torch.__version__}, seed 0. CPU time of the reward phase relative to "
        "`vigor` alone in the same round, median [quartiles]; MB that it adds to the peak of a fresh process. The "
        "script says what each row is.",
        "",
        "| width x vocabulary x rows x tokens | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for shape, results in everything.items():
        cells = [f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}], {r['peak_mb']:.0f} MB" for r in results.values()]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if args.out:
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
        args.out.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
