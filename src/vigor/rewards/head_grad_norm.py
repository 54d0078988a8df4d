"""Head-gradient norm: VIGOR's norm over the output matrix alone, exact, without a backward pass through the decoder.

Source: a relative of VIGOR's reward (arXiv 2605.09920) with fewer parameters.

    ∇_W NLL(y|x) = (1/T) Σ_t δ_t h_tᵀ,   h_t the head's input, δ_t the gradient of -log π(y_t) at the head's output
    score(y) = -√T · ‖∇_W NLL(y|x)‖₂
    reward   = rank of the score within the group, mapped to [-1, 1]

W is the matrix as the head uses it: what a tied input embedding would add is left out, and a bias counts. Where the
output embedding is not tied this is `vigor(parameters=head)`. Departures:
 1. None: the library's own definition.

Command: vigor train --config lab --reward_funcs head_grad_norm
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vigor.gradnorm import scoring_mode
from vigor.gradnorm.squares import GramCache, linear_square
from vigor.rewards.base import Reward, compose, negate, ranked, times_length
from vigor.rollouts import Rollouts, Row, identical_rows, strip_padding
from vigor.signals import PolicyPass

LOGITS = 1 << 26
"""Most logits of one pass, unless a single row has more: 256 MiB in float32, three times over."""


def head_grad_norm() -> Reward:
    """Rank of minus √T times the norm of the gradient with respect to the output matrix."""

    def signal(rollouts: Rollouts, policy: PolicyPass) -> Tensor:
        return policy.keep("head_grad_norms", lambda: head_grad_norms(policy))

    # It reads the policy as the token statistics do, in a pass of its own.
    return compose("head_grad_norm", "token_stats", signal, times_length(0.5), negate, shape=ranked())


def head_grad_norms(policy: PolicyPass) -> Tensor:
    """(B,) ‖∇_W mean NLL‖, float32 (float64 for a float64 model); NaN for a row without counted tokens.

    Raises:
        ValueError: the model has no output embedding that is a linear layer and runs once a forward pass.
    """
    head, r = _head(policy.model), policy.rollouts
    rows = strip_padding(r.input_ids_BL, r.attention_mask_BL, r.completion_mask_BL)
    same = [group for group in identical_rows(rows) if rows[group[0]].completion_L.any()]
    norms_B = torch.full((len(rows),), torch.nan, dtype=torch.promote_types(head.weight.dtype, torch.float32))
    norms_B = norms_B.to(r.input_ids_BL.device)
    same.sort(key=lambda group: len(rows[group[0]].ids_L))
    with scoring_mode(policy.model):
        while same:
            # Ascending lengths: the last of the batch is the longest.
            size = 1
            while size < len(same) and (size + 1) * len(rows[same[size][0]].ids_L) * head.out_features <= LOGITS:
                size += 1
            batch, same = same[:size], same[size:]
            found = _norms(policy.model, head, [rows[group[0]] for group in batch], policy.temperature)
            for group, norm in zip(batch, found, strict=True):
                norms_B[group] = norm.to(norms_B.dtype)
    return norms_B


def _norms(model: nn.Module, head: nn.Linear, rows: list[Row], temperature: float) -> Tensor:
    pad = nn.utils.rnn.pad_sequence
    ids_BL = pad([row.ids_L for row in rows], batch_first=True)
    attended_BL = pad([torch.ones_like(row.ids_L) for row in rows], batch_first=True)
    counted_BL = pad([row.completion_L for row in rows], batch_first=True)
    seen: list[Tensor] = []

    def start(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # From here on a graph is made: what the model does to the head's output, such as a soft cap, is part of δ.
        torch.set_grad_enabled(True)
        seen.append(args[0].detach())

    def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    hooks = head.register_forward_pre_hook(start), head.register_forward_hook(leaf)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids_BL, attention_mask=attended_BL, use_cache=False).logits
            if len(seen) != 2:
                raise ValueError(
                    f"head_grad_norm: a forward pass of {type(model).__name__} runs its output embedding "
                    f"{len(seen) // 2} times instead of once. Use vigor(parameters=head)."
                )
            hidden_BLd, output_BLV = seen
            wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)) / temperature
            nll_BL = nn.functional.cross_entropy(wide.mT, ids_BL[:, 1:], reduction="none")
            loss = (nll_BL * counted_BL[:, 1:]).sum(1) / counted_BL.sum(1)
            (delta_BLV,) = torch.autograd.grad(loss.sum(), output_BLV)
    finally:
        for hook in hooks:
            hook.remove()
    square_B = linear_square(hidden_BLd, delta_BLV, GramCache())
    if head.bias is not None:
        square_B = square_B + delta_BLV.sum(1, dtype=square_B.dtype).square().sum(-1)
    return square_B.sqrt()


def _head(model: nn.Module) -> nn.Linear:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"head_grad_norm: the output embedding of {type(model).__name__} is "
            f"{'missing' if head is None else type(head).__name__}, not a linear layer. Use vigor(parameters=head)."
        )
    return head
