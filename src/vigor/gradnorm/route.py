"""Route: send a model's operations on chosen parameters through a capture.

Each module that owns a chosen parameter gets its `forward` wrapped for the time of the pass. Inside, a torch function
mode routes the operations that the parameter takes part in:

    matrices   F.linear, addmm (GPT-2's Conv1D), F.embedding -> an autograd function whose backward passes the input
               gradient on and hands inputs and output gradients to the capture
    experts    a slice of a (experts, q, p) parameter in F.linear, on tokens picked by an index; models are told to
               loop over their experts meanwhile
    vectors    (norm scales, biases) -> a copy a sequence, so that autograd itself keeps the sequences apart

Matrices enter detached: no AccumulateGrad node of a parameter ever runs, so DDP and its like see no gradient. Whatever
else is done with a chosen matrix is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vigor.gradnorm.capture import Capture, Matrix, UnsupportedModule


class _Route(TorchFunctionMode):
    """Inside one module's forward: sends operations on chosen parameters through the capture."""

    def __init__(self, capture: Capture, module: str, owned: frozenset[int], shape: torch.Size) -> None:
        super().__init__()
        self.capture, self.module, self.owned, self.shape = capture, module, owned, shape
        self.slices: dict[int, tuple[Tensor, Matrix]] = {}
        self.token_index: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        chosen = [x for x in (*args, *kwargs.values()) if id(x) in self.owned]
        if func is F.linear and len(args) == 2 and id(args[1]) in self.slices:
            return self._expert(*args)
        if not chosen:
            picked = func is Tensor.__getitem__ and args[0].ndim == 2
            if picked and args[0].shape[0] == self.capture.batch * self.capture.length:
                self.token_index = args[1]
            return func(*args, **kwargs)
        if func is Tensor.__getitem__ and chosen[0].ndim == 3:
            return self._slice(*args)
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

    def _slice(self, parameter: Tensor, index: Any) -> Tensor:
        """One expert's matrix, detached, and remembered for the linear map that will use it."""
        if (isinstance(index, Tensor) and index.ndim) or not isinstance(index, int | Tensor):
            raise UnsupportedModule(
                f"batched gradient norm: {self.module} takes {index!r} of {self.capture.names[id(parameter)]}, which "
                "is not one expert. Use method='loop'."
            )
        expert = int(index)
        matrix = parameter.detach()[expert]
        self.slices[id(matrix)] = (matrix, (id(parameter), expert))
        return matrix

    def _expert(self, x: Tensor, weight: Tensor) -> Tensor:
        c, index = self.capture, self.token_index
        if not isinstance(index, Tensor) or index.shape != x.shape[:1] or index.dtype != torch.int64:
            raise UnsupportedModule(
                f"batched gradient norm: {self.module} gives an expert {tuple(x.shape)} inputs that are not tokens "
                "picked by an index. Use method='loop'."
            )
        matrix = self.slices[id(weight)][1]
        if not c.in_backward:
            c.uses(matrix).expected += 1
        return _Expert.apply(x, weight, c.anchor, c, matrix, index // c.length)

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
                inputs = x.reshape(*ctx.shape, x.shape[-1])
                ctx.capture.add_linear(ctx.tracked, inputs, by_sequence, transposed=ctx.transposed)
            if ctx.tracked_bias is not None:
                wide = torch.promote_types(g.dtype, torch.float32)
                ctx.capture.add_vector(ctx.tracked_bias, by_sequence.sum(1, dtype=wide))
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (g @ (weight.mT if ctx.transposed else weight)).to(ctx.x_dtype)
        return grad_x, None, None, torch.zeros_like(ctx.capture.anchor), None, None, None, None, None


class _Expert(torch.autograd.Function):
    """x Wᵀ for the tokens that one expert gets; its backward hands them to the capture."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, anchor: Tensor, capture: Capture, matrix: Matrix, sequence_N: Tensor
    ) -> Tensor:
        kind = x.device.type
        ctx.x_dtype = x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.matrix, ctx.sequence_N = capture, matrix, sequence_N
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            ctx.capture.add_expert(ctx.matrix, x, g, ctx.sequence_N)
            grad_x = (g @ weight).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, torch.zeros_like(ctx.capture.anchor), None, None, None


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


_EXPERTS = "_experts_implementation_internal"


def _expert_configs(model: nn.Module) -> list[Any]:
    """The configurations of transformers that say how a model runs its experts."""
    configs = [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
    return [config for config in configs if _EXPERTS in vars(config)]


@contextmanager
def captured(model: nn.Module, capture: Capture) -> Iterator[None]:
    """Wraps the forwards of the modules that own a chosen parameter, and unwraps them at the end."""
    had: dict[nn.Module, Any] = {}
    experts = {id(config): (config, vars(config)[_EXPERTS]) for config in _expert_configs(model)}
    try:
        for config, _ in experts.values():
            vars(config)[_EXPERTS] = "eager"  # a loop over the experts; grouped products merge the sequences
        for name, module in model.named_modules():
            owned = frozenset(id(p) for p in module._parameters.values() if id(p) in capture.names)
            if owned:
                had[module] = module.__dict__.get("forward")
                module.__dict__["forward"] = partial(_routed, capture, name, owned, module.forward)
        yield
    finally:
        for config, implementation in experts.values():
            vars(config)[_EXPERTS] = implementation
        for module, forward in had.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def _routed(
    capture: Capture, name: str, owned: frozenset[int], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if capture.paused:
        return forward(*args, **kwargs)
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    shape = tensors[0].shape if tensors and tensors[0].ndim else torch.Size([0])
    with _Route(capture, name, owned, shape):
        return forward(*args, **kwargs)
