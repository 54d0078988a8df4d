"""Tokens: which sequence each row of a tensor belongs to, where a model picks tokens out of the batch by an index.

Mixtures of experts do so, and models that strip padding inside. What is computed row by row from picked tokens keeps
the mark; what may change the rows' order loses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vigor.gradnorm.values import ARITHMETIC, tensors_in

Sequences = Int[Tensor, " N"]

PICKS = frozenset({Tensor.__getitem__, Tensor.index_select, torch.index_select})
"""What picks rows by an index."""
_REORDER = frozenset({
    "sort", "argsort", "topk", "flip", "flipud", "roll", "gather", "scatter", "scatter_add", "scatter_reduce",
    "index_add", "index_copy", "index_put", "setitem", "take_along_dim", "unique", "repeat_interleave",
    "tensor_split", "split_with_sizes", "unbind",
})  # fmt: skip


class Tokens:
    """The tensors of picked tokens in one forward pass of `batch` sequences of `length` tokens."""

    def __init__(self, batch: int, length: int, is_constant: Callable[[Tensor], bool] = lambda _: False) -> None:
        self.batch, self.length, self.is_constant = batch, length, is_constant
        self.marked: dict[int, tuple[Tensor, Sequences]] = {}

    def of(self, x: Tensor) -> Sequences | None:
        """The sequence of each row, if these are picked tokens."""
        known = self.marked.get(id(x))
        return None if known is None else known[1]

    def mark(self, x: Tensor, sequence_N: Sequences) -> Tensor:
        """Notes the sequence of each row; returns the tensor."""
        self.marked[id(x)] = x, sequence_N
        return x

    def module(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a submodule: of what it marks, only its output stays marked, so that nothing else is held."""
        before, self.marked = self.marked, dict(self.marked)
        try:
            output = forward(*args, **kwargs)
            if self.marked:
                before.update((id(x), self.marked[id(x)]) for x in tensors_in([output]) if id(x) in self.marked)
            return output
        finally:
            self.marked = before

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Marks the result of an operation if its rows are picked tokens."""
        name = getattr(func, "__name__", "").strip("_")
        if name == "getitem":
            self._pick(args[0], args[1], result)
        elif name == "index_select" and len(args) == 3 and args[1] == 0:
            self._pick(args[0], args[2], result)
        elif name != "index_select":
            self._keep(name, func, args, kwargs, result)

    def _pick(self, x: Tensor, index: Any, result: Tensor) -> None:
        sequence_N = self.of(x)
        if isinstance(index, Tensor) and index.ndim == 1:
            flat = x.ndim == 2 and len(x) % (self.batch * self.length) == 0
            if sequence_N is None and flat and not self.is_constant(x):
                sequence_N = torch.arange(len(x), device=index.device) // (len(x) // self.batch)
            if sequence_N is not None:
                self.mark(result, sequence_N[index])
        elif isinstance(index, Tensor) and index.dtype == torch.bool and index.shape == x.shape[:2] and (
            sequence_N is None and len(x) == self.batch and not self.is_constant(x)
        ):  # fmt: skip
            row_B1 = torch.arange(self.batch, device=index.device)[:, None]
            self.mark(result, row_B1.expand(index.shape)[index])
        elif sequence_N is not None and isinstance(index, slice):
            self.mark(result, sequence_N[index])
        elif sequence_N is not None and isinstance(index, tuple) and _keeps_rows(*index[:1]):
            self.mark(result, sequence_N)

    def _keep(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = list(tensors_in(args))
        sequences = [sequence_N for x in given if (sequence_N := self.of(x)) is not None]
        if name == "cat" and len(sequences) == len(given) and (args[1] if len(args) > 1 else kwargs.get("dim", 0)) == 0:
            self.mark(result, torch.cat(sequences))
            return
        if not sequences or name in _REORDER or any(other is not sequences[0] for other in sequences):
            return
        sequence_N = sequences[0]
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        if name in ("split", "chunk") and dim in (0, -given[0].ndim):
            for x, part in zip(result, func(sequence_N, *args[1:], **kwargs), strict=True):
                self.mark(x, part)
        elif self.of(given[0]) is not None or name in ARITHMETIC:
            for x in tensors_in([result]):
                if x.ndim and len(x) == len(sequence_N):
                    self.mark(x, sequence_N)


def _keeps_rows(index: Any = None) -> bool:
    return index is ... or (isinstance(index, slice) and index == slice(None))
