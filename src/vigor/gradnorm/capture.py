"""Capture: what a routed backward pass adds up: each sequence's squared gradient norm.

Matrices bring their inputs and output gradients, settled at once or, where a matrix is used several times, when its
last use has arrived; vectors bring their gradient itself, once a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vigor.gradnorm.squares import GramCache, cross_product, linear_square, rows_square

Matrix = int | tuple[int, int]
"""A matrix: a parameter's id, or that and the index of an expert in it."""


class UnsupportedModule(ValueError):
    """A parameter is used in a way whose gradient norm the batched method cannot compute exactly."""


@dataclass
class _Uses:
    """What has been seen of one matrix: how often forward used it, and what backward brought so far."""

    name: str
    expected: int = 0
    ids: list[Tensor] = field(default_factory=list)
    linear: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    selected: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    arrived: int = 0


class Capture:
    """Accumulates squared gradient norms of B sequences of one right-padded batch."""

    def __init__(self, parameters: dict[str, nn.Parameter], *, batch: int, length: int, device: torch.device) -> None:
        self.parameters = parameters
        self.names = {id(p): name for name, p in parameters.items()}
        self.batch, self.length = batch, length
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.squares_B = torch.zeros(batch, dtype=dtype, device=device)
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.copies: dict[tuple[int, int], Tensor] = {}
        self.vectors: dict[int, Tensor] = {}
        self.matrices: dict[Matrix, _Uses] = {}
        self.cache = GramCache()
        self.in_backward = False

    # Vectors ----------------------------------------------------------------------------------------------------------

    def copy_of(self, parameter: Tensor, like: torch.Size) -> Tensor:
        """The vector once a sequence, shaped to broadcast against a tensor of shape (B, ..., d) or (B·L, d)."""
        flat = len(like) == 2 and like[0] == self.batch * self.length
        ndim = 3 if flat else len(like)
        key = (id(parameter), ndim)
        if key not in self.copies:
            shape = (self.batch, *(1,) * (ndim - 2), parameter.shape[0])
            self.copies[key] = parameter.detach().expand(shape).clone().requires_grad_()
        copy = self.copies[key]
        return copy.expand(-1, self.length, -1).flatten(0, 1) if flat else copy

    def add_vector(self, parameter: int, gradient_Bd: Tensor) -> None:
        gradient_Bd = gradient_Bd.to(torch.promote_types(gradient_Bd.dtype, torch.float32))
        self.vectors[parameter] = self.vectors[parameter] + gradient_Bd if parameter in self.vectors else gradient_Bd

    # Matrices ---------------------------------------------------------------------------------------------------------

    def uses(self, matrix: Matrix) -> _Uses:
        """The record of a matrix: of a parameter by its id, of one expert's slice by (id, expert)."""
        parameter = matrix if isinstance(matrix, int) else matrix[0]
        return self.matrices.setdefault(matrix, _Uses(self.names[parameter]))

    def add_linear(self, parameter: Matrix, a_BTp: Tensor, g_BTq: Tensor) -> None:
        """A linear use's inputs and output gradients; settled at once unless the matrix has another linear use."""
        uses = self.uses(parameter)
        embedded = len(uses.ids)
        if uses.expected - embedded > 1:
            uses.linear.append((a_BTp, g_BTq))
        else:
            self.squares_B += linear_square(a_BTp, g_BTq, self.cache)
        for ids in uses.ids:
            index = ids[:, None, :].expand(-1, g_BTq.shape[1], -1)
            uses.selected.append((g_BTq.gather(-1, index), a_BTp))
        self._arrive(uses)

    def add_expert(self, matrix: Matrix, a_Np: Tensor, g_Nq: Tensor, sequence_N: Tensor) -> None:
        """An expert's inputs and output gradients, its N tokens from any of the sequences in any order."""
        order = sequence_N.argsort(stable=True)
        counts_B = sequence_N.bincount(minlength=self.batch)
        a, g = (self._by_sequence(x[order], sequence_N[order], counts_B) for x in (a_Np, g_Nq))
        self.squares_B += linear_square(a, g, self.cache)
        self._arrive(self.uses(matrix))

    def _by_sequence(self, x_Nd: Tensor, sequence_N: Tensor, counts_B: Tensor) -> Tensor:
        """(B, n, d): rows sorted by sequence, padded with zeros to the largest count."""
        starts_B = counts_B.cumsum(0) - counts_B
        within_N = torch.arange(len(x_Nd), device=x_Nd.device) - starts_B[sequence_N]
        padded = x_Nd.new_zeros(self.batch, int(counts_B.max()), x_Nd.shape[1])
        padded[sequence_N, within_N] = x_Nd
        return padded

    def add_rows(self, parameter: int, ids_BT: Tensor, d_BTp: Tensor) -> None:
        """An embedding's ids and output gradients."""
        uses = self.uses(parameter)
        uses.rows.append((ids_BT, d_BTp))
        self._arrive(uses)

    def _arrive(self, uses: _Uses) -> None:
        uses.arrived += 1
        if uses.arrived < uses.expected:
            return
        if uses.linear:
            a, g = (torch.cat(parts, dim=1) for parts in zip(*uses.linear, strict=True))
            self.squares_B += linear_square(a, g, self.cache)
        if uses.rows:
            ids, d = (torch.cat(parts, dim=1) for parts in zip(*uses.rows, strict=True))
            self.squares_B += rows_square(ids, d)
            if uses.selected:
                # selected was gathered per embedding use, in the order of uses.ids; rows arrive in reverse.
                for i, (selected, a) in enumerate(uses.selected):
                    row_ids = uses.ids[i % len(uses.ids)]
                    _, d_i = next(r for r in uses.rows if r[0] is row_ids)
                    self.squares_B += 2 * cross_product(selected, a, d_i)
        for parts in (uses.linear, uses.selected, uses.rows):
            parts.clear()

    # The pass ---------------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> Tensor:
        """Runs the backward pass of Σ_b loss_b; returns the squared norms (B,)."""
        self.in_backward = True
        keys = list(self.copies)
        inputs = [self.anchor, *self.copies.values(), *self.parameters.values()]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)[1:]
        self.cache.clear()
        # A captured use leaves the parameter itself out of the graph; it has a gradient if something else used it.
        for (name, _), gradient in zip(self.parameters.items(), gradients[len(keys) :], strict=True):
            if gradient is not None:
                raise UnsupportedModule(
                    f"batched gradient norm: {name} is used outside the forward of the module that owns it. Use "
                    "method='loop'."
                )
        for (parameter, _), gradient in zip(keys, gradients[: len(keys)], strict=True):
            if gradient is not None:
                self.add_vector(parameter, gradient.flatten(1))
        for gradient in self.vectors.values():
            self.squares_B += gradient.to(self.squares_B.dtype).square().sum(-1)
        for uses in self.matrices.values():
            if uses.arrived not in (0, uses.expected):
                raise UnsupportedModule(
                    f"batched gradient norm: {uses.name} was used {uses.expected} times, but only {uses.arrived} uses "
                    "reached the loss. Use method='loop'."
                )
        return self.squares_B
