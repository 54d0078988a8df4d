"""Operations and bytes of a decoder's passes, counted: forward, backward, gradient norms and the fused update.

One sequence of T tokens, all of whose positions are counted. Operations are the multiplications and additions of matrix
products, 2·m·n·k for (m, k) times (k, n); element-wise work is left out. Attention is causal; its backward pass takes
2.5 times its forward pass, as in kernels that compute the scores again. The plain pass is one forward and one backward
that give ordinary gradients. Derived in docs/gradnorm.md, tested against torch's counter in tests/test_floor.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STRIPS = ((64, 4), (128, 8))
"""As in vigor.gradnorm.squares: (rows of a strip at the least, strips at the most)."""
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
"""As published; see tests/test_floor.py."""


def benchmark_shape(text: str, layers: int) -> tuple[Shape, int]:
    """The model of benchmarks/gradnorm.py for such a shape, and T."""
    width, vocabulary, _, tokens = map(int, text.split("x"))
    return Shape(width, layers, width * 11 // 4, width // 64, max(1, width // 256), 64, vocabulary, True, 4), tokens


def shape_of(config: Any) -> Shape:
    """The shape of a transformers config; of experts, those that a token uses.

    Families without a gate in their feed-forward part, or with other maps beside it, are counted as if they had
    this one.

    Raises:
        ValueError: the config is not of a decoder with attention.
    """
    c = config.get_text_config()
    if missing := [
        name
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if not hasattr(c, name)
    ]:
        raise ValueError(f"{c.model_type}: its config has no {missing[0]}; counted are decoders with attention.")
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kv_heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    intermediate = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    if experts := getattr(c, "num_experts_per_tok", None):
        intermediate = experts * (getattr(c, "moe_intermediate_size", None) or intermediate)
    sizes = c.hidden_size, c.num_hidden_layers, intermediate, c.num_attention_heads, kv_heads
    return Shape(*sizes, head_dim, c.vocab_size, bool(c.tie_word_embeddings))


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
    return max(1, *(min(most, T // rows) for rows, most in STRIPS))


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


def adapter_cost(s: Shape, T: int, rank: int) -> Cost:
    """Everything for one sequence where only LoRA adapters of this rank on all maps but the head are trained.

    Their gradients are formed row by row in every way of computing the norm, so that all ways cost the same.
    """
    adapted = sum(2 * T * rank * (m.p + m.q) * m.count for m in matrices(s)[:-1])
    forward = products(s, T) + attention(s, T) + adapted
    backward = products(s, T) + 2.5 * attention(s, T) + 2 * adapted
    norms = forward + backward
    return Cost(
        forward=forward,
        backward=backward,
        norms=norms,
        direct=norms,
        cheapest=norms,
        sketch=norms,
        keep=norms,
        retain=norms + backward + direct(T, s.hidden, s.vocabulary),
    )


# Bytes ----------------------------------------------------------------------------------------------------------------


def parameters(s: Shape) -> int:
    """Of the matrices and the embedding."""
    total = sum(m.p * m.q * m.count for m in matrices(s))
    return total if s.tied else total + s.hidden * s.vocabulary


def kept_bytes(s: Shape, T: int) -> int:
    """Held for the fused update: inputs (once for those that share them) and output gradients, or float32
    gradients."""
    products_of = {m.source: m for m in matrices(s) if not keeps_gradient(s, T, m)}
    inputs = sum(m.p * m.count for m in products_of.values())
    outputs = sum(m.q * m.count for m in matrices(s) if not keeps_gradient(s, T, m))
    gradients = sum(m.p * m.q * m.count for m in matrices(s) if keeps_gradient(s, T, m))
    return s.activation_bytes * T * (inputs + outputs) + 4 * gradients
