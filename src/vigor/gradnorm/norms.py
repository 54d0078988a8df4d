"""Norms: how the squared norm of a matrix's gradient is taken from its inputs and output gradients.

`Exact` computes it. `Sketch` estimates it: with Ω a (q, k) matrix of random signs, E‖Ωᵀ∇‖²_F = k·‖∇‖²_F, and
Ωᵀ Gᵀ A = (G Ω)ᵀ A costs 2·T·k·(p + q) operations where the exact form costs 2·T·p·q or T²·(p + q).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vigor.gradnorm.squares import (
    GramCache,
    cross_product,
    double,
    frobenius,
    linear_square,
    prefers_gram,
    rows_square,
    wide,
)

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

    def sliced(self, uses: Uses, rows: slice, a_1Tp: Tensor, columns: int) -> Slices:
        """The only linear use of a matrix by one row, whose output gradients come a slice of columns at a time."""

    def settle(self, squares_B: Tensor, uses: Uses) -> None:
        """All uses of the matrix have arrived: what was put off is added."""


@runtime_checkable
class Slices(Protocol):
    """Takes the output gradients of one row's linear use, slice by slice."""

    def add(self, start: int, g_1Tv: Tensor) -> None:
        """The columns from `start` on."""

    def finish(self, squares_B: Tensor) -> None:
        """All columns have come: adds to `squares_B`, or puts off."""


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

    def sliced(self, uses: Uses, rows: slice, a_1Tp: Tensor, columns: int) -> Slices:
        return _ExactSlices(uses, rows, a_1Tp, columns)

    def settle(self, squares_B: Tensor, uses: Uses) -> None:
        if uses.linear:
            a, g = (torch.cat(parts, dim=1) for parts in zip(*uses.linear, strict=True))
            squares_B += linear_square(a, g, self.cache)
        if uses.rows:
            ids, d = (torch.cat(parts, dim=1) for parts in zip(*uses.rows, strict=True))
            squares_B += rows_square(ids, d)
        for rows, ids, selected, a in uses.selected:
            for known, d in uses.rows:
                if known is ids:
                    squares_B[rows] += 2 * cross_product(selected, a, d[rows])
        for rows, ids, gradient_1Lp in uses.at_ids:
            for known, d in uses.rows:
                if known is ids:
                    squares_B[rows] += 2 * double((gradient_1Lp * wide(d[rows])).sum(-1)).sum(-1)


