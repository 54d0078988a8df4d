"""What the update needs of a pass: kept from the first backward pass, or brought by a second one.

`Kept` holds each linear use's inputs A and output gradients G, or, where that is smaller, the gradient Gᵀ A of each
sequence (every LoRA matrix); once the weights w are known, Σ_b w_b ∇_b is one product a use. `Gradients` takes the
second backward pass, whose output gradients carry the weights already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vigor.gradnorm.squares import wide


@dataclass(frozen=True)
class _Linear:
    rows: slice
    a_BTp: Tensor
    g_BTq: Tensor
    transposed: bool

    def gradient(self, weights_B: Tensor) -> Tensor:
        g_BTq = self.g_BTq * weights_B[self.rows, None, None].to(self.g_BTq.dtype)
        gradient = g_BTq.flatten(0, 1).mT @ self.a_BTp.flatten(0, 1)
        return gradient.mT if self.transposed else gradient


@dataclass(frozen=True)
class _Each:
    rows: slice
    each_Bqp: Tensor
    transposed: bool

    def gradient(self, weights_B: Tensor) -> Tensor:
        gradient = torch.tensordot(weights_B[self.rows].to(self.each_Bqp.dtype), self.each_Bqp, dims=1)
        return gradient.mT if self.transposed else gradient


@dataclass(frozen=True)
class _Expert:
    expert: int
    a_Np: Tensor
    g_Nq: Tensor
    sequence_N: Tensor


class Kept:
    """What the first backward pass left behind, by the parameter's id."""

    def __init__(self) -> None:
        self.linear: dict[int, list[_Linear | _Each]] = {}
        self.experts: dict[int, list[_Expert]] = {}
        self.rows: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add_linear(
        self, parameter: int, rows: slice, a_BTp: Tensor, g_BTq: Tensor, *, transposed: bool
    ) -> Float[Tensor, "B q p"] | None:
        """Keeps a linear use; returns the sequences' gradients if these are what it keeps."""
        T, p, q = a_BTp.shape[1], a_BTp.shape[2], g_BTq.shape[2]
        each_Bqp = torch.bmm(wide(g_BTq).mT, wide(a_BTp)) if keeps_gradient(T, p, q, a_BTp.dtype.itemsize) else None
        kept = _Linear(rows, a_BTp, g_BTq, transposed) if each_Bqp is None else _Each(rows, each_Bqp, transposed)
        self.linear.setdefault(parameter, []).append(kept)
        return each_Bqp

    def add_expert(self, parameter: int, expert: int, a_Np: Tensor, g_Nq: Tensor, sequence_N: Tensor) -> None:
        """Keeps an expert's use."""
        self.experts.setdefault(parameter, []).append(_Expert(expert, a_Np, g_Nq, sequence_N))

    def add_rows(self, parameter: int, ids_BT: Tensor, d_BTp: Tensor) -> None:
        """Keeps a use as an embedding."""
        self.rows.setdefault(parameter, []).append((ids_BT, d_BTp))

    def gradient(self, key: int, parameter: Tensor, weights_B: Tensor, vectors_Bd: Tensor | None) -> Iterator[Tensor]:
        """The parts of Σ_b w_b ∇_b for one parameter, each of its shape."""
        if vectors_Bd is not None:
            yield (weights_B.to(vectors_Bd.dtype) @ vectors_Bd).view(parameter.shape)
        for use in self.linear.get(key, []):
            yield use.gradient(weights_B)
        if key in self.experts:
            total = torch.zeros_like(parameter)
            for e in self.experts[key]:
                total[e.expert] += (e.g_Nq * weights_B[e.sequence_N, None].to(e.g_Nq.dtype)).mT @ e.a_Np
            yield total
        for ids_BT, d_BTp in self.rows.get(key, []):
            weighted = d_BTp * weights_B[:, None, None].to(d_BTp.dtype)
            yield torch.zeros_like(parameter).index_add_(
                0, ids_BT.flatten(), weighted.flatten(0, 1).to(parameter.dtype)
            )


def keeps_gradient(T: int, p: int, q: int, size: int) -> bool:
    """Whether a sequence's gradient, float32, is smaller than its inputs and output gradients of `size` bytes each."""
    return 4 * p * q <= size * T * (p + q)


class Gradients:
    """Sums the parameters' gradients that a second backward pass brings, by the parameter's id."""

    def __init__(self) -> None:
        self.of: dict[int, Tensor] = {}

    def add(self, parameter: int, gradient: Tensor) -> None:
        """Adds a gradient of the parameter's shape."""
        if parameter in self.of:
            self.of[parameter] += gradient
        else:
            self.of[parameter] = gradient

    def add_linear(self, parameter: int, a_BTp: Tensor, g_BTq: Tensor, *, transposed: bool) -> None:
        """Gᵀ A over all sequences."""
        gradient = g_BTq.flatten(0, 1).mT @ a_BTp.flatten(0, 1)
        self.add(parameter, gradient.mT if transposed else gradient)

    def add_columns(self, key: int, parameter: Tensor, start: int, a_BTp: Tensor, g_BTv: Tensor) -> None:
        """The rows of a (q, p) parameter's Gᵀ A that some columns of G make."""
        if key not in self.of:
            self.of[key] = torch.zeros_like(parameter)
        columns = g_BTv.shape[2]
        self.of[key][start : start + columns] += g_BTv.flatten(0, 1).mT @ a_BTp.flatten(0, 1).to(g_BTv.dtype)

    def add_expert(self, key: int, expert: int, parameter: Tensor, a_Np: Tensor, g_Nq: Tensor) -> None:
        """One expert's Gᵀ A."""
        if key not in self.of:
            self.of[key] = torch.zeros_like(parameter)
        self.of[key][expert] += g_Nq.mT @ a_Np

    def add_rows(self, key: int, parameter: Tensor, ids_BT: Tensor, d_BTp: Tensor) -> None:
        """The rows of an embedding."""
        if key not in self.of:
            self.of[key] = torch.zeros_like(parameter)
        self.of[key].index_add_(0, ids_BT.flatten(), d_BTp.flatten(0, 1).to(self.of[key].dtype))
