"""Values: what a routed forward pass knows of the tensors that stem from chosen parameters.

    View     a matrix or a stack of them, transposed or cast perhaps: to be used in a linear map or an embedding
    Copies   a vector or a small array, or what is computed from such ones alone: it has one value a sequence

Where `Copies` meet a tensor of the batch, the operation means what it would do to one sequence in a batch of its own:
arithmetic is broadcast, anything else is mapped over the sequences by `torch.func.vmap`. So operations need not be
known one by one.

The model itself holds ordinary tensors meanwhile, with the parameter in their graph. An operation that escapes the
route therefore gives the parameter a gradient, and the capture refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Function = Callable[..., Any]
Axis = Literal["batch", "flat", "tokens"]
"""A tensor's first axis: the sequences, sequences and tokens flattened, or tokens picked by an index."""

ARITHMETIC = frozenset({
    "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "multiply", "div", "rdiv", "truediv",
    "rtruediv", "itruediv", "true_divide", "divide", "pow", "rpow", "maximum", "minimum", "where", "lerp",
    "addcmul", "addcdiv", "clamp", "clip", "logaddexp", "fmod", "remainder", "copysign",
})  # fmt: skip
"""Functions that work number by number on tensors broadcast against each other, by name without underscores around."""

ALIGNED = frozenset({
    "cat", "concat", "concatenate", "stack", "matmul", "bmm", "baddbmm", "__matmul__", "__rmatmul__",
    "scaled_dot_product_attention",
})  # fmt: skip
"""Other functions that take the first axes of tensors of equal rank for the same one."""


class NotRouted(Exception):
    """The operation cannot be taken apart by sequence; the message says why."""


@dataclass(frozen=True)
class View:
    """A matrix (q, p), or a stack (experts, q, p), with the parameter's own numbers."""

    tensor: Tensor
    parameter: Tensor
    of: Callable[[Tensor], Tensor] = lambda parameter: parameter
    """The same view of any tensor of the parameter's shape."""
    transposed: bool = False
    expert: int | None = None

    @property
    def is_rows(self) -> bool:
        """Whether an embedding's rows are the parameter's."""
        return not self.transposed and self.expert is None

    @property
    def stored(self) -> Tensor:
        """The matrix, detached, the way round that the parameter holds it."""
        matrix = self.tensor.detach()
        return matrix.mT if self.transposed else matrix


@dataclass
class Copies:
    """A tensor with one value a sequence."""

    tensor: Tensor
    """What the model holds: one value for all."""
    make: Callable[[], Tensor]
    parameter: Tensor
    """The parameter, or one of those, that it stems from."""
    expanded: bool = False
    """Its first axis comes of `expand` and is as long as the batch: perhaps it stands for the sequences."""
    _each: Tensor | None = field(default=None, repr=False)

    @property
    def each(self) -> Tensor:
        """(B, ...), made when first asked for: what ends detached never is."""
        if self._each is None:
            self._each = self.make()
        return self._each

    def against(self, rank: int) -> Tensor:
        """(B, ...) to be broadcast against tensors of this rank whose first axis is the sequences."""
        own = self.tensor.ndim
        if own < rank:
            return self.each.reshape(len(self.each), *(1,) * (rank - 1 - own), *self.tensor.shape)
        if own == rank and self.tensor.shape[0] == len(self.each):  # number by number, row b meets sequence b
            b = torch.arange(len(self.each), device=self.each.device)
            return self.each[b, b]
        if own == rank and self.tensor.shape[0] == 1:
            return self.each.squeeze(1)
        raise NotRouted(f"an array of shape {tuple(self.tensor.shape)} meets a tensor of {rank} axes")


def tensors_in(x: Any) -> Iterator[Tensor]:
    """The tensors among arguments, and one level down in lists and tuples."""
    for item in x:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from (inner for inner in item if isinstance(inner, Tensor))


def replaced(x: Any, new: dict[int, Tensor]) -> Any:
    """Arguments with tensors replaced, by id."""
    if isinstance(x, Tensor):
        return new.get(id(x), x)
    if isinstance(x, dict):
        return {key: replaced(value, new) for key, value in x.items()}
    if isinstance(x, list | tuple) and not isinstance(x, torch.Size):
        return type(x)([replaced(item, new) for item in x])
    return x


def alone(func: Function, args: Any, kwargs: Any, copies: list[Copies]) -> Any:
    """An operation on copies and constants: its result for each sequence."""

    def one(*each: Tensor) -> Any:
        new = {id(value.tensor): x for value, x in zip(copies, each, strict=True)}
        return func(*replaced(args, new), **replaced(kwargs, new))

    return _mapped(one, [value.each for value in copies])


def together(
    func: Function, args: Any, kwargs: Any, copies: list[Copies], shared: list[Tensor], axis: Axis, sequence: Any
) -> Any:
    """An operation on copies and `shared` tensors, all with this first axis.

    Args:
        sequence: the (N,) sequence of each picked token, where `axis` is "tokens".
    """
    name = func.__name__
    arithmetic = name.strip("_") in ARITHMETIC
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if in_place and not (arithmetic and any(args[0] is x for x in shared)):
        raise NotRouted("it works in place")
    rank = max(x.ndim for x in shared)
    if arithmetic and all(x.ndim == rank for x in shared):
        new = {id(value.tensor): value.against(rank) for value in copies}
        if axis == "tokens":
            new = {key: each[sequence] for key, each in new.items()}
        elif axis == "flat":
            new = {key: each[:, None] for key, each in new.items()}
            new |= {id(x): x.unflatten(0, (len(copies[0].each), -1)) for x in shared}
        try:
            result = func(*replaced(args, new), **replaced(kwargs, new))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotRouted(str(error).splitlines()[0]) from error
        return result.flatten(0, 1) if axis == "flat" else result
    if axis == "tokens":
        raise NotRouted("its tokens were picked by an index")
    B = len(copies[0].each)
    # Each sequence in a batch of its own, or its own part of the flattened axis.
    shared_B = [x[:, None] if axis == "batch" else x.unflatten(0, (B, -1)) for x in shared]
    rows = name in ALIGNED
    each_B = [v.against(rank)[:, None] if rows and v.expanded and v.tensor.ndim == rank else v.each for v in copies]

    def one(*of_one: Tensor) -> Any:
        new = {id(x): y for x, y in zip([*(v.tensor for v in copies), *shared], of_one, strict=True)}
        return func(*replaced(args, new), **replaced(kwargs, new))

    result = _mapped(one, [*each_B, *shared_B])
    if not all(x.ndim > 1 and (axis == "flat" or x.shape[1] == 1) for x in tensors_in([result])):
        raise NotRouted("its result has no axis of sequences")
    joined = {id(x): x.flatten(0, 1) for x in tensors_in([result])}
    return replaced(result, joined)


def _mapped(function: Function, tensors: list[Tensor]) -> Any:
    try:
        return torch.func.vmap(function)(*tensors)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # shapes that do not fit, or a function that cannot be mapped
        raise NotRouted(str(error).splitlines()[0]) from error
