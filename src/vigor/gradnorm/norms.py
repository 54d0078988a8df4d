"""Norms: how the squared norm of a matrix's gradient is taken from its inputs and output gradients.

`Exact` computes it. `Sketch` estimates it: with Ω a (q, k) matrix of random signs, E‖Ωᵀ∇‖²_F = k·‖∇‖²_F, and
Ωᵀ Gᵀ A = (G Ω)ᵀ A costs 2·T·k·(p + q) operations where the exact form costs 2·T·p·q or T²·(p + q).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vigor.gradnorm.squares import GramCache, cross_product, frobenius, linear_square, rows_square, wide

if TYPE_CHECKING:
    from vigor.gradnorm.capture import Uses


@runtime_checkable
class Norms(Protocol):
    """What a capture asks for; all add to `squares_B`."""

    cache: GramCache

    def linear(
        self, squares_B: Tensor, uses: Uses, rows: slice, a_BTp: Tensor, g_BTq: Tensor, each_Bqp: Tensor | None
    ) -> None:
        """The only linear use of a matrix by these rows; `each_Bqp` is its gradient if that exists already."""

    def select(self, uses: Uses, rows: slice, a_BTp: Tensor, g_BTq: Tensor) -> None:
        """Keeps of a linear use what its product with the matrix's embedding uses will need."""

    def settle(self, squares_B: Tensor, uses: Uses) -> None:
        """All uses of the matrix have arrived: what was put off is added."""


class Exact:
    """The norms themselves."""

    def __init__(self) -> None:
        self.cache = GramCache()

    def linear(
        self, squares_B: Tensor, uses: Uses, rows: slice, a_BTp: Tensor, g_BTq: Tensor, each_Bqp: Tensor | None
    ) -> None:
        squares_B[rows] += linear_square(a_BTp, g_BTq, self.cache) if each_Bqp is None else frobenius(each_Bqp)

    def select(self, uses: Uses, rows: slice, a_BTp: Tensor, g_BTq: Tensor) -> None:
        for ids in uses.ids:
            index = ids[rows][:, None, :].expand(-1, g_BTq.shape[1], -1)
            uses.selected.append((rows, ids, g_BTq.gather(-1, index), a_BTp))

    def settle(self, squares_B: Tensor, uses: Uses) -> None:
        if uses.linear:
            a, g = (torch.cat(parts, dim=1) for parts in zip(*uses.linear, strict=True))
            squares_B += linear_square(a, g, self.cache)
        if uses.rows:
            ids, d = (torch.cat(parts, dim=1) for parts in zip(*uses.rows, strict=True))
            squares_B += rows_square(ids, d)
        for rows, ids, selected, a in uses.selected:
            d = next(d for known, d in uses.rows if known is ids)
            squares_B[rows] += 2 * cross_product(selected, a, d[rows])


class Sketch:
    """Unbiased estimates from k random projections of each matrix's output gradients.

    The signs depend on the seed and on the parameter's name only: the same completion has the same estimate in every
    batch on the same kind of device.
    """

    def __init__(self, projections: int, seed: int) -> None:
        self.cache = GramCache()
        self.projections, self.seed = projections, seed
        self.tied: dict[int, tuple[Tensor, Tensor]] = {}
        """Of a matrix that is an embedding too, by the id of its uses: signs (q, k), projections (B, k, p) so far."""

    def linear(
        self, squares_B: Tensor, uses: Uses, rows: slice, a_BTp: Tensor, g_BTq: Tensor, each_Bqp: Tensor | None
    ) -> None:
        if not uses.ids:
            squares_B[rows] += self._square(self._project(self._signs(uses, g_BTq), a_BTp, g_BTq))

    def select(self, uses: Uses, rows: slice, a_BTp: Tensor, g_BTq: Tensor) -> None:
        if not uses.ids:
            return
        if id(uses) not in self.tied:
            shape = (len(uses.ids[0]), self.projections, a_BTp.shape[2])
            self.tied[id(uses)] = self._signs(uses, g_BTq), wide(a_BTp.new_zeros(shape))
        signs_qk, projected_Bkp = self.tied[id(uses)]
        projected_Bkp[rows] += self._project(signs_qk, a_BTp, g_BTq)

    def settle(self, squares_B: Tensor, uses: Uses) -> None:
        if id(uses) in self.tied:
            signs_qk, projected_Bkp = self.tied.pop(id(uses))
            for ids, d in uses.rows:
                projected_Bkp += signs_qk[ids].mT @ wide(d)
            squares_B += self._square(projected_Bkp)
        elif uses.rows:
            ids, d = (torch.cat(parts, dim=1) for parts in zip(*uses.rows, strict=True))
            squares_B += rows_square(ids, d)
        elif uses.linear:
            a, g = (torch.cat(parts, dim=1) for parts in zip(*uses.linear, strict=True))
            squares_B += self._square(self._project(self._signs(uses, g), a, g))

    def _signs(self, uses: Uses, g_BTq: Tensor) -> Float[Tensor, "q k"]:
        # A CPU generator looks at the low 32 bits of its seed only.
        seed = zlib.crc32(f"{self.seed}/{uses.name}".encode())
        generator = torch.Generator(g_BTq.device).manual_seed(seed)
        shape = (g_BTq.shape[-1], self.projections)
        signs = torch.randint(0, 2, shape, generator=generator, device=g_BTq.device, dtype=torch.int8)
        return wide(2 * signs.to(g_BTq.dtype) - 1)

    def _project(self, signs_qk: Tensor, a_BTp: Tensor, g_BTq: Tensor) -> Float[Tensor, "B k p"]:
        return (wide(g_BTq) @ signs_qk).mT @ wide(a_BTp)

    def _square(self, projected_Bkp: Tensor) -> Float[Tensor, " B"]:
        return frobenius(projected_Bkp) / self.projections
