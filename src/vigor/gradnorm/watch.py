"""Watch: the torch function mode that sees a model's operations and routes those on chosen parameters.

    matrices   F.linear, x @ W, addmm (GPT-2's Conv1D) and F.embedding, W transposed or cast perhaps -> an autograd
               function whose backward passes the input gradient on and hands inputs and output gradients to the capture
    experts    the same for a slice of an (experts, q, p) parameter, on tokens picked by an index, and for all slices in
               one product
    the rest   (norm scales, biases, convolution kernels, sinks, decays) -> a value a sequence, see values.py, so that
               autograd itself keeps the sequences apart; refused where the copies of a matrix exceed `COPIES` numbers

Matrices and copies enter detached: no AccumulateGrad node of a parameter ever runs, so DDP and its like see no
gradient. An operation that is not routed leaves the parameter in the graph, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vigor.gradnorm.capture import Capture, UnsupportedModule
from vigor.gradnorm.maps import Each, by_sequence
from vigor.gradnorm.matrices import embedding, experts, is_positions, linear, rows_of_copies
from vigor.gradnorm.tokens import PICKS, Tokens
from vigor.gradnorm.values import Axis, Copies, Function, NotRouted, View, alone, tensors_in, together

COPIES = 1 << 24
"""Most numbers of the copies of one matrix that is used in anything but a linear map (64 MiB in float32)."""

_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"})
_VIEWS = frozenset({"t", "T", "mT", "H", "mH", "adjoint", "transpose", "swapaxes", "swapdims", "permute", "movedim"})
_POSITIONAL = {
    "linear": ("input", "weight", "bias"),
    "embedding": ("input", "weight"),
    "layer_norm": ("input", "normalized_shape"),
    "rms_norm": ("input", "normalized_shape"),
    "group_norm": ("input", "num_groups"),
}
_PRODUCTS = frozenset({"matmul", "mm", "bmm"})
_REFERENCES = frozenset({"to", "type_as", "view_as", "expand_as", "reshape_as"})
"""Methods that take another tensor for its dtype or shape only."""
_EXPANSIONS = frozenset({"expand", "expand_as", "broadcast_to", "repeat"})


class Watch(TorchFunctionMode):
    """Sees the operations of one forward pass, or of a part of it that gradient checkpointing repeats.

    Args:
        capture: where routed operations go.
        module: name of the module that runs; the caller keeps it up to date.
        parameters: the chosen parameters in reach.
        inputs: the integer tensors that the forward pass was given.
        copied: ids of the matrices that copies were made of in this pass; added to.
    """

    def __init__(
        self, capture: Capture, module: str, parameters: Sequence[Tensor], inputs: list[Tensor], copied: set[int]
    ) -> None:
        super().__init__()
        self.capture, self.module, self.inputs, self.copied = capture, module, inputs, copied
        self.known: dict[int, View | Copies] = {}
        self.learn(parameters)
        self.constants = capture.constants
        self.tokens = Tokens(capture.batch, capture.length, self.constants.has)
        self.eyes: dict[int, Tensor] = {}
        """Identity matrices, and frozen matrices that were read out by one: as long as the batch only by chance."""

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.capture.paused:
            return func(*args, **kwargs)
        concerned, constant = self.constants.judge(args, self.known)
        if kwargs:
            more = self.constants.judge(kwargs.values(), self.known)
            concerned, constant = concerned or more[0], constant and more[1]
        if not concerned:
            return self._plain(func, args, kwargs, constant)
        if not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            self.constants.follow(constant, func, args, result)
            return result
        given = {id(x): x for x in tensors_in((*args, *kwargs.values()))}
        try:
            return self._operation(func, _name(func), args, kwargs, given)
        except NotRouted as error:
            what = next(self.known[i].parameter for i in given if i in self.known)
            raise UnsupportedModule(
                f"batched gradient norm: {self.module} uses {self.capture.names[id(what)]} in {_name(func)}, which "
                f"cannot be taken apart by sequence: {error}. Use method='loop', or leave the parameter out with "
                "parameters=."
            ) from error

    def _judged(self, func: Function, *args: Any, **kwargs: Any) -> Any:
        """An operation without chosen parameters, of which it is yet to be told whether all are constants."""
        _, constant = self.constants.judge((*args, *kwargs.values()), self.known)
        return self._plain(func, args, kwargs, constant)

    def _plain(self, func: Function, args: Any, kwargs: dict[str, Any], constant: bool) -> Any:
        """An operation without chosen parameters, on constants alone or not; what is known of its result is noted."""
        result = func(*args, **kwargs)
        self.constants.follow(constant, func, args, result)
        if self.tokens.marked or func in PICKS:
            self.tokens.follow(func, args, kwargs, result)
        if func is torch.eye or (self.eyes and func is F.linear and id(args[0]) in self.eyes):
            self.eyes[id(result)] = result
        return result

    def again(self, func: Function, *args: Any) -> Any:
        """A further operation that stands for a part of one."""
        return self.__torch_function__(func, (), args)

    def learn(self, parameters: Sequence[Tensor]) -> None:
        """Takes in chosen parameters, unless they are known."""
        for p in parameters:
            if id(p) not in self.known:
                self._know(View(p, p) if p.ndim > 1 else Copies(p, self._leaf(p), p))

    def _know(self, value: View | Copies) -> Tensor:
        self.known[id(value.tensor)] = value  # which holds the tensor, so that no other gets its id
        return value.tensor

    def _leaf(self, parameter: Tensor) -> Callable[[], Tensor]:
        """What makes the copies of a parameter."""

        def make() -> Tensor:
            if parameter.ndim > 1:
                self.copied.add(id(parameter))
                self.check(parameter)
            each: Tensor = Each.apply(parameter.detach(), self.capture.anchor, self.capture, id(parameter))
            return each

        return make

    def check(self, parameter: Tensor) -> None:
        """Raises NotRouted if a matrix has copies and is used as a matrix too: the two would not be added up."""
        if id(parameter) not in self.copied:
            return
        if any(id(parameter) == (matrix if isinstance(matrix, int) else matrix[0]) for matrix in self.capture.matrices):
            raise NotRouted("it is used in a linear map or an embedding too")

    def _operation(self, func: Function, name: str, args: Any, kwargs: Any, given: dict[int, Tensor]) -> Any:
        if kwargs:
            for argument in _POSITIONAL.get(name, ())[len(args) :]:
                if argument not in kwargs:
                    break
                args, kwargs = (*args, kwargs[argument]), {k: v for k, v in kwargs.items() if k != argument}
        first, second, third = ([self.known.get(id(x)) for x in args[:3]] + [None] * 3)[:3]
        if name == "linear" and first is None and not isinstance(second, Copies) and self._is_batch(args[0]):
            return linear(self, args[0], second or args[1], *args[2:], product=False)
        if name == "linear" and first is None and not isinstance(second, Copies) and self._is_constant(args[0]):
            return self._of_constant(
                func, args, kwargs, given, lambda x: linear(self, x, second or args[1], *args[2:], product=False)
            )
        if name in _PRODUCTS and first is None and isinstance(second, View) and not kwargs:
            if second.tensor.ndim > 2:
                return experts(self, args[0], second)
            if self._is_batch(args[0]):
                return linear(self, args[0], second, product=True)
        if name in _PRODUCTS and isinstance(first, View) and second is None and _maps_columns(first, *args[1:]):
            return linear(self, args[1].mT, first, product=False).mT
        if name == "addmm" and second is None and not isinstance(third, Copies) and not kwargs:
            return linear(self, args[1], third or args[2], args[0], product=True)
        if name == "baddbmm" and second is None and not isinstance(third, Copies) and not kwargs:
            y = experts(self, args[1], third) if third else self._judged(torch.bmm, *args[1:])
            return self.again(torch.add, y.transpose(0, 1), self.again(Tensor.transpose, args[0], 0, 1)).transpose(0, 1)
        if name == "embedding" and first is None and isinstance(second, View) and second.is_rows:
            if self._is_constant(args[0]) and not is_positions(self.capture, args[0]):
                return self._of_constant(
                    func, args, kwargs, given, lambda ids: embedding(self, ids, second, *args[2:], **kwargs)
                )
            if args[0].ndim > 1 or by_sequence(torch.Size((*args[0].shape, 1)), self.capture):
                return embedding(self, args[0], second, *args[2:], **kwargs)
        if name == "getitem" and isinstance(first, View) and (row := _row(first, args[1])) is not None:
            ids = torch.tensor(row, device=args[0].device)
            return self._of_constant(F.embedding, (ids, args[0]), {}, given, lambda ids: embedding(self, ids, first))
        if name in ("layer_norm", "rms_norm", "group_norm") and first is None:
            return self._norm(func, name, *args, **kwargs)
        if name in _REFERENCES and first is None:
            return self._judged(func, *args, **kwargs)
        return self._general(rows_of_copies if name == "embedding" else func, name, args, kwargs, given)

    def _norm(
        self, func: Function, name: str, x: Tensor, shape: Any, weight: Any = None, *options: Any, **named: Any
    ) -> Tensor:
        """A normalisation, its scale and shift apart."""
        bias, shifts = named.pop("bias", None), name != "rms_norm"
        if shifts and options:
            bias, options = options[0], options[1:]
        y: Tensor = self._judged(func, x, shape, None, *((None,) if shifts else ()), *options, **named)
        for other, vector in ((torch.mul, named.pop("weight", weight)), (torch.add, bias)):
            if vector is not None and name == "group_norm":  # channels stand on the second axis
                vector = self.again(Tensor.reshape, vector, (-1, *(1,) * (x.ndim - 2)))
            if vector is not None:
                y = self.again(other, y, vector)
        return y

    def _of_constant(
        self, func: Function, args: Any, kwargs: Any, given: dict[int, Tensor], of_batch: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """A linear map or an embedding of a constant: `of_batch` takes the constant once a sequence."""
        x, result = args[0], func(*args, **kwargs)
        if not result.requires_grad:
            return result
        value = next(self.known[i] for i in given if i in self.known)
        each = partial(of_batch, x.expand(self.capture.batch, *x.shape))
        return self._know(Copies(result, each, value.parameter, result.shape[:1] == (self.capture.batch,)))

    def _general(self, func: Function, name: str, args: Any, kwargs: Any, given: dict[int, Tensor]) -> Any:
        """Any operation: on chosen parameters alone, or on them and tensors of the batch."""
        if name == "getitem" and isinstance(args[1], Tensor) and args[1].ndim == 0:
            args = args[0], int(args[1])  # which waits for the device as the operation itself would
        if name == "setitem":
            raise NotRouted("it works in place")
        values = [self.known[i] for i in given if i in self.known]
        others = [x for i, x in given.items() if i not in self.known and name not in _REFERENCES]
        shared = [(x, axis) for x in others if (axis := self._axis(x, values)) is not None]
        if shared:
            rank, length = max(x.ndim for x, _ in shared), len(shared[0][0])
            aligned = [x for x in others if self._is_constant(x) and x.ndim == rank and len(x) == length]
            shared += [(x, shared[0][1]) for x in aligned if shared[0][1] != "tokens"]
            sequences = [self.tokens.of(x) for x, _ in shared]
            if len({axis for _, axis in shared}) > 1 or any(s is not sequences[0] for s in sequences):
                raise NotRouted("its other tensors have different first axes")
            copies = [self._copies(value) for value in values]
            result = together(func, args, kwargs, copies, [x for x, _ in shared], shared[0][1], sequences[0])
            return result if sequences[0] is None else self.tokens.mark(result, sequences[0])
        result = func(*args, **kwargs)
        if not any(x.requires_grad for x in tensors_in([result])):
            self.constants.follow(self.constants.judge(given.values(), self.known)[1], func, args, result)
            return result
        stray = [tuple(x.shape) for x in others if x.requires_grad and not self._is_constant(x)]
        if stray:
            raise NotRouted(f"the first axis of {stray[0]} is not the {self.capture.batch} sequences")
        if name.endswith("_") or func.__name__ == "__set__":
            raise NotRouted("it works in place")
        return self._alone(func, name, args, kwargs, values, result)

    def _is_batch(self, x: Tensor) -> bool:
        """Whether a linear map of this tensor is one of the batch's."""
        mapped = self.tokens.of(x) is not None or by_sequence(x.shape, self.capture) is not None
        return mapped and not self._is_constant(x)

    def _axis(self, x: Tensor, values: list[View | Copies]) -> Axis | None:
        """What a tensor's first axis is; None for a constant."""
        c = self.capture
        if self.tokens.of(x) is not None:
            return "tokens"
        if x.ndim < 2 or self._is_constant(x):
            return None
        if x.shape[0] == c.batch:
            return "batch"
        if not x.requires_grad and any(x.shape == value.tensor.shape for value in values):
            return None  # a constant too large to be held
        return "flat" if x.shape[0] % (c.batch * c.length) == 0 else None

    def _is_constant(self, x: Tensor) -> bool:
        return self.constants.has(x) or id(x) in self.eyes or isinstance(x, nn.Parameter)

    def _copies(self, value: View | Copies) -> Copies:
        """A matrix as copies, where these are not too many numbers."""
        if isinstance(value, Copies):
            return value
        numbers = value.parameter.numel() * self.capture.batch
        if numbers > COPIES:
            raise NotRouted(
                f"it is no linear map, and copies for {self.capture.batch} sequences would take {numbers} numbers, "
                f"more than {COPIES}"
            )
        leaf = self._leaf(value.parameter)
        return Copies(value.tensor, lambda: torch.func.vmap(value.of)(leaf()), value.parameter)

    def _alone(
        self, func: Function, name: str, args: Any, kwargs: Any, values: list[View | Copies], result: Any
    ) -> Any:
        """An operation on chosen parameters alone: a view of one stays a matrix, anything else has copies."""
        value = values[0]
        if isinstance(value, View) and len(values) == 1:
            view = _view(value, func, name, args, kwargs, result)
            if view is not None:
                return self._know(view)
        made: list[Any] = []

        def make(i: int | None) -> Tensor:
            if not made:
                made.append(alone(func, args, kwargs, [self._copies(value) for value in values]))
            each: Tensor = made[0] if i is None else made[0][i]
            return each

        several = isinstance(result, list | tuple)
        before = (
            name in _EXPANSIONS
            or any(isinstance(value, Copies) and value.expanded for value in values)
            or any(x.shape[:1] == (self.capture.batch,) for x in tensors_in((*args, *kwargs.values())))
        )
        for i, x in enumerate(result if several else [result]):
            expanded = before and x.shape[:1] == (self.capture.batch,)
            self._know(Copies(x, partial(make, i if several else None), value.parameter, expanded))
        return result


