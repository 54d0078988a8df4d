"""The output head by itself: a causal model's logits for chosen positions, a few sequences at a time.

A causal language model is a decoder and a head. The decoder's output is taken from one call of the model; the model is
then called again with the decoder replaced by a part of that output, so that its own code turns hidden states into
logits (output embedding, soft cap, logit scale) for the positions that count only. The logits of a whole batch never
exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vigor.gradnorm.partitioned import whole_shape

HEAD_LOGITS = 1 << 23
"""Most logits of one part of the head's work, unless a single sequence has more (32 MiB in float32)."""


class NoDecoder(Exception):
    """The model's head cannot be run apart from its decoder."""


def has_decoder(model: nn.Module) -> bool:
    """Whether the model names a decoder, so that its head may be run apart."""
    try:
        find_decoder(model)
    except NoDecoder:
        return False
    return True


def find_decoder(model: nn.Module) -> nn.Module:
    """The module whose output the head turns into logits.

    Raises:
        NoDecoder: the model does not name one.
    """
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise NoDecoder
    return decoder


def vocabulary_size(model: nn.Module) -> int:
    """The most rows of a matrix, which the output embedding has; weights packed into integers do not count."""
    shapes = (whole_shape(p) for p in model.parameters() if p.is_floating_point())
    return max((shape[0] for shape in shapes if len(shape) == 2), default=1)


def hidden_states(
    model: nn.Module,
    decoder: nn.Module,
    inputs: dict[str, Tensor],
    paused: Callable[[], AbstractContextManager[None]],
) -> Any:
    """The decoder's output for the inputs; the head sees one position only, inside `paused()`.

    The model is called through its root, so that whatever wraps it (sharding, adapters) does its part.

    Raises:
        NoDecoder: the root does not call the decoder exactly once, the decoder's output has no last_hidden_state, or
            the head needs more of it.
    """
    seen: list[Any] = []
    forward = decoder.forward
    with ExitStack() as after:

        def once(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            seen.append(output)
            after.enter_context(paused())
            return _with_hidden(output, _hidden(output)[:, :1].detach())

        try:
            with replaced_forward(decoder, once):
                model(**inputs, use_cache=False)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if not seen:
                raise
            raise NoDecoder from error  # the head wants more of the decoder's output than hidden states
    if len(seen) != 1:
        raise NoDecoder
    return seen[0]


def logits_of(
    model: nn.Module,
    decoder: nn.Module,
    output: Any,
    hidden_BTh: Tensor,
    paused: Callable[[], AbstractContextManager[None]],
) -> Float[Tensor, "B T V"]:
    """The model's logits for hidden states. What it does before the decoder, such as to embed, is done `paused()`."""
    B, T = hidden_BTh.shape[:2]
    ones = torch.ones(B, T, dtype=torch.int64, device=hidden_BTh.device)
    with ExitStack() as before:

        def given(*_: Any, **__: Any) -> Any:
            before.close()
            return _with_hidden(output, hidden_BTh)

        before.enter_context(paused())
        with replaced_forward(decoder, given):
            logits: Tensor = model(input_ids=ones, attention_mask=ones, use_cache=False).logits
    return logits


def _hidden(output: Any) -> Tensor:
    hidden = vars(output).get("last_hidden_state") if is_dataclass(output) else None
    if not isinstance(hidden, Tensor):
        raise NoDecoder
    return hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """An output of the same kind with other hidden states and nothing else."""
    values = dict.fromkeys(field.name for field in fields(output))
    return type(output)(**{**values, "last_hidden_state": hidden})


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces a module's forward for a while."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@dataclass(frozen=True)
class Counted:
    """The counted positions of consecutive rows, right-padded to the longest row."""

    rows: slice
    at_BT: Int[Tensor, "B T"]
    """Position of the hidden state that predicts the token; any where there is none."""
    targets_BT: Int[Tensor, "B T"]
    real_BT: Tensor
    """bool (B, T): not padding."""

    @classmethod
    def of(cls, rows: slice, ids_BL: Tensor, counted_BL: Tensor, longest: int) -> Counted:
        """`longest` is the most counted tokens of these rows."""
        counted = counted_BL[rows]
        # A stable sort of "not counted" brings each row's counted positions to its front, in order.
        positions = (~counted).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        real = counted.gather(1, positions)
        return cls(rows, (positions - 1).clamp(min=0), ids_BL[rows].gather(1, positions), real)

    def pick(self, hidden_BLh: Tensor) -> Float[Tensor, "B T h"]:
        """The hidden states, a leaf of its own graph."""
        index = self.at_BT[..., None].expand(-1, -1, hidden_BLh.shape[-1])
        return hidden_BLh.detach()[self.rows].gather(1, index).requires_grad_()

    def scatter(self, gradient_BTh: Tensor, into_BLh: Tensor) -> None:
        """Adds the gradients of the picked hidden states to where they came from; padding has none."""
        index = self.at_BT[..., None].expand_as(gradient_BTh)
        into_BLh[self.rows].scatter_add_(1, index, gradient_BTh)


def counted_parts(ids_BL: Int[Tensor, "B L"], counted_BL: Tensor, lengths: list[int], vocabulary: int) -> list[Counted]:
    """The counted positions in parts of consecutive rows of at most `HEAD_LOGITS` logits, or single rows."""
    parts, start = [], 0
    while start < len(lengths):
        stop, longest = start + 1, lengths[start]
        while stop < len(lengths):
            longest_with = max(longest, lengths[stop])
            if (stop + 1 - start) * longest_with * vocabulary > HEAD_LOGITS:
                break
            stop, longest = stop + 1, longest_with
        parts.append(Counted.of(slice(start, stop), ids_BL, counted_BL, longest))
        start = stop
    return parts
