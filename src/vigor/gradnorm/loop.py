"""The obviously right method: one unpadded row, one forward, one backward, one norm."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vigor.rollouts import Row

Accumulation = Literal["float32", "gradient_dtype"]


def loop_row(
    model: nn.Module, row: Row, parameters: list[nn.Parameter], *, temperature: float, accumulation: Accumulation
) -> tuple[Float[Tensor, ""], Float[Tensor, " T"]]:
    """Gradient norm and the log-probabilities (T,) of the counted tokens of one row, float32 or wider."""
    output = model(input_ids=row.ids_L[None], attention_mask=torch.ones_like(row.ids_L)[None], use_cache=False)
    counted = row.completion_L[1:]
    logits_TV = output.logits[0, :-1][counted].to(torch.promote_types(output.logits.dtype, torch.float32))
    logps_T = (logits_TV / temperature).log_softmax(-1).gather(-1, row.ids_L[1:][counted][:, None]).squeeze(-1)
    grads = torch.autograd.grad(-logps_T.mean(), parameters, allow_unused=True)
    used = [g for g in grads if g is not None]
    # None where the row does not depend on a parameter, such as an expert that it was not routed to.
    norm = gradient_norm(used, accumulation) if used else logps_T.new_zeros(())
    return norm, logps_T.detach()


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
