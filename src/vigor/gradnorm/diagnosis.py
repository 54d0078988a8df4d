"""Diagnosis: which module gives a row another result in a batch than alone, once a self-check has failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vigor.rollouts import Row

NUMBERS = 4096
"""Most numbers of one module's output that are compared."""


def where_rows_differ(model: nn.Module, rows: Sequence[Row], b: int, tolerance: float) -> str | None:
    """The name of the first module, in order of completion, whose output for row b depends on its company; or None."""
    together, alone = _outputs(model, rows, b), _outputs(model, [rows[b]], 0)
    for name, x in together.items():
        y = alone.get(name, x)
        if x.shape == y.shape and not ((x - y).abs().max() <= tolerance * y.abs().max()):
            return name[0]
    return None


def where_gradients_differ(
    names: Sequence[str], found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]
) -> str | None:
    """The name of the parameter whose gradient is furthest off."""
    worst: tuple[float, str | None] = 0.0, None
    for name, f, w in zip(names, found, wanted, strict=True):
        if f is not None or w is not None:
            error = _norm(f if w is None else w if f is None else f - w)
            worst = max(worst, (error, name), key=lambda pair: pair[0])
    return worst[1]


def _norm(x: Tensor | None) -> float:
    return 0.0 if x is None else float(torch.linalg.vector_norm(x.double()))


@torch.no_grad()
def _outputs(model: nn.Module, rows: Sequence[Row], b: int) -> dict[tuple[str, int], Tensor]:
    """A part of each module's output for row b, by the module's name and which of its calls it is."""
    ids = nn.utils.rnn.pad_sequence([row.ids_L for row in rows], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row.ids_L) for row in rows], batch_first=True)
    real, (B, L) = len(rows[b].ids_L), ids.shape
    seen: dict[tuple[str, int], Tensor] = {}
    calls: Counter[str] = Counter()

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls[name] += 1
        x = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return
        if x.ndim == 2 and x.shape[0] == B * L:
            x = x.unflatten(0, (B, L))
        if x.ndim > 2 and x.shape[:2] == (B, L):
            part = x[b, :real].flatten().double()
            seen[name, calls[name]] = part[:: -(-len(part) // NUMBERS)].cpu()

    handles = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules() if name]
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen
