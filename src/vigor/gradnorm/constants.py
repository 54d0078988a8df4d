"""Constants: tensors of a forward pass that do not depend on the batch, as position tables, masks and buffers do not.

Whether a tensor's first axis is the sequences is told by its length, and a constant may have that length by chance: a
table of 16 positions in a batch of 16 rows. What the model holds is constant, and so is what comes of constants alone.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn

from vigor.gradnorm.values import tensors_in

SMALL = 1 << 18
"""Most numbers of a computed constant that is held until the pass ends; a larger one is judged by its shape."""


class Constants:
    """The tensors that are known to be constant in one pass, held so that no other gets their id."""

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}

    def of_model(self, model: nn.Module, chosen: Container[int]) -> None:
        """A model's buffers, other tensors and parameters are constant, but for the chosen ones (ids)."""
        for module in model.modules():
            for own in vars(module).values():  # buffers and parameters are in dictionaries
                kind = type(own)
                if kind is dict or kind is list or kind is tuple:
                    inner = own.values() if kind is dict else own
                    self.held.update((id(x), x) for x in inner if isinstance(x, Tensor) and id(x) not in chosen)
                elif isinstance(own, Tensor) and id(own) not in chosen:
                    self.held[id(own)] = own

    def has(self, x: Tensor) -> bool:
        """Whether a tensor, or the one that it is a view of, is known to be constant."""
        return id(x) in self.held or (x._base is not None and id(x._base) in self.held)

    def judge(self, given: Iterable[Any], known: Container[int]) -> tuple[bool, bool]:
        """Whether one of these arguments stems from chosen parameters (its id is `known`), and whether all others that
        are tensors are constant. It runs for every operation of a model."""
        held, concerned, constant = self.held, False, True
        for x in given:
            key = id(x)
            if key in known:
                concerned = True
            elif key not in held:
                if isinstance(x, Tensor):
                    constant = False
                elif isinstance(x, list | tuple):
                    inner = self.judge(x, known)
                    concerned, constant = concerned or inner[0], constant and inner[1]
        return concerned, constant

    def follow(self, constant: bool, func: Callable[..., Any], args: Any, result: Any) -> None:
        """Notes the result of an operation on constants alone, and what an operation on others writes to."""
        if constant:
            for x in tensors_in([result]):
                if x.numel() <= SMALL or x._base is not None:
                    self.held[id(x)] = x
        elif _writes(func) and isinstance(args[0], Tensor):  # it is constant no more
            self.held.pop(id(args[0]), None)
            if args[0]._base is not None:
                self.held.pop(id(args[0]._base), None)


@cache
def _writes(func: Callable[..., Any]) -> bool:
    """Whether an operation works in place."""
    name = func.__name__
    return name in ("__setitem__", "__set__") or name.startswith("__i") or (name[-1:] == "_" != name[-2:-1])
