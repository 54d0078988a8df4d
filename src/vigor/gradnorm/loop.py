"""The obviously right method: one unpadded row, one forward, one backward, one norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vigor.rollouts import Row

Accumulation = Literal["float32", "gradient_dtype"]


def loop_row(
    model: nn.Module,
    row: Row,
    parameters: list[nn.Parameter],
    *,
    temperature: float,
    accumulation: Accumulation,
    on_logits: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
    index: int = 0,
) -> tuple[Float[Tensor, ""], Float[Tensor, " T"]]:
    """Gradient norm and the log-probabilities (T,) of the counted tokens of one row, float32 or wider."""
    logps_T = row_logps(model, row, temperature, on_logits, index)
    used = [g for g in _gradients(logps_T, parameters) if g is not None]
    # None where the row does not depend on a parameter, such as an expert that it was not routed to.
    norm = gradient_norm(used, accumulation) if used else logps_T.new_zeros(())
    return norm, logps_T.detach()


def loop_gradients(
    model: nn.Module, row: Row, parameters: list[nn.Parameter], *, temperature: float
) -> list[Tensor | None]:
    """∇ NLL of one row, a parameter at a time; None where the row does not depend on it."""
    return _gradients(row_logps(model, row, temperature), parameters)


def row_logps(
    model: nn.Module,
    row: Row,
    temperature: float,
    on_logits: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
    index: int = 0,
) -> Float[Tensor, " T"]:
    """Log-probabilities of the counted tokens; `on_logits` gets their logits / temperature."""
    output = model(input_ids=row.ids_L[None], attention_mask=torch.ones_like(row.ids_L)[None], use_cache=False)
    counted = row.completion_L[1:]
    logits_LV = without_prefix(output.logits, len(row.ids_L))[0]
    z_TV = logits_LV[:-1][counted].to(torch.promote_types(output.logits.dtype, torch.float32)) / temperature
    if on_logits is not None:
        at_T = row.completion_L.nonzero().squeeze(1)
        on_logits(torch.full_like(at_T, index), at_T, z_TV.detach(), row.ids_L[at_T])
    return z_TV.log_softmax(-1).gather(-1, row.ids_L[1:][counted][:, None]).squeeze(-1)


def without_prefix(x_BPd: Tensor, length: int) -> Float[Tensor, "B L d"]:
    """The last `length` positions of logits or hidden states: an adapter may have put virtual tokens before them.

    Raises:
        ValueError: there are fewer.
    """
    found = x_BPd.shape[1]
    if found < length:
        raise ValueError(
            f"gradient norm: the model returned {found} positions for {length} tokens. It must score every token "
            "(no logits_to_keep, no pooling), as a causal language model does."
        )
    return x_BPd if found == length else x_BPd[:, found - length :]


def _gradients(logps_T: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    gradients = torch.autograd.grad(-logps_T.mean(), parameters, allow_unused=True)
    return [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]


def gradient_norm(grads: list[Tensor], accumulation: Accumulation) -> Float[Tensor, ""]:
    """√Σ g² over all gradients, as a scalar of float32 or wider.

    A flat float32 sum over the 16 million entries of one matrix is off by 1e-3 on CPU; squared row norms summed in
    float64 are not, at the same speed.
    """
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    if accumulation == "gradient_dtype":
        # Not torch.stack(...).sum(): that may widen inside; the official code adds the terms one by one.
        return torch.sqrt(sum((g.square().sum() for g in grads[1:]), start=grads[0].square().sum())).to(dtype)
    rows = []
    for g in grads:
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        rows.append(torch.linalg.vector_norm(g.reshape(-1, g.shape[-1]) if g.ndim > 1 else g.reshape(1, -1), dim=1))
    norms = torch.cat(rows)
    widest = torch.float32 if norms.device.type == "mps" else torch.float64  # MPS has no float64
    return norms.to(widest).square().sum().sqrt().to(dtype)
