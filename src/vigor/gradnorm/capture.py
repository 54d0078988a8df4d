"""Capture: what a routed backward pass brings, counted and handed on.

The first backward pass brings each matrix's inputs and output gradients, and each vector's gradient once a sequence:
they become squared norms (norms.py), and may be kept for the update (kept.py). A second one, if there is one, brings
the same again, weighted, and what comes of it is the parameters' gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from vigor.gradnorm.constants import Constants
from vigor.gradnorm.kept import Gradients, Kept
from vigor.gradnorm.norms import Norms
from vigor.gradnorm.squares import widest

Matrix = int | tuple[int, int]
"""A matrix: a parameter's id, or that and the index of an expert in it."""


class UnsupportedModule(ValueError):
    """A parameter is used in a way whose gradient norm the batched method cannot compute exactly."""


@dataclass
class Uses:
    """How often forward used one matrix, and what backward brought of it so far."""

    name: str
    expected: int = 0
    arrived: int = 0
    ids: list[Tensor] = field(default_factory=list)
    """(B, L) of each use as an embedding."""
    linear: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Inputs and output gradients of linear uses, where there are several."""
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Ids and output gradients of embedding uses."""
    selected: list[tuple[slice, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Where a matrix is both: rows, an embedding use's ids, the linear use's output gradients there, its inputs."""
    at_ids: list[tuple[slice, Tensor, Tensor]] = field(default_factory=list)
    """The same of a linear use that came in slices: rows, an embedding use's ids, the linear use's gradient there."""


class Capture:
    """Takes the squared gradient norms of the B sequences of one right-padded batch, and their weighted gradient.

    Args:
        parameters: what the norm covers, by name.
        batch: B.
        length: tokens of the padded batch.
        device: the model's.
        norms: how matrices' squared norms are taken.
        keep: keep what the weighted gradient Σ_b w_b ∇_b will need.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        batch: int,
        length: int,
        device: torch.device,
        norms: Norms,
        keep: bool = False,
    ) -> None:
        self.parameters = parameters
        self.names = {id(p): name for name, p in parameters.items()}
        hooked = next((name for name, p in parameters.items() if p._backward_hooks), None)
        if hooked is not None:
            raise UnsupportedModule(
                f"batched gradient norm: {hooked} has a hook that may change its gradient (Tensor.register_hook), "
                "which is never formed. Remove the hook, or use method='loop'."
            )
        self.live: list[nn.Parameter] = []
        self.thawed: list[nn.Parameter] = []
        """Whole parameters that stood for sharded ones (sharded.py), and those of them that were frozen."""
        self.batch, self.length, self.rows = batch, length, slice(0, batch)
        self.squares_B = torch.zeros(batch, dtype=widest(device), device=device)
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.vectors: dict[int, Tensor] = {}
        self.matrices: dict[Matrix, Uses] = {}
        self.norms = norms
        self.kept = Kept() if keep else None
        self.gradients: Gradients | None = None
        """Set for the second backward pass."""
        self.in_backward, self.in_head, self.paused = False, False, False
        self.outermost = ""
        """Name of the module whose operations were watched last."""
        self.constants = Constants()

    @contextmanager
    def head(self, rows: slice, length: int) -> Iterator[None]:
        """Inside, what comes is of these rows and `length` tokens each: one part of the output head's work."""
        before = self.batch, self.length, self.rows, self.in_backward
        self.batch, self.length, self.rows = rows.stop - rows.start, length, rows
        self.in_head, self.in_backward = True, False
        try:
            yield
        finally:
            self.batch, self.length, self.rows, self.in_backward = before
            self.in_head = False

    # Vectors ----------------------------------------------------------------------------------------------------------

    def add_vector(self, parameter: int, gradient_Bd: Tensor) -> None:
        """The gradient of a vector, or of a small array laid out as one, once a sequence; uses add up."""
        if self.gradients is not None:
            shape = self.parameters[self.names[parameter]].shape
            self.gradients.add(parameter, gradient_Bd.sum(0).view(shape))
            return
        if parameter not in self.vectors:
            dtype = torch.promote_types(gradient_Bd.dtype, torch.float32)
            self.vectors[parameter] = gradient_Bd.new_zeros(len(self.squares_B), gradient_Bd.shape[1], dtype=dtype)
        self.vectors[parameter][self.rows] += gradient_Bd

    # Matrices ---------------------------------------------------------------------------------------------------------

    def uses(self, matrix: Matrix) -> Uses:
        """The record of a matrix: of a parameter by its id, of one expert's slice by (id, expert)."""
        parameter = matrix if isinstance(matrix, int) else matrix[0]
        return self.matrices.setdefault(matrix, Uses(self.names[parameter]))

    def add_linear(self, parameter: int, a_BTp: Tensor, g_BTq: Tensor, *, transposed: bool = False) -> None:
        """A linear use's inputs and output gradients; `transposed` where the parameter is (p, q)."""
        if self.gradients is not None:
            self.gradients.add_linear(parameter, a_BTp, g_BTq, transposed=transposed)
            return
        uses = self.uses(parameter)
        several = uses.expected - len(uses.ids) > 1
        self._check_head(uses)
        each_Bqp = None
        if self.kept is not None:
            each_Bqp = self.kept.add_linear(parameter, self.rows, a_BTp, g_BTq, transposed=transposed)
        if several and not self.in_head:
            uses.linear.append((a_BTp, g_BTq))
        else:
            self.norms.linear(self.squares_B, uses, self.rows, a_BTp, g_BTq, each_Bqp)
        self.norms.select(uses, self.rows, a_BTp, g_BTq)
        self._arrive(uses)

    def _check_head(self, uses: Uses) -> None:
        if self.in_head and uses.expected - uses.arrived > 1 + len(uses.ids):
            raise UnsupportedModule(
                f"batched gradient norm: {uses.name} is a linear map in the output head and elsewhere. Use "
                "method='loop'."
            )

    def add_slices(
        self, weight: int | None, bias: int | None, a_1Tp: Tensor, columns: int, parts: Iterable[tuple[int, Tensor]]
    ) -> None:
        """The linear use of one row in the output head, its (1, T, v) output gradients a slice of columns at a time.

        Args:
            weight, bias: ids of the parameters, where they are chosen.
            parts: (first column, output gradients).
        """
        slices = None
        if weight is not None and self.gradients is None:
            self.uses(weight).expected += 1
            self._check_head(self.uses(weight))
            slices = self.norms.sliced(self.uses(weight), self.rows, a_1Tp, columns)
        sums = []
        for start, g_1Tv in parts:
            if bias is not None:
                sums.append(g_1Tv.sum(1, dtype=torch.promote_types(g_1Tv.dtype, torch.float32)))
            if slices is not None:
                slices.add(start, g_1Tv)
            elif weight is not None and self.gradients is not None:
                self.gradients.add_columns(weight, self.parameters[self.names[weight]], start, a_1Tp, g_1Tv)
        if bias is not None:
            self.add_vector(bias, torch.cat(sums, dim=1))
        if weight is not None and slices is not None:
            slices.finish(self.squares_B)
            self._arrive(self.uses(weight))

    def add_expert(self, matrix: Matrix, a_Np: Tensor, g_Nq: Tensor, sequence_N: Tensor) -> None:
        """An expert's inputs and output gradients, its N tokens from any of the sequences in any order."""
        assert not isinstance(matrix, int)
        if self.gradients is not None:
            self.gradients.add_expert(*matrix, self.parameters[self.names[matrix[0]]], a_Np, g_Nq)
            return
        if self.kept is not None:
            self.kept.add_expert(*matrix, a_Np, g_Nq, sequence_N)
        order = sequence_N.argsort(stable=True)
        counts_B = sequence_N.bincount(minlength=self.batch)
        a, g = (self._by_sequence(x[order], sequence_N[order], counts_B) for x in (a_Np, g_Nq))
        uses = self.uses(matrix)
        self.norms.linear(self.squares_B, uses, self.rows, a, g, None)
        self._arrive(uses)

    def _by_sequence(self, x_Nd: Tensor, sequence_N: Tensor, counts_B: Tensor) -> Tensor:
        """(B, n, d): rows sorted by sequence, padded with zeros to the largest count."""
        starts_B = counts_B.cumsum(0) - counts_B
        within_N = torch.arange(len(x_Nd), device=x_Nd.device) - starts_B[sequence_N]
        padded = x_Nd.new_zeros(self.batch, int(counts_B.max()), x_Nd.shape[1])
        padded[sequence_N, within_N] = x_Nd
        return padded

    def add_rows(self, parameter: int, ids_BT: Tensor, d_BTp: Tensor) -> None:
        """An embedding's ids and output gradients."""
        if self.gradients is not None:
            self.gradients.add_rows(parameter, self.parameters[self.names[parameter]], ids_BT, d_BTp)
            return
        uses = self.uses(parameter)
        if self.kept is not None:
            self.kept.add_rows(parameter, ids_BT, d_BTp)
        uses.rows.append((ids_BT, d_BTp))
        self._arrive(uses)

    def _arrive(self, uses: Uses) -> None:
        uses.arrived += 1
        if uses.arrived == uses.expected:
            self.norms.settle(self.squares_B, uses)
            for parts in (uses.linear, uses.rows, uses.selected, uses.at_ids):
                parts.clear()

    # The pass ---------------------------------------------------------------------------------------------------------

    def backward(
        self,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        inputs: Sequence[Tensor] = (),
        *,
        retain_graph: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Runs a backward pass through captured modules; returns the gradients of `inputs`."""
        before, self.in_backward = self.in_backward, True
        chosen = [*self.parameters.values(), *self.live]
        wanted = [*inputs, self.anchor, *chosen]
        try:
            found = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True, retain_graph=retain_graph)
        except CheckpointError as error:
            raise UnsupportedModule(
                f"batched gradient norm: {self.outermost} ran otherwise when gradient checkpointing repeated it. "
                "Switch gradient checkpointing off, or use method='loop'."
            ) from error
        self.in_backward = before
        n = len(inputs)
        # A captured use leaves the parameter itself out of the graph; it has a gradient if something else used it.
        for parameter, gradient in zip(chosen, found[n + 1 :], strict=True):
            if gradient is not None:
                raise UnsupportedModule(
                    f"batched gradient norm: {self.names[id(parameter)]} is used by an operation that cannot be "
                    "watched, for it has a gradient of its own: a kernel with its own backward pass (a fused head or "
                    "loss, PEFT's LoHa, OFT or FourierFT) or a thread of its own. Switch the kernel off, leave the "
                    "parameter out with parameters=, or use method='loop'."
                )
        return found[:n]

    def finish(self) -> Tensor:
        """The squared norms (B,), once every backward pass of the first kind has run."""
        self.norms.cache.clear()
        matrices = {matrix if isinstance(matrix, int) else matrix[0] for matrix in self.matrices}
        for key in self.vectors.keys() & matrices:
            raise UnsupportedModule(
                f"batched gradient norm: {self.names[key]} is a linear map or an embedding in one place and something "
                "else in another. Use method='loop'."
            )
        for gradient_Bd in self.vectors.values():
            self.squares_B += gradient_Bd.to(self.squares_B.dtype).square().sum(-1)
        for uses in self.matrices.values():
            if uses.arrived not in (0, uses.expected):  # the others did not reach the loss: their gradient is zero
                self.norms.settle(self.squares_B, uses)
        if self.kept is None:
            self.vectors.clear()
        return self.squares_B