class _ExactSlices:
    """Squares add up over slices in the direct form; G Gᵀ does in the Gram form."""

    def __init__(self, uses: Uses, rows: slice, a_1Tp: Tensor, columns: int) -> None:
        self.rows, self.a_1Tp, self.uses = rows, wide(a_1Tp), uses
        T, p = a_1Tp.shape[1:]
        self.gram_TT = self.a_1Tp.new_zeros(T, T) if prefers_gram(T, p, columns) else None
        self.square = double(self.a_1Tp.new_zeros(1))
        self.at_ids = [(ids, self.a_1Tp.new_zeros(1, ids.shape[1], p)) for ids in uses.ids]
        """Of a matrix that is an embedding too: the gradient's rows at the row's own input ids."""

    def add(self, start: int, g_1Tv: Tensor) -> None:
        g_Tv, a_Tp = wide(g_1Tv)[0], self.a_1Tp[0]
        gradient_vp = None
        if self.gram_TT is None:
            gradient_vp = g_Tv.mT @ a_Tp
            self.square += frobenius(gradient_vp[None])
        else:
            self.gram_TT.addmm_(g_Tv, g_Tv.mT)
        for ids_BL, rows_1Lp in self.at_ids:
            ids_L = ids_BL[self.rows][0] - start
            inside = ((ids_L >= 0) & (ids_L < g_Tv.shape[1])).nonzero().squeeze(1)
            at = ids_L[inside]
            rows_1Lp[0, inside] = g_Tv[:, at].mT @ a_Tp if gradient_vp is None else gradient_vp[at]

    def finish(self, squares_B: Tensor) -> None:
        if self.gram_TT is not None:
            a_Tp = self.a_1Tp[0]
            self.square = double((self.gram_TT * (a_Tp @ a_Tp.mT)).sum(-1)).sum(-1, keepdim=True)
        squares_B[self.rows] += self.square
        self.uses.at_ids += [(self.rows, ids, rows_1Lp) for ids, rows_1Lp in self.at_ids]


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
        self.table: Tensor | None = None
        """(256, 8): the signs that a byte stands for, once they were asked for."""

    def linear(
        self, squares_B: Tensor, uses: Uses, rows: slice, a_BTp: Tensor, g_BTq: Tensor, each_Bqp: Tensor | None
    ) -> None:
        if not uses.ids:
            squares_B[rows] += self.square(self._project(uses, a_BTp, g_BTq))

    def select(self, uses: Uses, rows: slice, a_BTp: Tensor, g_BTq: Tensor) -> None:
        if uses.ids:
            self.put_off(uses, rows, self._project(uses, a_BTp, g_BTq), g_BTq.shape[2])

    def put_off(self, uses: Uses, rows: slice, projected_bkp: Tensor, columns: int) -> None:
        """Keeps the projections of a linear use until those of the embedding uses are there."""
        if id(uses) not in self.tied:
            shape = (len(uses.ids[0]), *projected_bkp.shape[1:])
            self.tied[id(uses)] = self.signs(uses, columns, projected_bkp), projected_bkp.new_zeros(shape)
        self.tied[id(uses)][1][rows] += projected_bkp

    def sliced(self, uses: Uses, rows: slice, a_1Tp: Tensor, columns: int) -> Slices:
        return _SketchSlices(self, uses, rows, a_1Tp, columns)

    def settle(self, squares_B: Tensor, uses: Uses) -> None:
        if id(uses) in self.tied:
            signs_qk, projected_Bkp = self.tied.pop(id(uses))
            for ids, d in uses.rows:
                projected_Bkp += signs_qk[ids].mT @ wide(d)
            squares_B += self.square(projected_Bkp)
        elif uses.rows:
            ids, d = (torch.cat(parts, dim=1) for parts in zip(*uses.rows, strict=True))
            squares_B += rows_square(ids, d)
        elif uses.linear:
            a, g = (torch.cat(parts, dim=1) for parts in zip(*uses.linear, strict=True))
            squares_B += self.square(self._project(uses, a, g))

    def signs(self, uses: Uses, columns: int, like: Tensor) -> Float[Tensor, "q k"]:
        """The signs of a matrix of q columns of output gradients, on the device of another tensor, float32 or wider."""
        # A CPU generator looks at the low 32 bits of its seed only.
        seed = zlib.crc32(f"{self.seed}/{uses.name}".encode())
        generator = torch.Generator(like.device).manual_seed(seed)
        # 32 signs of one random number, 8 looked up at a time: drawn one by one they cost as much as the projections.
        words_qw = torch.empty(columns, -(-self.projections // 32), dtype=torch.int32, device=like.device)
        bytes_qb = words_qw.random_(-(2**31), 2**31, generator=generator).view(torch.uint8).int()
        return F.embedding(bytes_qb, self._table(like)).flatten(1)[:, : self.projections]

    def _table(self, like: Tensor) -> Float[Tensor, "256 8"]:
        """The 8 signs of each byte, on the device of another tensor, float32 or wider."""
        if self.table is None or self.table.device != like.device or self.table.dtype != wide(like[:0]).dtype:
            bits = torch.arange(256, device=like.device)[:, None] >> torch.arange(8, device=like.device) & 1
            self.table = wide((2 * bits - 1).to(like.dtype))
        return self.table

    def square(self, projected_Bkp: Tensor) -> Float[Tensor, " B"]:
        """The estimates."""
        return frobenius(projected_Bkp) / self.projections

    def _project(self, uses: Uses, a_BTp: Tensor, g_BTq: Tensor) -> Float[Tensor, "B k p"]:
        return (wide(g_BTq) @ self.signs(uses, g_BTq.shape[2], g_BTq)).mT @ wide(a_BTp)


class _SketchSlices:
    """G Ω adds up over slices of G's columns and Ω's rows."""

    def __init__(self, sketch: Sketch, uses: Uses, rows: slice, a_1Tp: Tensor, columns: int) -> None:
        self.sketch, self.uses, self.rows, self.a_1Tp = sketch, uses, rows, wide(a_1Tp)
        self.signs_qk = sketch.signs(uses, columns, self.a_1Tp)
        self.projected_1Tk = self.a_1Tp.new_zeros(1, a_1Tp.shape[1], sketch.projections)

    def add(self, start: int, g_1Tv: Tensor) -> None:
        self.projected_1Tk += wide(g_1Tv) @ self.signs_qk[start : start + g_1Tv.shape[2]]

    def finish(self, squares_B: Tensor) -> None:
        projected_1kp = self.projected_1Tk.mT @ self.a_1Tp
        if self.uses.ids:
            self.sketch.put_off(self.uses, self.rows, projected_1kp, len(self.signs_qk))
        else:
            squares_B[self.rows] += self.sketch.square(projected_1kp)
