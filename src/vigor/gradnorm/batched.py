"""The batched method: one forward and one backward for many sequences, and never a parameter gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vigor.gradnorm.capture import Capture
from vigor.gradnorm.route import captured
from vigor.rollouts import Row

IGNORED = -100
"""Label of a position whose next token is not counted."""


def batched_rows(
    model: nn.Module, rows: list[Row], parameters: dict[str, nn.Parameter], *, temperature: float
) -> tuple[Float[Tensor, " B"], list[Float[Tensor, " T"]]]:
    """Gradient norms (B,) and each row's log-probabilities (T,), float32 or wider, of rows that have counted tokens."""
    ids_BL = nn.utils.rnn.pad_sequence([row.ids_L for row in rows], batch_first=True)
    attended_BL = nn.utils.rnn.pad_sequence([torch.ones_like(row.ids_L) for row in rows], batch_first=True)
    counted_BL = nn.utils.rnn.pad_sequence([row.completion_L for row in rows], batch_first=True)
    capture = Capture(parameters, batch=len(rows), length=ids_BL.shape[1], device=ids_BL.device)
    lengths_B = counted_BL.sum(1)
    # Labels at the position before their token, and no slicing of the logits: each copy of B x L x V numbers counts.
    labels_BL = nn.functional.pad(ids_BL.masked_fill(~counted_BL, IGNORED)[:, 1:], (0, 1), value=IGNORED)
    with captured(model, capture):
        logits = model(input_ids=ids_BL, attention_mask=attended_BL, use_cache=False).logits.flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1:
            logits = logits / temperature
        nll = nn.functional.cross_entropy(logits, labels_BL.flatten(), ignore_index=IGNORED, reduction="none")
        del logits  # the log-softmax stays until the backward pass
        squares_B = capture.backward((nll.view(ids_BL.shape).sum(1) / lengths_B).sum())
    logps_N = -nll.detach()[labels_BL.flatten() != IGNORED]
    return squares_B.sqrt().to(nll.dtype), list(logps_N.split(lengths_B.tolist()))
