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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STRIP, MAX_STRIPS = 128, 8
"""As in vigor.gradnorm.squares: rows of a strip at the least, strips at the most."""
PROJECTIONS = 32
"""Random projections a matrix, of the sketch."""


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention and a gated feed-forward part (Qwen2, Llama and their like)."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    activation_bytes: int = 2
    """Of one activation: 2 in bfloat16, 4 in float32."""


MODELS = {
    "Qwen2.5-0.5B": Shape(896, 24, 4864, 14, 2, 64, 151_936, True),
    "Qwen2.5-1.5B": Shape(1536, 28, 8960, 12, 2, 128, 151_936, True),
    "Qwen2.5-3B": Shape(2048, 36, 11_008, 16, 2, 128, 151_936, True),
    "Qwen2.5-7B": Shape(3584, 28, 18_944, 28, 4, 128, 152_064, False),
}
LENGTHS = (512, 1024, 3072)
BENCHMARKS = ("512x8000x8x128", "512x8000x8x256", "512x8000x8x512", "512x32000x8x128", "1024x8000x8x128")
"""Shapes of benchmarks/gradnorm.py: width x vocabulary x rows x tokens."""


def benchmark_shape(text: str, layers: int) -> tuple[Shape, int]:
    """The model of benchmarks/gradnorm.py for such a shape, and T."""
    width, vocabulary, _, tokens = map(int, text.split("x"))
    return Shape(width, layers, width * 11 // 4, width // 64, max(1, width // 256), 64, vocabulary, True, 4), tokens


def read_shape(folder: str) -> Shape:
    """The shape in a model folder's config.json, with transformers' defaults for what it leaves out."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(folder)
    head_dim = vars(c).get("head_dim") or c.hidden_size // c.num_attention_heads
    sizes = c.hidden_size, c.num_hidden_layers, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads
    return Shape(*sizes, head_dim, c.vocab_size, c.tie_word_embeddings)


@dataclass(frozen=True)
class Matrix:
    """`count` linear maps from p to q numbers; those of a layer with the same `source` have the same input."""

    name: str
    p: int
    q: int
    count: int
    source: str


def matrices(s: Shape) -> list[Matrix]:
    """Every linear map, the output head last."""
    wide, narrow = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return [
        Matrix("q_proj", s.hidden, wide, s.layers, "attention"),
        Matrix("k_proj", s.hidden, narrow, s.layers, "attention"),
        Matrix("v_proj", s.hidden, narrow, s.layers, "attention"),
        Matrix("o_proj", wide, s.hidden, s.layers, "attended"),
        Matrix("gate_proj", s.hidden, s.intermediate, s.layers, "feed-forward"),
        Matrix("up_proj", s.hidden, s.intermediate, s.layers, "feed-forward"),
        Matrix("down_proj", s.intermediate, s.hidden, s.layers, "activated"),
        Matrix("lm_head", s.hidden, s.vocabulary, 1, "final"),
    ]


# Operations -----------------------------------------------------------------------------------------------------------


def products(s: Shape, T: int) -> int:
    """Of the linear maps, once: the forward pass, the input gradients and the weight gradients cost this each."""
    return sum(2 * T * m.p * m.q * m.count for m in matrices(s))


def attention(s: Shape, T: int, *, causal: bool = True) -> float:
    """Scores and weighted values, forward."""
    return 4 * T * T * s.heads * s.head_dim * s.layers * (0.5 if causal else 1)


def strips(T: int) -> int:
    """In how many strips the lower triangle of a Gram matrix is computed."""
    return max(1, min(MAX_STRIPS, T // STRIP))


def gram(T: int, d: int) -> float:
    """Lower triangle of X Xᵀ for X (T, d), in strips."""
    n = strips(T)
    return sum(2 * (T * (i + 1) // n - T * i // n) * (T * (i + 1) // n) * d for i in range(n))


def direct(T: int, p: int, q: int) -> int:
    """Gᵀ A."""
    return 2 * T * p * q


def takes_gram(T: int, p: int, q: int) -> bool:
    """The library's choice for one matrix; it leaves out that A Aᵀ may be there already."""
    n = strips(T)
    return (n + 1) / n * T * (p + q) <= 2 * p * q


def keeps_gradient(s: Shape, T: int, m: Matrix) -> bool:
    """Whether the fused update keeps a sequence's float32 gradient rather than its inputs and output gradients."""
    return 4 * m.p * m.q <= s.activation_bytes * T * (m.p + m.q)


def linear_norms(s: Shape, T: int, *, rule: str = "library", fused: bool = False) -> float:
    """Squared norms of all linear maps: by the library's choice, "direct" everywhere, or by the "cheapest" choice.

    With `fused`, matrices whose gradients are kept take their norms from these.
    """
    total = 0.0
    for source in dict.fromkeys(m.source for m in matrices(s)):
        group = [m for m in matrices(s) if m.source == source]
        kept = [m for m in group if fused and keeps_gradient(s, T, m)]
        free = [m for m in group if m not in kept]
        if rule == "library":
            by_gram = [m for m in free if takes_gram(T, m.p, m.q)]
        elif rule == "cheapest":
            by_gram = [m for m in free if gram(T, m.q) < direct(T, m.p, m.q)]
            if by_gram and gram(T, group[0].p) + sum(gram(T, m.q) - direct(T, m.p, m.q) for m in by_gram) > 0:
                by_gram = []
        else:
            by_gram = []
        cost = sum(gram(T, m.q) if m in by_gram else direct(T, m.p, m.q) for m in group)
        total += (cost + (gram(T, group[0].p) if by_gram else 0)) * group[0].count
    return total


def embedding_norms(s: Shape, T: int) -> int:
    """D Dᵀ over pairs of equal tokens, and, where head and embedding are tied, A Dᵀ for their product."""
    return (2 if s.tied else 1) * 2 * T * T * s.hidden


def sketch_norms(s: Shape, T: int, k: int = PROJECTIONS) -> int:
    """(G Ω)ᵀ A for every linear map; of an untied embedding the exact norm, of a tied one its projection."""
    linear = sum(2 * T * k * (m.p + m.q) * m.count for m in matrices(s))
    return linear + (2 * T * k * s.hidden if s.tied else embedding_norms(s, T))


@dataclass(frozen=True)
class Cost:
    """Operations on one sequence."""

    forward: float
    backward: float
    """Of the plain pass: input gradients and weight gradients."""
    norms: float
    """A whole pass that gives norms and no gradient."""
    direct: float
    """The same with direct products everywhere."""
    cheapest: float
    """The same with the cheapest choice for each set of matrices that share an input."""
    sketch: float
    keep: float
    """Norms and weighted gradient from one pass, inputs and output gradients kept."""
    retain: float
    """The same by a second backward pass over the retained graph; the head is run again."""

    @property
    def plain(self) -> float:
        """The plain forward and backward pass."""
        return self.forward + self.backward

    @property
    def two_passes(self) -> float:
        """Norms first, then the plain pass."""
        return self.norms + self.plain


def cost(s: Shape, T: int) -> Cost:
    """Everything for one sequence of T tokens."""
    product, attend = products(s, T), attention(s, T)
    forward, inputs = product + attend, product + 2.5 * attend
    pass_, embedding = forward + inputs, embedding_norms(s, T)
    second = sum((2 * m.p * m.q if keeps_gradient(s, T, m) else direct(T, m.p, m.q)) * m.count for m in matrices(s))
    norms = pass_ + linear_norms(s, T) + embedding
    return Cost(
        forward=forward,
        backward=inputs + product,
        norms=norms,
        direct=pass_ + linear_norms(s, T, rule="direct") + embedding,
        cheapest=pass_ + linear_norms(s, T, rule="cheapest") + embedding,
        sketch=pass_ + sketch_norms(s, T),
        keep=pass_ + linear_norms(s, T, fused=True) + embedding + second,
        retain=norms + inputs + product + direct(T, s.hidden, s.vocabulary),
    )


# Bytes ----------------------------------------------------------------------------------------------------------------


def parameters(s: Shape) -> int:
    """Of the matrices and the embedding."""
    total = sum(m.p * m.q * m.count for m in matrices(s))
    return total if s.tied else total + s.hidden * s.vocabulary


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


def kept_bytes(s: Shape, T: int) -> int:
    """Held for the fused update: inputs (once for those that share them) and output gradients, or float32
    gradients."""
    products_of = {m.source: m for m in matrices(s) if not keeps_gradient(s, T, m)}
    inputs = sum(m.p * m.count for m in products_of.values())
    outputs = sum(m.q * m.count for m in matrices(s) if not keeps_gradient(s, T, m))
    gradients = sum(m.p * m.q * m.count for m in matrices(s) if keeps_gradient(s, T, m))
    return s.activation_bytes * T * (inputs + outputs) + 4 * gradients


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
        last = 2 * m.p * m.q / (m.p + m.q) * MAX_STRIPS / (MAX_STRIPS + 1)
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
