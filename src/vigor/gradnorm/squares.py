"""Squared Frobenius norms of per-sequence weight gradients, from a layer's inputs and output gradients.

For a linear map y = W x, sequence b's gradient is ∇_b = G_bᵀ A_b with A_b (T, p) the inputs and G_b (T, q) the output
gradients. Two ways to its square, and the one with fewer operations is taken:

    Gram     Σ_{s,t} (A Aᵀ)_{st} (G Gᵀ)_{st}     (n+1)/n · T² (p + q) operations in n strips of the lower triangle;
                                                 A Aᵀ is kept for the next layer with the same input (q, k and v)
    direct   ‖Gᵀ A‖²_F                           2 T p q operations, in blocks of rows, so never a whole gradient
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 1 << 22
"""Largest buffer of the direct form, of an embedding's products and of a cross term, in numbers (16 MiB, float32)."""
STRIPS = ((64, 4), (128, 8))
"""(rows, strips): as many strips of at least so many rows, up to so many. Small products run below full speed, which
short sequences, whose fewest strips save most, can afford."""


class GramCache:
    """A Aᵀ of the last input seen: layers that share an input run backward one after the other."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.strips: list[Tensor] = []

    def of(self, a_BTp: Float[Tensor, "B T p"]) -> list[Tensor]:
        """The doubled strips of A Aᵀ, computed unless they are those of the last call."""
        last = self.input
        same = (
            last is not None
            and last.data_ptr() == a_BTp.data_ptr()
            and last.shape == a_BTp.shape
            and last.stride() == a_BTp.stride()
            and last.dtype == a_BTp.dtype
        )
        if not same:
            self.input, self.strips = a_BTp, _strips(wide(a_BTp), doubled=True)
        return self.strips

    def clear(self) -> None:
        """Lets go of the tensors."""
        self.input, self.strips = None, []


def linear_square(
    a_BTp: Float[Tensor, "B T p"], g_BTq: Float[Tensor, "B T q"], cache: GramCache
) -> Float[Tensor, " B"]:
    """‖G_bᵀ A_b‖²_F for every b, float64 (float32 on MPS)."""
    T, p, q = a_BTp.shape[1], a_BTp.shape[2], g_BTq.shape[2]
    if prefers_gram(T, p, q):
        return _inner(cache.of(a_BTp), _strips(wide(g_BTq)))
    return _direct(wide(a_BTp), wide(g_BTq))


def prefers_gram(T: int, p: int, q: int) -> bool:
    """Whether the Gram form has fewer operations than the direct one."""
    n = _strip_count(T)
    return (n + 1) / n * T * (p + q) <= 2 * p * q


def rows_square(ids_BT: Int[Tensor, "B T"], d_BTp: Float[Tensor, "B T p"]) -> Float[Tensor, " B"]:
    """‖E_b‖²_F for the gradient of an embedding: row v of E_b is the sum of D_t over the positions t that hold id v."""
    d = wide(d_BTp)
    total = double(d.new_zeros(len(d)))
    for at in _blocks(len(d), d.shape[1], d.shape[1]):
        same = ids_BT[:, at, None] == ids_BT[:, None, :]
        total += double((torch.bmm(d[:, at], d.mT) * same).sum(-1)).sum(-1)
    return total


def cross_product(
    g_selected_BST: Float[Tensor, "B S T"], a_BSp: Float[Tensor, "B S p"], d_BTp: Float[Tensor, "B T p"]
) -> Float[Tensor, " B"]:
    """⟨H_b, E_b⟩ where the same matrix is a linear weight (H = Gᵀ A) and an embedding (E, rows D_t at ids t).

    g_selected holds G[s, id_t]: of the output gradients only the columns at the sequence's own input ids.
    """
    a, d = wide(a_BSp), wide(d_BTp)
    total = double(d.new_zeros(len(d)))
    for at in _blocks(len(d), a.shape[1], d.shape[1]):
        total += double((torch.bmm(a[:, at], d.mT) * wide(g_selected_BST[:, at])).sum(-1)).sum(-1)
    return total


def _blocks(B: int, S: int, T: int) -> Iterator[slice]:
    """Rows of (B, S, T) products, so that these have at most `BLOCK` numbers."""
    step = max(1, BLOCK // max(1, B * T))
    for start in range(0, S, step):
        yield slice(start, start + step)


def _strip_count(T: int) -> int:
    return max(1, *(min(most, T // rows) for rows, most in STRIPS))


def _strips(x_BTd: Tensor, *, doubled: bool = False) -> list[Tensor]:
    """X Xᵀ as strips of its lower triangle: rows r0:r1, columns 0:r1; `doubled` stands for the upper one too."""
    T = x_BTd.shape[1]
    n = _strip_count(T)
    ends = [T * (i + 1) // n for i in range(n)]
    strips = [torch.bmm(x_BTd[:, r0:r1], x_BTd[:, :r1].mT) for r0, r1 in zip([0, *ends], ends, strict=False)]
    if doubled:
        for r0, strip in zip(ends, strips[1:], strict=False):
            strip[:, :, :r0] *= 2
    return strips


def _inner(doubled: list[Tensor], strips: list[Tensor]) -> Tensor:
    """Σ over all (s, t) of the product of two symmetric matrices given as strips, the first's doubled."""
    rows_BT = [(x * y).sum(-1) for x, y in zip(doubled, strips, strict=True)]
    return double(torch.cat(rows_BT, dim=1)).sum(-1)


def _direct(a: Tensor, g: Tensor) -> Tensor:
    B, _, p = a.shape
    q = g.shape[2]
    rows = max(1, min(q, BLOCK // p))
    if B * q * p <= BLOCK:
        return frobenius(torch.bmm(g.mT, a))
    total = double(a.new_zeros(B))
    for b in range(B):
        for start in range(0, q, rows):
            block = g[b, :, start : start + rows].mT @ a[b]
            total[b] += double(torch.linalg.vector_norm(block, dim=-1)).square().sum()
    return total


def frobenius(x_Bqp: Float[Tensor, "B q p"]) -> Float[Tensor, " B"]:
    """‖X_b‖²_F of float32 or wider matrices."""
    return double(torch.linalg.vector_norm(x_Bqp, dim=-1)).square().sum(-1)


def widest(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """float32 or wider: products of bfloat16 outputs would be off by 5e-3."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def double(x: Tensor) -> Tensor:
    """Sums over many float32 numbers are taken in float64: a flat float32 sum of a matrix is off by 1e-3."""
    return x.to(widest(x.device))
