"""What per-sequence gradient norms, and the update fused with them, cost beside a plain training pass.

    python benchmarks/gradnorm.py                         # about 40 minutes on one core
    python benchmarks/gradnorm.py --shapes 512x8000x8x128 --rounds 5 --out gradnorm.json
    python benchmarks/gradnorm.py --batch 8 16 --tokens 128 256 512 --vocabulary 8000 32000 --minutes 15 --no_peak
    PYTHONPATH=/tmp/opacus python benchmarks/gradnorm.py --only opacus batched --batch 8 --tokens 128 256
    python benchmarks/gradnorm.py --lora 16 --shapes 512x8000x8x256
    python benchmarks/gradnorm.py --device cuda --dtype bfloat16 --layers 24 --shapes 896x151936x8x1024
    python benchmarks/gradnorm.py --plot gradnorm.json --out docs/results/gradnorm.png

For each shape (width x vocabulary x rows x tokens; Qwen2 architecture, tied embeddings, random weights) the candidates
take turns, and what counts is the ratio to the reference *of the same round*; machines are noisy. Peak memory (on a CPU
Linux only, and in a process of its own) is what a candidate adds. On a CPU it is CPU time, and glibc is told to keep
freed memory (as a caching allocator does): otherwise page faults slow the plain pass by up to 1.4 times and flatter the
others.

    train        forward and backward of the batch, giving ordinary gradients: what the ratios refer to
    forward      forward and log-probabilities, no gradients
    inputs       forward, and backward down to the embeddings without any parameter's gradient: what every method that
                 works on exact output gradients does first, so that none can cost less
    official     as the official code does it: row by row with its padding, all parameters' gradients
    loop         method="loop": row by row without padding
    batched      method="batched"
    gram, direct the same with one of its two forms for every matrix
    sketch       method="sketch", 32 projections
    vmap         torch.func: vmap of the gradient over the rows
    opacus       Opacus' ghost norms, if opacus is there (untied embeddings: it refuses tied ones); the pass also forms
                 the ordinary gradient
    grpo         the update of TRL's GRPOTrainer: forward and backward with its own head, entropies included
    two-pass     batched, then grpo
    keep         fused_grad_norms(mode="keep"), entropies, and the update from it
    retain       the same with mode="retain"
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
    "OMP_NUM_THREADS": "1",
}
SHAPES = ("512x8000x8x128", "512x8000x8x256", "512x8000x8x512", "512x32000x8x128", "256x8000x8x256", "1024x8000x8x128")


@dataclass(frozen=True)
class Case:
    """A model and a batch to measure on."""

    shape: str
    density: float = 1.0
    layers: int = 8
    lora: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    checkpointing: bool = False

    def flags(self) -> list[str]:
        """The command line that stands for it."""
        flags = ["--shapes", self.shape, "--density", str(self.density), "--layers", str(self.layers)]
        flags += ["--lora", str(self.lora), "--device", self.device, "--dtype", self.dtype]
        return flags + (["--checkpointing"] if self.checkpointing else [])


def candidates(case: Case) -> dict[str, Callable[[], object]]:
    """The things to time, by name."""
    import torch
    from torch.func import functional_call, grad, vmap
    from transformers import AutoModelForCausalLM, Qwen2Config
    from transformers.utils import logging
    from trl.trainer.utils import add_fused_lm_head

    from vigor.gradnorm import fused_grad_norms, sequence_grad_norms, squares

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, vocabulary, rows, tokens = map(int, case.shape.split("x"))
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=case.layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        intermediate_size=width * 11 // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )

    def build(**changes: object) -> torch.nn.Module:
        torch.manual_seed(0)
        built = AutoModelForCausalLM.from_config(Qwen2Config(**{**config.to_dict(), **changes}))
        return built.to(case.device, getattr(torch, case.dtype)).train()

    model = build()
    if case.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=case.lora, target_modules="all-linear", init_lora_weights=False))
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trainable = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(3, vocabulary, (rows, tokens))
    spread = torch.linspace(0, 1, rows) ** (1 / case.density - 1) if case.density < 1 else torch.ones(rows)
    lengths = (8 + (tokens - 8) * spread).round().long()  # their mean is about density x tokens
    attention = (torch.arange(tokens) < lengths[:, None]).long()
    completion = attention.clone()
    completion[:, :4] = 0
    ids, attention, completion = (x.to(case.device) for x in (ids, attention, completion))
    advantages = torch.linspace(-1, 1, rows, device=case.device)[:, None]

    def loss(at: slice) -> torch.Tensor:
        logits = model(input_ids=ids[at], attention_mask=attention[at], use_cache=False).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(-1, ids[at][:, 1:, None]).squeeze(-1)
        mask = completion[at][:, 1:]
        return -((logps * mask).sum(1) / mask.sum(1)).sum()

    def update(logps: torch.Tensor, mask: torch.Tensor) -> None:
        ratio = torch.exp(logps - logps.detach())
        per_token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        ((per_token * mask).sum(1) / mask.sum(1)).mean().backward()
        model.zero_grad(set_to_none=False)

    def train() -> None:
        loss(slice(None)).backward()
        model.zero_grad(set_to_none=False)

    def forward() -> None:
        with torch.no_grad():
            loss(slice(None))

    frozen = copy.deepcopy(model).requires_grad_(False)

    def inputs() -> None:
        embeddings = frozen.get_input_embeddings()(ids).requires_grad_()
        logits = frozen(inputs_embeds=embeddings, attention_mask=attention, use_cache=False).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        mask = completion[:, 1:]
        torch.autograd.grad(-((logps * mask).sum(1) / mask.sum(1)).sum(), embeddings)

    def official() -> list[torch.Tensor]:
        norms = []
        for b in range(rows):
            grads = torch.autograd.grad(loss(slice(b, b + 1)), trainable)
            norms.append(sum((g**2).sum() for g in grads).sqrt())
        return norms

    def norms(method: str) -> Callable[[], object]:
        return lambda: sequence_grad_norms(model, ids, attention, completion, method=method, self_check=False)

    def form(name: str) -> Callable[[], object]:
        def run() -> None:
            choose = squares.prefers_gram
            squares.prefers_gram = lambda T, p, q: name == "gram"
            try:
                norms("batched")()
            finally:
                squares.prefers_gram = choose

        return run

    def vmapped() -> torch.Tensor:
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def one(weights: dict[str, torch.Tensor], ids_L: torch.Tensor, mask_L: torch.Tensor) -> torch.Tensor:
            inputs = {"input_ids": ids_L[None], "use_cache": False}
            logits = functional_call(model, weights, (), inputs, tie_weights=True).logits[0, :-1]
            logps = logits.float().log_softmax(-1).gather(-1, ids_L[1:, None]).squeeze(-1)
            return -(logps * mask_L[1:]).sum() / mask_L[1:].sum()

        grads = vmap(grad(one), in_dims=(None, 0, 0))(weights, ids, completion)
        return sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()

    def grpo() -> None:
        out = patched(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
        update(out.log_probs, completion[:, 1:])

    def two_pass() -> None:
        norms("batched")()
        grpo()

    def fused(mode: str) -> Callable[[], object]:
        def run() -> None:
            entropy = torch.zeros(rows, tokens, device=case.device)

            def entropies(row_N: torch.Tensor, at_N: torch.Tensor, logits_NV: torch.Tensor, _: torch.Tensor) -> None:
                log_probs = logits_NV.log_softmax(-1)
                entropy[row_N, at_N] = -torch.einsum("nv,nv->n", log_probs.exp(), log_probs)

            result = fused_grad_norms(
                model, ids, attention, completion, mode=mode, self_check=False, on_logits=entropies
            )
            update(result.token_logps(), completion)

        return run

    # TRL patches the forward of the model it trains; the others shall not pay for that.
    patched = build() if not case.lora else copy.deepcopy(model)
    if case.lora:
        add_fused_lm_head(patched.get_base_model(), outputs=("log_probs", "entropy"))
    else:
        patched.load_state_dict(model.state_dict())
        add_fused_lm_head(patched, outputs=("log_probs", "entropy"))
        if case.checkpointing:
            patched.gradient_checkpointing_enable({"use_reentrant": False})
    labels = ids.masked_fill(completion == 0, -100)
    made: dict[str, Callable[[], object]] = {
        "train": train,
        "forward": forward,
        "inputs": inputs,
        "official": official,
        "loop": norms("loop"),
        "batched": norms("batched"),
        "gram": form("gram"),
        "direct": form("direct"),
        "sketch": norms("sketch"),
        "vmap": vmapped,
        "grpo": grpo,
        "two-pass": two_pass,
        "keep": fused("keep"),
        "retain": fused("retain"),
    }
    if importlib.util.find_spec("opacus"):
        made["opacus"] = _opacus(build(tie_word_embeddings=False), ids, attention, completion)
    return made


def _opacus(model: Any, ids: Any, attention: Any, completion: Any) -> Callable[[], object]:
    """Ghost norms: one forward and backward that also forms the ordinary gradient."""
    import opacus

    wrapped = opacus.GradSampleModuleFastGradientClipping(model, loss_reduction="sum", use_ghost_clipping=True)

    def run() -> None:
        logits = wrapped(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        mask = completion[:, 1:]
        (-((logps * mask).sum(1) / mask.sum(1)).sum()).backward()
        wrapped.get_norm_sample()
        wrapped.zero_grad()

    return run


def peak(case: Case, name: str) -> float:
    """MB that one candidate adds to the peak of a fresh process; `train` keeps its gradients, as training does."""
    command = [sys.executable, __file__, "--peak", name, *case.flags()]
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def print_peak(case: Case, name: str) -> None:
    made = candidates(case)
    if case.device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made[name]()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is in use
    before = resident("VmRSS")
    made[name]()
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """MB, from Linux's account of this process; getrusage would report the parent's peak as the child's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def clock(device: str) -> float:
    """Seconds: of this process's work on a CPU, on the wall on a GPU once its queue is empty."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def time_case(
    case: Case, rounds: int, only: list[str] | None, budget: float = float("inf")
) -> dict[str, dict[str, float]]:
    """Median and quartiles of the ratio to `train`, ratio to `grpo`, and seconds, by candidate.

    At most `rounds` rounds, and two at least; the third and later ones only if they fit into `budget` seconds.
    """
    began = time.monotonic()
    made = candidates(case)
    if only:
        made = {name: run for name, run in made.items() if name in {"train", "grpo", *only}}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for name, run in list(made.items()):  # warm-up
        try:
            run()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"  {name} cannot run here: {type(error).__name__}: {str(error).splitlines()[0]}")
            del made[name], seconds[name]
    for done in range(rounds):
        each = (time.monotonic() - began) / (done + 1)  # the warm-up is as long as a round
        if done >= 2 and time.monotonic() - began + each > budget:
            break
        for name, run in made.items():
            started = clock(case.device)
            run()
            seconds[name].append(clock(case.device) - started)
    results = {}
    for name, values in seconds.items():
        ratios = [value / reference for value, reference in zip(values, seconds["train"], strict=True)]
        to_grpo = [value / reference for value, reference in zip(values, seconds["grpo"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        results[name] = {"ratio": median(ratios), "low": low, "high": high, "to_grpo": median(to_grpo)}
        results[name]["seconds"] = median(values)
        results[name]["rounds"] = len(values)
    return results


def plot(files: list[Path], out: Path) -> None:
    """Ratio to `train` by shape, one line a candidate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = {key: value for file in files for key, value in json.loads(file.read_text("utf-8"))["shapes"].items()}
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for name in ("official", "batched", "sketch", "two-pass", "keep", "retain"):
        points = [(i, r[name]["ratio"]) for i, r in enumerate(shapes.values()) if name in r]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    labels = ["width {}\nvocabulary {}\n{} rows\n{} tokens".format(*key.split()[0].split("x")) for key in shapes]
    axes.set_xticks(range(len(shapes)), labels, fontsize=8)
    axes.set_ylabel("time relative to a plain forward and backward")
    axes.legend(ncols=3)
    figure.savefig(out, dpi=120)


