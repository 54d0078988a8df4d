"""How much the fused update holds, estimated from shapes before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vigor.gradnorm.kept import keeps_gradient

ROUTED = 8
"""Experts that a token is taken to use, for matrices that hold one slice an expert."""
INTERMEDIATE = 1.5
"""What a graph holds, over the inputs and outputs of its linear maps."""


@dataclass(frozen=True)
class FusedBytes:
    """Bytes that a batch would hold between the norms and the update."""

    keep: int
    retain: int


def fused_bytes(model: nn.Module, lengths_B: Tensor, counted_B: Tensor, *, dtype: torch.dtype) -> FusedBytes:
    """Estimates for rows of `lengths_B` tokens, `counted_B` of them counted, with activations of `dtype`.

    The output embedding sees counted tokens only. Shared inputs (of q, k and v) count once for each map: the estimate
    is on the high side.
    """
    size = dtype.itemsize
    get_head = getattr(model, "get_output_embeddings", None)
    head = {id(p) for p in get_head().parameters()} if callable(get_head) and get_head() is not None else set()
    lengths, counted = lengths_B.tolist(), counted_B.tolist()
    keep = retain = 0
    for parameter in model.parameters():
        if parameter.ndim < 2:
            keep += 4 * parameter.numel() * len(lengths) * parameter.requires_grad
            continue
        *experts, q, p = parameter.shape
        used = min(experts[0], ROUTED) if experts else 1
        for T in counted if id(parameter) in head else lengths:
            activations = size * used * T * (p + q)
            retain += int(activations * INTERMEDIATE) * (id(parameter) not in head)  # the head is run again
            if parameter.requires_grad:
                keep += 4 * p * q if not experts and keeps_gradient(T, p, q, size) else activations
    layers = [module for module in model.modules() if vars(module).get("gradient_checkpointing") and module.training]
    if layers:  # of each checkpointed layer its input, and one layer's graph at a time
        width = max(p.shape[-1] for p in model.parameters() if p.ndim == 2)
        retain = size * sum(lengths) * width * (len(layers) + 1) + retain // max(1, len(layers))
    return FusedBytes(keep, retain)
