"""What gradient norms and the fused update cost at the least, in operations and bytes: pure arithmetic.

    python benchmarks/floor.py --out docs/results/floor.md
    python benchmarks/floor.py --config path/to/model --lengths 512 4096
    python benchmarks/floor.py --measured gradnorm.json --out docs/results/floor.md    # benchmarks/gradnorm.py --out

One sequence of T tokens, all of whose positions are counted. Operations are the multiplications and additions of matrix
products, 2·m·n·k for (m, k) times (k, n); element-wise work is left out. Attention is causal; its backward pass takes
2.5 times its forward pass, as in kernels that compute the scores again. The plain pass is one forward and one backward
that give ordinary gradients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vigor.flops import (
    MODELS,
    PROJECTIONS,
    Shape,
    benchmark_shape,
    cost,
    direct,
    gram,
    kept_bytes,
    matrices,
    parameters,
    shape_of,
    strips,
    takes_gram,
)

LENGTHS = (512, 1024, 3072)
BENCHMARKS = ("512x8000x8x128", "512x8000x8x256", "512x8000x8x512", "512x32000x8x128", "1024x8000x8x128")
"""Shapes of benchmarks/gradnorm.py: width x vocabulary x rows x tokens."""


def read_shape(folder: str) -> Shape:
    """The shape in a model folder's config.json, with transformers' defaults for what it leaves out."""
    from transformers import AutoConfig

    return shape_of(AutoConfig.from_pretrained(folder))


def gram_bytes(s: Shape, T: int) -> float:
    """Gram strips in float32, written once and read once."""
    n = strips(T)
    strip = (n + 1) / (2 * n) * T * T * 4 * 2
    chosen = [m for m in matrices(s) if takes_gram(T, m.p, m.q)]
    sources = {m.source: m.count for m in chosen}
    return strip * (sum(m.count for m in chosen) + sum(sources.values()))


def block_bytes(s: Shape, T: int) -> int:
    """Gradients of the directly computed matrices in float32, written once and read once, through a block of 16 MiB."""
    return sum(m.p * m.q * m.count * 4 * 2 for m in matrices(s) if not takes_gram(T, m.p, m.q))


# Report ---------------------------------------------------------------------------------------------------------------


def cost_table(models: dict[str, Shape], lengths: Sequence[int]) -> Iterator[str]:
    """TFLOP of one sequence."""
    yield "| model | T | forward | backward | norms pass | sketch pass | fused, keep | fused, retain | two passes |"
    yield "|---|" + "---:|" * 8
    for name, shape in models.items():
        for T in lengths:
            c = cost(shape, T)
            values = (c.forward, c.backward, c.norms, c.sketch, c.keep, c.retain, c.two_passes)
            yield f"| {name} | {T} | " + " | ".join(f"{x / 1e12:.2f}" for x in values) + " |"


def ratio_table(models: dict[str, Shape], lengths: Sequence[int]) -> Iterator[str]:
    """The same as ratios to the plain pass."""
    yield (
        "| model | T | norms: direct | norms: cheapest | **norms: library** | sketch | **fused, keep** | "
        "fused, retain | two passes |"
    )
    yield "|---|" + "---:|" * 8
    for name, shape in models.items():
        for T in lengths:
            c = cost(shape, T)
            values = (c.direct, c.cheapest, c.norms, c.sketch, c.keep, c.retain, c.two_passes)
            direct_, cheapest, norms, sketch, keep, retain, two = (f"{x / c.plain:.2f}" for x in values)
            yield (
                f"| {name} | {T} | {direct_} | {cheapest} | **{norms}** | {sketch} | **{keep}** | {retain} | {two} |"
            )


def matrix_table(shape: Shape, lengths: Sequence[int]) -> Iterator[str]:
    """Gram and direct, for each matrix, in GFLOP; the cheaper one is marked."""
    yield "| matrix | p | q | number | Gram up to T = | " + " | ".join(f"T = {T}: Gram, direct" for T in lengths) + " |"
    yield "|---|" + "---:|" * (4 + len(lengths))
    for m in matrices(shape):
        last = next(T for T in range(2 * m.p * m.q // (m.p + m.q), 0, -1) if takes_gram(T, m.p, m.q))
        cells = []
        for T in lengths:
            pair = [f"{x / 1e9:.1f}" for x in (gram(T, m.p) + gram(T, m.q), direct(T, m.p, m.q))]
            best = 0 if takes_gram(T, m.p, m.q) else 1
            pair[best] = f"**{pair[best]}**"
            cells.append(", ".join(pair))
        yield f"| `{m.name}` | {m.p} | {m.q} | {m.count} | {last:.0f} | " + " | ".join(cells) + " |"


def byte_table(models: dict[str, Shape], lengths: Sequence[int]) -> Iterator[str]:
    """GB of one sequence."""
    yield "| model | T | loop: gradients | batched: Gram strips | batched: blocks | fused, keep: held |"
    yield "|---|" + "---:|" * 5
    for name, shape in models.items():
        for T in lengths:
            loop = parameters(shape) * 2 * 2
            values = [loop, gram_bytes(shape, T), block_bytes(shape, T), kept_bytes(shape, T)]
            yield f"| {name} | {T} | " + " | ".join(f"{x / 1e9:.2f}" for x in values) + " |"


def benchmark_table(measured: dict[str, Any], layers: int) -> Iterator[str]:
    """The CPU benchmark's shapes: least ratios, and those that were measured."""
    floored = ("batched", "sketch", "keep", "retain", "two-pass")
    shown = [name for name in floored if any(name in results for results in measured.values())]
    columns = ["width × vocabulary × rows × tokens", "norms", "sketch", "fused, keep", "fused, retain", "two passes"]
    yield "| " + " | ".join([*columns, *(f"measured `{name}`" for name in shown)]) + " |"
    yield "|---|" + "---:|" * (5 + len(shown))
    for text in dict.fromkeys([*BENCHMARKS, *measured]):
        c = cost(*benchmark_shape(text, layers))
        cells = [f"{x / c.plain:.2f}" for x in (c.norms, c.sketch, c.keep, c.retain, c.two_passes)]
        for name in shown:
            known = name in measured.get(text, {})
            cells.append(f"{measured[text][name]['ratio']:.2f}" if known else "–")
        yield f"| {text.replace('x', ' × ')} | " + " | ".join(cells) + " |"