def _shapes(args: argparse.Namespace) -> list[str]:
    """`--shapes`, or all combinations of the four sizes if one of them is given; the cheapest first."""
    sizes = (args.width, args.vocabulary, args.batch, args.tokens)
    if not any(sizes):
        return list(args.shapes)
    defaults = ([512], [8000], [8], [256])
    shapes = list(product(*(size or default for size, default in zip(sizes, defaults, strict=True))))
    shapes.sort(key=lambda shape: shape[2] * shape[3] * (shape[0] * 80 + shape[1]))
    return ["x".join(map(str, shape)) for shape in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="width x vocabulary x rows x tokens")
    for name, what in (("width", "hidden sizes"), ("vocabulary", "sizes"), ("batch", "rows"), ("tokens", "a row")):
        parser.add_argument(f"--{name}", nargs="+", type=int, help=f"{what}; instead of --shapes, all combinations")
    parser.add_argument("--minutes", type=float, help="stop a shape's rounds (after two) so that all take about this")
    parser.add_argument("--density", type=float, default=1.0, help="share of real tokens in the padded batch")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters on all linear layers; 0: train all")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", help="candidates to time beside train and grpo; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no_peak", action="store_true", help="leave out the peak memory, a process a candidate")
    parser.add_argument("--out", type=Path, help="JSON file; with --plot the picture")
    parser.add_argument("--plot", nargs="+", type=Path, help="draw these JSON files and stop")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plot:
        return plot(args.plot, args.out)
    cases = [
        Case(shape, args.density, args.layers, args.lora, args.device, args.dtype, args.checkpointing)
        for shape in _shapes(args)
    ]
    if args.peak:
        return print_peak(cases[0], args.peak)
    if args.device == "cpu" and any(os.environ.get(key) != value for key, value in ALLOCATOR.items()):
        os.environ.update(ALLOCATOR)  # read by glibc at start only
        os.execv(sys.executable, [sys.executable, *sys.argv])

    everything = {}
    until = time.monotonic() + (60 * args.minutes if args.minutes else float("inf"))
    print(
        f"{'CPU time' if args.device == 'cpu' else 'time'} relative to train [quartiles], to grpo; median of "
        f"{args.rounds} rounds; density {args.density:g}, {args.layers} layers, LoRA {args.lora or 'none'}, "
        f"{args.device}, {args.dtype}; peak MB"
    )
    for i, case in enumerate(cases):
        print(f"\n{case.shape}", flush=True)
        results = time_case(case, args.rounds, args.only, (until - time.monotonic()) / len(cases[i:]))
        for name, r in results.items():
            line = f"  {name:<9}{r['ratio']:6.2f} [{r['low']:.2f}, {r['high']:.2f}] {r['to_grpo']:6.2f}"
            line += f"  {r['seconds']:7.2f} s"
            if not args.no_peak:
                r["peak_mb"] = peak(case, name)
                line += f"  {r['peak_mb']:6.0f} MB"
            print(line, flush=True)
        everything[case.shape] = results
        if args.out:
            settings = {key: value for key, value in vars(args).items() if key not in ("out", "peak", "plot", "shapes")}
            args.out.write_text(json.dumps({**settings, "shapes": everything}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
