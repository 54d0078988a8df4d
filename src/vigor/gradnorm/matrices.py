"""Matrices: how a routed forward pass uses a chosen matrix as a linear map, as experts' maps and as an embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vigor.gradnorm.maps import Expert, Linear, Rows, by_sequence
from vigor.gradnorm.values import NotRouted, View

if TYPE_CHECKING:
    from vigor.gradnorm.capture import Capture
    from vigor.gradnorm.watch import Watch


def linear(watch: Watch, x: Tensor, weight: View | Tensor, bias: Tensor | None = None, *, product: bool) -> Tensor:
    """x Wᵀ + b, or x W + b where it is a `product`; W or b are chosen, or both."""
    c = watch.capture
    vector = None if bias is None else watch.known.get(id(bias))
    if bias is not None and vector is not None and (vector.tensor is not vector.parameter or bias.ndim != 1):
        return watch.again(torch.add, linear(watch, x, weight, product=product), bias)
    sequence_N = watch.tokens.of(x)
    if isinstance(weight, View) and weight.expert is not None:
        y = _expert(watch, x, weight, sequence_N, product=product)
        return y if bias is None else watch.again(torch.add, y, bias)
    if sequence_N is not None:
        within_N, most = _within(sequence_N, c.batch)
        x_BTp = x.new_zeros(c.batch, most, x.shape[-1]).index_put((sequence_N, within_N), x)
        y_BTq = linear(watch, x_BTp, weight, bias, product=product)
        return watch.tokens.mark(y_BTq[sequence_N, within_N], sequence_N)
    shape = by_sequence(x.shape, c)
    if shape is None:
        raise NotRouted(f"in an input of shape {tuple(x.shape)} the {c.batch} sequences cannot be told apart")
    tracked, stored, transposed = None, weight, product
    if isinstance(weight, View):
        tracked, stored, transposed = id(weight.parameter), weight.stored, product != weight.transposed
        if not c.in_backward:
            c.uses(tracked).expected += 1
        watch.check(weight.parameter)
    assert isinstance(stored, Tensor)
    tracked_bias = None if vector is None else id(bias)
    plain_bias = None if bias is None else bias.detach()
    y_BTq = Linear.apply(x, stored.detach(), plain_bias, c.anchor, c, tracked, tracked_bias, shape, transposed)
    return y_BTq


def _expert(watch: Watch, x: Tensor, view: View, sequence_N: Int[Tensor, " N"] | None, *, product: bool) -> Tensor:
    """One expert's matrix, on picked tokens or on all."""
    c, x_Np = watch.capture, x
    if sequence_N is None:
        shape = by_sequence(x.shape, c)
        if shape is None:
            raise NotRouted(f"an expert gets {tuple(x.shape)} inputs that are not tokens picked by an index")
        B, T = shape
        x_Np, sequence_N = x.reshape(B * T, -1), torch.arange(B, device=x.device).repeat_interleave(T)
    assert view.expert is not None
    matrix = id(view.parameter), view.expert
    uses = c.uses(matrix)
    if not c.in_backward:
        uses.expected += 1
        if uses.expected > 1:
            raise NotRouted(f"expert {view.expert} is used a second time")
    watch.check(view.parameter)
    y_Nq: Tensor = Expert.apply(x_Np, view.stored, c.anchor, c, matrix, sequence_N, product != view.transposed)
    return watch.tokens.mark(y_Nq, sequence_N) if x_Np is x else y_Nq.reshape(*x.shape[:-1], -1)


def experts(watch: Watch, x_ENp: Tensor, stack: View) -> Float[Tensor, "E N q"]:
    """A stack of matrices times as many blocks of inputs, each of all tokens."""
    if stack.tensor.ndim != 3 or x_ENp.ndim != 3 or len(x_ENp) != len(stack.tensor):
        raise NotRouted(f"inputs of shape {tuple(x_ENp.shape)} for matrices of shape {tuple(stack.tensor.shape)}")
    views = [View(w, stack.parameter, stack.of, stack.transposed, e) for e, w in enumerate(stack.tensor)]
    return torch.stack([_expert(watch, x, w, None, product=True) for x, w in zip(x_ENp, views, strict=True)])


def embedding(
    watch: Watch,
    ids: Tensor,
    view: View,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """F.embedding."""
    c = watch.capture
    if max_norm is not None or scale_grad_by_freq:
        raise NotRouted("it renormalises its rows")
    if ids.shape[0] == 1 and c.batch > 1:
        ids = ids.expand(c.batch, *ids.shape[1:])  # position ids broadcast over the batch would merge the sequences
    if by_sequence(torch.Size((*ids.shape, 1)), c) is None:
        raise NotRouted(f"the first axis of ids of shape {tuple(ids.shape)} is not the {c.batch} sequences")
    if c.batch == c.length > 1 and any(torch.equal(ids, x.T) and not torch.equal(ids, x) for x in watch.inputs):
        raise NotRouted("the first axis of the ids is the tokens")
    flat, tracked = ids.reshape(c.batch, -1), id(view.parameter)
    uses = c.uses(tracked)
    if not c.in_backward:
        uses.expected += 1
        uses.ids.append(flat)
    else:  # recomputed under gradient checkpointing: the same ids object as before
        flat = next(known for known in uses.ids if torch.equal(known, flat))
    watch.check(view.parameter)
    padding_idx = None if padding_idx is None else padding_idx % len(view.tensor)
    rows: Tensor = Rows.apply(ids, flat, view.stored, padding_idx, c.anchor, c, tracked)
    return rows


def is_positions(capture: Capture, ids: Tensor) -> bool:
    """Whether constant ids are a batch's positions, (B, L) with the same row for each sequence, and not a table."""
    shape = capture.batch, capture.length
    return ids.shape == shape and (shape[0] != shape[1] or bool((ids == ids[:1]).all()))


def rows_of_copies(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """F.embedding out of plainer operations: mapped by vmap, it applies `padding_idx` to the first sequence only."""
    if max_norm is not None or scale_grad_by_freq:
        raise NotRouted("it renormalises its rows")
    rows = weight[ids]
    if padding_idx is None:
        return rows
    return torch.where((ids == padding_idx % len(weight))[..., None], rows.detach(), rows)


def _within(sequence_N: Int[Tensor, " N"], batch: int) -> tuple[Int[Tensor, " N"], int]:
    """Each token's place among those of its sequence, and the most tokens of a sequence."""
    counts_B = sequence_N.bincount(minlength=batch)
    order_N = sequence_N.argsort(stable=True)
    starts_B = counts_B.cumsum(0) - counts_B
    within_N = torch.empty_like(order_N)
    within_N[order_N] = torch.arange(len(order_N), device=order_N.device) - starts_B[sequence_N[order_N]]
    return within_N, int(counts_B.max())