def report(
    models: dict[str, Shape], lengths: Sequence[int], measured: dict[str, Any], layers: int, command: str
) -> Iterator[str]:
    """The page."""
    yield from ("# Floors", "", f"Made by `{command}`; derived in [How the norm is computed](../gradnorm.md).", "")
    yield from (__doc__ or "").strip().splitlines()[6:]
    yield from ("", "## Operations", "", "TFLOP of one sequence:", "")
    yield from cost_table(models, lengths)
    yield from ("", f"Ratios to the plain pass (sketch: {PROJECTIONS} projections a matrix):", "")
    yield from ratio_table(models, lengths)
    for name, shape in models.items():
        yield from ("", f"## Gram or direct: {name}", "")
        yield "GFLOP for one matrix and one sequence, the library's choice in bold; A Aᵀ is counted even if shared."
        yield ""
        yield from matrix_table(shape, lengths)
    yield from ("", "## Bytes", "")
    yield "GB of one sequence. Loop: a bfloat16 gradient of the model's size, written once and read once. Batched: Gram"
    yield "strips in float32, written once and read once; blocks: the same for directly computed gradients, but through"
    yield "one block of at most 16 MiB, which may stay in a cache. Held: what the fused update keeps between norms and"
    yield "weights, in bfloat16 (sequences' gradients in float32)."
    yield ""
    yield from byte_table(models, lengths)
    yield from ("", "## The CPU benchmark's shapes", "")
    yield "Ratios to the plain pass. Measured: `benchmarks/gradnorm.py`, see [What the norm costs](../performance.md)."
    yield ""
    yield from benchmark_table(measured, layers)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--config", nargs="+", default=[], help="model folders (or hub names), instead of --models")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens of a sequence")
    parser.add_argument("--measured", type=Path, help="JSON file of benchmarks/gradnorm.py")
    parser.add_argument("--out", type=Path, help="Markdown file; printed otherwise")
    args = parser.parse_args(argv)
    models = {folder: read_shape(folder) for folder in args.config} or {name: MODELS[name] for name in args.models}
    measured: dict[str, Any] = {}
    layers, command = 8, "python benchmarks/floor.py"
    if args.measured:
        found = json.loads(args.measured.read_text("utf-8"))
        if found["density"] != 1 or found["lora"] or found["checkpointing"]:
            raise SystemExit(
                f"{args.measured} was measured at density {found['density']}, LoRA rank {found['lora']}, checkpointing "
                f"{found['checkpointing']}; floors are for density 1, all parameters, no checkpointing."
            )
        measured, layers = found["shapes"], found["layers"]
        command += f" --measured {args.measured}"
    text = "\n".join(report(models, args.lengths, measured, layers, command)) + "\n"
    if args.out:
        args.out.write_text(text, "utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
