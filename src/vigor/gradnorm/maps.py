"""Maps: the linear maps, experts, embeddings and copies that a routed forward pass is made of.

Each is an autograd function that takes the parameter detached, so that no AccumulateGrad node of a parameter ever runs,
and whose backward hands the capture what it needs: inputs and output gradients of a matrix, or a gradient once a
sequence. `anchor`, a scalar that requires a gradient, keeps them in the graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vigor.gradnorm.capture import Capture, Matrix


def by_sequence(shape: torch.Size, capture: Capture) -> tuple[int, int] | None:
    """(B, tokens) of a linear input whose first axis is the sequences, or sequences and tokens flattened; else None."""
    B, L = capture.batch, capture.length
    if len(shape) >= 2 and (shape[0] == B or shape[0] % (B * L) == 0):
        return B, shape[:-1].numel() // B
    return None


class Linear(torch.autograd.Function):
    """x Wᵀ + b (or x W + b); its backward brings inputs and output gradients, and returns the input gradient only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        capture: Capture,
        tracked: int | None,
        tracked_bias: int | None,
        shape: tuple[int, int],
        transposed: bool,
    ) -> Tensor:
        kind = x.device.type
        ctx.x_dtype = x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.tracked, ctx.tracked_bias, ctx.shape, ctx.transposed = (
            capture, tracked, tracked_bias, shape, transposed)  # fmt: skip
        return _own(F.linear(x, weight.mT if transposed else weight, bias))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with _without_autocast(g.device.type):
            by_sequence = g.reshape(*ctx.shape, g.shape[-1])
            if ctx.tracked is not None:
                inputs = x.reshape(*ctx.shape, x.shape[-1])
                ctx.capture.add_linear(ctx.tracked, inputs, by_sequence, transposed=ctx.transposed)
            if ctx.tracked_bias is not None:
                wide = torch.promote_types(g.dtype, torch.float32)
                ctx.capture.add_vector(ctx.tracked_bias, by_sequence.sum(1, dtype=wide))
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (g @ (weight.mT if ctx.transposed else weight)).to(ctx.x_dtype)
        return grad_x, None, None, None, None, None, None, None, None


class Expert(torch.autograd.Function):
    """x Wᵀ (or x W) for the tokens that one expert gets; its backward hands them to the capture."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        anchor: Tensor,
        capture: Capture,
        matrix: Matrix,
        sequence_N: Tensor,
        transposed: bool,
    ) -> Tensor:
        kind = x.device.type
        ctx.x_dtype = x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.matrix, ctx.sequence_N, ctx.transposed = capture, matrix, sequence_N, transposed
        return F.linear(x, weight.mT if transposed else weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with _without_autocast(g.device.type):
            # The gradient of x W is Aᵀ G: that of x Wᵀ with inputs and output gradients in each other's place.
            a, b = (g, x) if ctx.transposed else (x, g)
            ctx.capture.add_expert(ctx.matrix, a, b, ctx.sequence_N)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (g @ (weight.mT if ctx.transposed else weight)).to(ctx.x_dtype)
        return grad_x, None, None, None, None, None, None


class Rows(torch.autograd.Function):
    """Rows of a matrix, picked by ids; its backward brings the ids and output gradients."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, flat: Tensor, weight: Tensor, padding_idx: int | None, anchor: Tensor,
                capture: Capture, tracked: int) -> Tensor:  # fmt: skip
        ctx.flat, ctx.capture, ctx.tracked, ctx.padding_idx = flat, capture, tracked, padding_idx
        return _own(F.embedding(ids, weight))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        d = g.reshape(*ctx.flat.shape, g.shape[-1])
        if ctx.padding_idx is not None:
            d = d.masked_fill((ctx.flat == ctx.padding_idx)[..., None], 0.0)  # F.embedding gives that row no gradient
        with _without_autocast(g.device.type):
            ctx.capture.add_rows(ctx.tracked, ctx.flat, d)
        return None, None, None, None, None, None, None


class Each(torch.autograd.Function):
    """(B, ...): a parameter once a sequence, so that autograd itself keeps the sequences apart."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, anchor: Tensor, capture: Capture, tracked: int) -> Tensor:
        ctx.capture, ctx.tracked = capture, tracked
        return parameter.expand(capture.batch, *parameter.shape).clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.capture.add_vector(ctx.tracked, g.reshape(len(g), -1))
        return None, None, None, None


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Entering torch's context costs 80 µs a matrix: only where there is something to switch off."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _own(x: Tensor) -> Tensor:
    """A tensor that autograd takes for no view, so that a model may change it in place: nothing here saves outputs."""
    if not x._is_view():
        return x
    own: Tensor = torch.ops.aten._unsafe_view.default(x, x.shape)
    return own