def _view(value: View, func: Function, name: str, args: Any, kwargs: Any, result: Tensor) -> View | None:
    """The view that a transposition, a cast or the choice of an expert makes of a view."""
    x = value.tensor

    def of(p: Tensor) -> Any:
        return func(value.of(p), *args[1:], **kwargs)

    if name in _CASTS and result.shape == x.shape:
        return View(result, value.parameter, of, value.transposed, value.expert)
    if name in _VIEWS and (result.shape, result.stride()) == (x.mT.shape, x.mT.stride()):
        return View(result, value.parameter, of, not value.transposed, value.expert)
    if name == "getitem" and x.ndim == 3 and value.expert is None and isinstance(args[1], int):
        return View(result, value.parameter, of, value.transposed, args[1] % len(x))
    return None


def _row(matrix: View, index: Any) -> int | None:
    """Which row of a matrix an index picks, if it is one whole row: the embedding of a pad token, say."""
    if isinstance(index, tuple) and len(index) == 2 and index[1] in (..., slice(None)):
        index = index[0]
    picks = isinstance(index, int) and not isinstance(index, bool)
    return index % len(matrix.tensor) if picks and matrix.is_rows and matrix.tensor.ndim == 2 else None


def _maps_columns(matrix: View, x: Tensor) -> bool:
    """Whether W x is a linear map of the columns of x, (B, ..., p, T)."""
    return matrix.tensor.ndim == 2 and x.ndim > 2


def _name(func: Function) -> str:
    """The function's name: "T" for `Tensor.T.__get__`, "getitem" for `Tensor.__getitem__`."""
    if func.__name__ == "__get__":
        return str(func.__self__.__name__)  # type: ignore[attr-defined]
    return func.__name__.strip("_") if func.__name__.startswith("__") else func.__name__
