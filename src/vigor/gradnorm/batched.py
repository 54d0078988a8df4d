"""The batched method: one forward and one backward for many sequences, and never a parameter gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vigor.gradnorm.capture import Capture
from vigor.gradnorm.route import captured
from vigor.rollouts import Row


def batched_rows(
    model: nn.Module, rows: list[Row], parameters: dict[str, nn.Parameter], *, temperature: float
) -> tuple[Float[Tensor, " B"], list[Float[Tensor, " T"]]]:
    """Gradient norms (B,) and each row's log-probabilities (T,), float32 or wider, of rows that have counted tokens."""
    ids_BL = nn.utils.rnn.pad_sequence([row.ids_L for row in rows], batch_first=True)
    attended_BL = nn.utils.rnn.pad_sequence([torch.ones_like(row.ids_L) for row in rows], batch_first=True)
    counted_BL = nn.utils.rnn.pad_sequence([row.completion_L for row in rows], batch_first=True)
    capture = Capture(parameters, batch=len(rows), length=ids_BL.shape[1], device=ids_BL.device)
    with captured(model, capture):
        logits = model(input_ids=ids_BL, attention_mask=attended_BL, use_cache=False).logits
        counted = counted_BL[:, 1:]
        logits_NV = logits[:, :-1][counted].to(torch.promote_types(logits.dtype, torch.float32))
        targets_N = ids_BL[:, 1:][counted]
        logps_N = (logits_NV / temperature).log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)
        lengths_B = counted.sum(1)
        weights_N = (1 / lengths_B.to(logps_N.dtype)).repeat_interleave(lengths_B)
        squares_B = capture.backward(-(weights_N * logps_N).sum())
    return squares_B.sqrt().to(logps_N.dtype), list(logps_N.detach().split(lengths_B.tolist()))
