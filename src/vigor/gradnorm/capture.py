"""Capture: run a model so that its backward pass yields per-sequence squared gradient norms, and no gradients.

Each module that owns a chosen parameter gets its `forward` wrapped for the time of the pass. Inside, a torch function
mode routes the operations that the parameter takes part in:

    matrices       F.linear, addmm (GPT-2's Conv1D), F.embedding -> an autograd function whose backward passes the input
                   gradient on and adds the square of each sequence's weight gradient to an accumulator
    vectors        (norm scales, biases) -> a copy a sequence, so that autograd itself keeps the sequences apart

Matrices enter detached: no AccumulateGrad node of a parameter ever runs, so DDP and its like see no gradient. Whatever
else is done with a chosen matrix is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vigor.gradnorm.squares import GramCache, cross_product, linear_square, rows_square


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
        self.matrices: dict[int, _Uses] = {}
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

    def uses(self, parameter: int) -> _Uses:
        return self.matrices.setdefault(parameter, _Uses(self.names[parameter]))

    def add_linear(self, parameter: int, a_BTp: Tensor, g_BTq: Tensor) -> None:
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


class _Route(TorchFunctionMode):
    """Inside one module's forward: sends operations on chosen parameters through the capture."""

    def __init__(self, capture: Capture, module: str, owned: frozenset[int], shape: torch.Size) -> None:
        super().__init__()
        self.capture, self.module, self.owned, self.shape = capture, module, owned, shape

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        chosen = [x for x in (*args, *kwargs.values()) if id(x) in self.owned]
        if not chosen:
            return func(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is torch.addmm:
            bias, x, weight = args
            return self._linear(x, weight, bias, transposed=True)
        if func is F.embedding:
            return self._embedding(*args, **kwargs)
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is F.rms_norm:
            return self._rms_norm(*args, **kwargs)
        if all(p.ndim == 1 for p in chosen):
            return func(*map(self._copy, args), **{key: self._copy(x) for key, x in kwargs.items()})
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            name = self.capture.names[id(next(p for p in chosen if p.ndim != 1))]
            raise UnsupportedModule(
                f"batched gradient norm: {self.module} uses {name} in {getattr(func, '__name__', func)}, which is not "
                "a linear map, an embedding or a norm. Use method='loop', or leave the parameter out with "
                "parameters=."
            )
        return result

    def _copy(self, parameter: Any) -> Any:
        if id(parameter) not in self.owned:
            return parameter
        if self.shape[0] not in (self.capture.batch, self.capture.batch * self.capture.length):
            raise UnsupportedModule(
                f"batched gradient norm: {self.module} gets an input of shape {tuple(self.shape)}, whose first axis is "
                f"not the {self.capture.batch} sequences. Use method='loop'."
            )
        return self.capture.copy_of(parameter, self.shape)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
        c = self.capture
        tracked = id(weight) if id(weight) in self.owned else None
        tracked_bias = id(bias) if id(bias) in self.owned else None
        if tracked is not None and not c.in_backward:
            c.uses(tracked).expected += 1
        shape = _by_sequence(x.shape, c, self.module)
        plain_bias = None if bias is None else bias.detach()
        return _Linear.apply(x, weight.detach(), plain_bias, c.anchor, c, tracked, tracked_bias, shape, transposed)

    def _embedding(
        self, ids: Tensor, weight: Tensor, padding_idx: int | None = None, *options: Any, **named: Any
    ) -> Tensor:
        c = self.capture
        if any(options[:1]) or named.get("max_norm") is not None or named.get("scale_grad_by_freq"):
            raise UnsupportedModule(f"batched gradient norm: {self.module} renormalises its rows. Use method='loop'.")
        if ids.shape[0] == 1 and c.batch > 1:
            ids = ids.expand(c.batch, *ids.shape[1:])  # position ids broadcast over the batch would merge the sequences
        if ids.shape[0] != c.batch:
            raise UnsupportedModule(
                f"batched gradient norm: {self.module} embeds ids of shape {tuple(ids.shape)}, whose first axis is not "
                f"the {c.batch} sequences. Use method='loop'."
            )
        flat = ids.reshape(c.batch, -1)
        if not c.in_backward:
            uses = c.uses(id(weight))
            uses.expected += 1
            uses.ids.append(flat)
        else:  # recomputed under gradient checkpointing: the same ids object as before
            flat = next(known for known in c.uses(id(weight)).ids if torch.equal(known, flat))
        return _Embedding.apply(ids, flat, weight.detach(), padding_idx, c.anchor, c, id(weight))

    def _layer_norm(
        self, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        y = F.layer_norm(x, shape, None, None, eps)
        y = y if weight is None else y * self._copy(weight)
        return y if bias is None else y + self._copy(bias)

    def _rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        y = F.rms_norm(x, shape, None, eps)
        return y if weight is None else y * self._copy(weight)


def _by_sequence(shape: torch.Size, capture: Capture, module: str) -> tuple[int, int]:
    """(B, tokens) of a linear input: its first axis is the sequences, or sequences and tokens flattened."""
    if len(shape) >= 2 and shape[0] == capture.batch:
        return capture.batch, shape[1:-1].numel()
    if len(shape) == 2 and shape[0] == capture.batch * capture.length:
        return capture.batch, capture.length
    raise UnsupportedModule(
        f"batched gradient norm: {module} maps an input of shape {tuple(shape)}, in which the {capture.batch} "
        f"sequences of {capture.length} tokens cannot be told apart. Use method='loop'."
    )


class _Linear(torch.autograd.Function):
    """x Wᵀ + b (or x W + b); its backward adds squared norms and returns the input gradient only."""

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
        return F.linear(x, weight.mT if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            by_sequence = g.reshape(*ctx.shape, g.shape[-1])
            if ctx.tracked is not None:
                ctx.capture.add_linear(ctx.tracked, x.reshape(*ctx.shape, x.shape[-1]), by_sequence)
            if ctx.tracked_bias is not None:
                wide = torch.promote_types(g.dtype, torch.float32)
                ctx.capture.add_vector(ctx.tracked_bias, by_sequence.sum(1, dtype=wide))
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (g @ (weight.mT if ctx.transposed else weight)).to(ctx.x_dtype)
        return grad_x, None, None, torch.zeros_like(ctx.capture.anchor), None, None, None, None, None


class _Embedding(torch.autograd.Function):
    """Rows of a matrix; its backward adds squared norms."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, flat: Tensor, weight: Tensor, padding_idx: int | None, anchor: Tensor,
                capture: Capture, tracked: int) -> Tensor:  # fmt: skip
        ctx.flat, ctx.capture, ctx.tracked, ctx.padding_idx = flat, capture, tracked, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        d = g.reshape(*ctx.flat.shape, g.shape[-1])
        if ctx.padding_idx is not None:
            d = d.masked_fill((ctx.flat == ctx.padding_idx)[..., None], 0.0)  # F.embedding gives that row no gradient
        with torch.autocast(g.device.type, enabled=False):
            ctx.capture.add_rows(ctx.tracked, ctx.flat, d)
        return None, None, None, None, torch.zeros_like(ctx.capture.anchor), None, None


@contextmanager
def captured(model: nn.Module, capture: Capture) -> Iterator[None]:
    """Wraps the forwards of the modules that own a chosen parameter, and unwraps them at the end."""
    had: dict[nn.Module, Any] = {}
    try:
        for name, module in model.named_modules():
            owned = frozenset(id(p) for p in module._parameters.values() if id(p) in capture.names)
            if owned:
                had[module] = module.__dict__.get("forward")
                module.__dict__["forward"] = partial(_routed, capture, name, owned, module.forward)
        yield
    finally:
        for module, forward in had.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def _routed(
    capture: Capture, name: str, owned: frozenset[int], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    shape = tensors[0].shape if tensors and tensors[0].ndim else torch.Size([0])
    with _Route(capture, name, owned, shape):
        return forward(*args, **kwargs)
