"""The public entry point of the gradient-norm engine."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vigor.gradnorm.loop import Accumulation, loop_row
from vigor.gradnorm.mode import scoring_mode
from vigor.gradnorm.parameters import Parameters, select_parameters
from vigor.rollouts import identical_rows, strip_padding


def sequence_grad_norms(
    model: nn.Module,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"],
    completion_mask: Shaped[Tensor, "B L"],
    *,
    parameters: Parameters = "trainable",
    method: Literal["loop"] = "loop",
    temperature: float = 1.0,
    accumulation: Accumulation = "float32",
    return_token_logps: bool = False,
) -> Float[Tensor, " B"] | tuple[Float[Tensor, " B"], Float[Tensor, "B L"]]:
    """‖∇_θ NLL_b‖₂ for every row b: the quantity under VIGOR's reward (arXiv 2605.09920, eq. of the reward).

    NLL_b is the mean over the counted tokens of row b of -log softmax(logits / temperature), the logit at t-1
    predicting token t. Rows that are token for token the same are computed once and share their value. Padding, its
    side and amount, the order of the rows and gradient checkpointing do not change a norm. Dropout is off meanwhile;
    `.grad` and the modules' train/eval flags are left as they were.

    Args:
        model: causal language model; called with one unpadded row at a time.
        input_ids: int64 token ids, padded anywhere.
        attention_mask: 1 on real tokens; the masks may have any dtype.
        completion_mask: 1 on the counted tokens; a row's first real token cannot be counted.
        parameters: see `select_parameters`.
        method: "loop" differentiates row by row: one forward and backward each, exact.
        temperature: divides the logits; the temperature of sampling, so that reward and policy are one distribution.
        accumulation: "float32" squares in float32 and sums over rows of a matrix in float64; "gradient_dtype" squares,
            sums and takes the root in the gradient's own dtype, as the official code does (bfloat16 rounds 1-6 %
            away).
        return_token_logps: also return the (B, L) log-probabilities of the counted tokens (0 elsewhere).

    Returns:
        (B,) float32 (float64 for a float64 model), in nats per parameter unit; NaN for a row without counted tokens.

    Raises:
        ValueError: unknown method or accumulation, temperature not positive, `parameters` selects nothing, tensors of
            different shapes, or a row whose first token is counted.
    """
    if method != "loop":
        raise ValueError(f"sequence_grad_norms: unknown method {method!r}; choose 'loop'.")
    if not temperature > 0:
        raise ValueError(f"sequence_grad_norms: temperature must be positive, got {temperature}.")
    if accumulation not in get_args(Accumulation):
        raise ValueError(
            f"sequence_grad_norms: unknown accumulation {accumulation!r}; choose 'float32' or 'gradient_dtype'."
        )
    chosen = list(select_parameters(model, parameters).values())
    rows = strip_padding(input_ids, attention_mask, completion_mask)
    dtype = torch.promote_types(chosen[0].dtype, torch.float32)
    norms = torch.full((len(rows),), torch.nan, dtype=dtype, device=input_ids.device)
    logps = torch.zeros(input_ids.shape, dtype=dtype, device=input_ids.device)
    # Before torch 2.10, weights that autocast cast under no_grad are reused without their graph (pytorch#112583): a
    # forward pass such as that of `token_stats`, in the same autocast region, would leave gradients out.
    torch.clear_autocast_cache()
    with scoring_mode(model), torch.enable_grad():
        for same in identical_rows(rows):
            row = rows[same[0]]
            if not row.completion_L.any():
                continue
            norm, logps_T = loop_row(model, row, chosen, temperature=temperature, accumulation=accumulation)
            for b in same:
                norms[b] = norm
                logps[b, rows[b].positions_L[rows[b].completion_L]] = logps_T
    return (norms, logps) if return_token_logps else norms
