"""What per-sequence gradient norms cost: the loop, the batched method, and what they are measured against.

    python benchmarks/gradnorm.py                         # about 15 minutes on one core
    python benchmarks/gradnorm.py --shapes 512x8000x8x128 --rounds 5 --out gradnorm.json

For each shape (width x vocabulary x rows x tokens; Qwen2 architecture, 8 layers, tied embeddings, random weights) the
candidates take turns, and what counts is the ratio to a plain forward and backward *of the same round*; machines are
noisy. Peak memory (Linux only) is measured in a process of its own. CPU time is used, and glibc is told to keep freed
memory (as a caching allocator does): otherwise page faults slow the plain pass by up to 1.4 times and flatter the
others.

    train        forward and backward of the batch, giving ordinary gradients: what the ratios refer to
    forward      forward and log-probabilities, no gradients
    official     as the official code does it: row by row with its padding, all parameters' gradients
    loop         method="loop": row by row without padding
    batched      method="batched"
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

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
    "OMP_NUM_THREADS": "1",
}
SHAPES = ("512x8000x8x128", "512x8000x8x256", "512x8000x8x512", "512x32000x8x128", "256x8000x8x256", "1024x8000x8x128")


def candidates(shape: str, density: float) -> dict[str, Callable[[], object]]:
    """The things to time, by name, for a shape such as "512x8000x8x128" and a share of real tokens."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config
    from transformers.utils import logging

    from vigor.gradnorm import sequence_grad_norms

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
    spread = torch.linspace(0, 1, rows) ** (1 / density - 1) if density < 1 else torch.ones(rows)
    lengths = (8 + (tokens - 8) * spread).round().long()  # their mean is about density x tokens
    attention = (torch.arange(tokens) < lengths[:, None]).long()
    completion = attention.clone()
    completion[:, :4] = 0

    def log_probabilities(at: slice) -> torch.Tensor:
        logits = model(input_ids=ids[at], attention_mask=attention[at], use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(-1, ids[at][:, 1:, None]).squeeze(-1)

    def loss(at: slice) -> torch.Tensor:
        mask = completion[at][:, 1:]
        return -((log_probabilities(at) * mask).sum(1) / mask.sum(1)).sum()

    def train() -> None:
        loss(slice(None)).backward()
        model.zero_grad(set_to_none=False)

    def forward() -> None:
        with torch.no_grad():
            loss(slice(None))

    def official() -> list[torch.Tensor]:
        parameters = list(model.parameters())
        norms = []
        for b in range(rows):
            grads = torch.autograd.grad(loss(slice(b, b + 1)), parameters)
            norms.append(sum((g**2).sum() for g in grads).sqrt())
        return norms

    def norms(method: str) -> Callable[[], object]:
        return lambda: sequence_grad_norms(model, ids, attention, completion, method=method, self_check=False)

    return {
        "train": train,
        "forward": forward,
        "official": official,
        "loop": norms("loop"),
        "batched": norms("batched"),
    }


def peak(shape: str, density: float, name: str) -> float:
    """MB that one candidate adds to the peak of a fresh process; `train` keeps its gradients, as training does."""
    command = [sys.executable, __file__, "--peak", name, "--shapes", shape, "--density", str(density)]
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def print_peak(shape: str, density: float, name: str) -> None:
    made = candidates(shape, density)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is in use
    before = resident("VmRSS")
    made[name]()
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """MB, from Linux's account of this process; getrusage would report the parent's peak as the child's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def time_shape(shape: str, density: float, rounds: int) -> dict[str, dict[str, float]]:
    """Median, quartiles of the ratio to `train`, and seconds, by candidate."""
    made = candidates(shape, density)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for name in made:  # warm-up
        made[name]()
    for _ in range(rounds):
        for name, run in made.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    results = {}
    for name, values in seconds.items():
        ratios = [value / reference for value, reference in zip(values, seconds["train"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        results[name] = {"ratio": median(ratios), "low": low, "high": high, "seconds": median(values)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="width x vocabulary x rows x tokens")
    parser.add_argument("--density", type=float, default=1.0, help="share of real tokens in the padded batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return print_peak(args.shapes[0], args.density, args.peak)
    if any(os.environ.get(key) != value for key, value in ALLOCATOR.items()):
        os.environ.update(ALLOCATOR)  # read by glibc at start only
        os.execv(sys.executable, [sys.executable, *sys.argv])

    everything = {}
    print(f"CPU time relative to train, density {args.density:g}, median of {args.rounds} rounds [quartiles]; peak MB")
    for shape in args.shapes:
        results = time_shape(shape, args.density, args.rounds)
        for name in results:
            results[name]["peak_mb"] = peak(shape, args.density, name)
        everything[shape] = results
        print(f"\n{shape}")
        for name, r in results.items():
            print(
                f"  {name:<9}{r['ratio']:6.2f} [{r['low']:.2f}, {r['high']:.2f}]  {r['seconds']:7.2f} s  "
                f"{r['peak_mb']:6.0f} MB",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps({"density": args.density, "shapes": everything}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
