"""Signals: what one pass over the policy says about every token, computed once a batch and shared.

Alignment: the logits at position t-1 predict token t; a statistic at (b, t) belongs to the distribution from which
token t of row b was sampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vigor.gradnorm import scoring_mode, sequence_grad_norms
from vigor.gradnorm.loop import Accumulation
from vigor.gradnorm.parameters import Parameters
from vigor.rollouts import Rollouts, identical_rows, strip_padding


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the counted tokens, (B, L), float32 (float64 for a float64 model); 0 on all other tokens."""

    mask_BL: Int[Tensor, "B L"]
    """1 on the counted tokens."""
    logps_BL: Float[Tensor, "B L"]
    """log π(token), nats."""
    entropy_BL: Float[Tensor, "B L"]
    """-Σ π log π, nats."""
    self_certainty_BL: Float[Tensor, "B L"]
    """KL(uniform ‖ π) = -(1/V) Σ log(V π), nats (Kang et al. 2025, arXiv 2502.18581; Intuitor, arXiv 2505.19590)."""

    def mean(self, statistic_BL: Float[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Mean over each row's counted tokens; NaN for a row without any."""
        return statistic_BL.sum(1) / self.mask_BL.sum(1)


def token_stats(
    model: nn.Module,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"],
    completion_mask: Shaped[Tensor, "B L"],
    *,
    temperature: float = 1.0,
    micro_batch: int = 16,
    chunk: int = 4096,
) -> TokenStats:
    """Log-probability, entropy and self-certainty of every counted token, from one forward pass without gradients.

    Rows are stripped of padding, sorted by length and right-padded again, `micro_batch` at a time; rows that are token
    for token the same are computed once and share their values. The float32 log-softmax exists for `chunk` tokens at a
    time only: memory is chunk x V x 4 bytes plus the model's own logits of one micro-batch. Neither size changes a
    result beyond float rounding.

    Args:
        model: causal language model, called as `model(input_ids, attention_mask)`.
        input_ids: int64 token ids, padded anywhere.
        attention_mask: 1 on real tokens; the masks may have any dtype.
        completion_mask: 1 on the counted tokens.
        temperature: divides the logits.
        micro_batch: rows a forward pass.
        chunk: tokens a log-softmax.

    Raises:
        ValueError: temperature, micro_batch or chunk is not positive, the tensors differ in shape, or a row's first
            token is counted.
    """
    if not (temperature > 0 and micro_batch > 0 and chunk > 0):
        raise ValueError(
            f"token_stats: temperature ({temperature}), micro_batch ({micro_batch}) and chunk ({chunk}) must be "
            "positive."
        )
    rows = strip_padding(input_ids, attention_mask, completion_mask)
    same = {group[0]: group for group in identical_rows(rows) if rows[group[0]].completion_L.any()}
    order = sorted(same, key=lambda b: len(rows[b].ids_L))
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    logps, entropy, certainty = (torch.zeros(input_ids.shape, dtype=dtype, device=input_ids.device) for _ in range(3))
    with torch.no_grad(), scoring_mode(model):
        for start in range(0, len(order), micro_batch):
            batch = order[start : start + micro_batch]
            ids = nn.utils.rnn.pad_sequence([rows[b].ids_L for b in batch], batch_first=True)
            attended = nn.utils.rnn.pad_sequence([torch.ones_like(rows[b].ids_L) for b in batch], batch_first=True)
            counted = nn.utils.rnn.pad_sequence([rows[b].completion_L for b in batch], batch_first=True)
            logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits
            logits_NV, targets_N = logits[:, :-1][counted[:, 1:]], ids[:, 1:][counted[:, 1:]]
            del logits
            row_N = torch.cat([torch.full_like(rows[b].positions_L[rows[b].completion_L], b) for b in batch])
            position_N = torch.cat([rows[b].positions_L[rows[b].completion_L] for b in batch])
            for part in torch.arange(len(targets_N), device=ids.device).split(chunk):
                at = row_N[part], position_N[part]
                logps[at], entropy[at], certainty[at] = _statistics(
                    logits_NV[part].to(dtype) / temperature, targets_N[part]
                )
    for first, group in same.items():
        counted_at = rows[first].positions_L[rows[first].completion_L]
        for b in group[1:]:
            for statistic in (logps, entropy, certainty):
                statistic[b, rows[b].positions_L[rows[b].completion_L]] = statistic[first, counted_at]
    mask = (completion_mask.bool() & attention_mask.bool()).long()
    return TokenStats(mask, logps, entropy, certainty)


def _statistics(
    logits_NV: Float[Tensor, "N V"], targets_N: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-probability of the target, entropy and self-certainty of each row, in the logits' dtype.

    Sums over the vocabulary are float64: with 152,000 terms in float32, a self-certainty is off by 4e-6 of itself and
    an entropy by 1e-5, and neither may exceed 1e-6.
    """
    widest = torch.float32 if logits_NV.device.type == "mps" else torch.float64  # MPS has no float64
    z_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    weights_NV = z_NV.exp()
    total_N = weights_NV.sum(-1, dtype=widest)
    log_total_N = total_N.log()
    logps_N = z_NV.gather(-1, targets_N[:, None]).squeeze(-1).to(widest) - log_total_N
    certainty_N = log_total_N - z_NV.mean(-1, dtype=widest) - math.log(z_NV.shape[-1])
    # A masked entry has logit -inf and no share in the entropy: 0 · log 0 = 0.
    energy_N = (weights_NV * z_NV.masked_fill(z_NV.isneginf(), 0.0)).sum(-1, dtype=widest) / total_N
    dtype = logits_NV.dtype
    return logps_N.to(dtype), (log_total_N - energy_N).to(dtype), certainty_N.to(dtype)


class PolicyPass:
    """What the current policy says about a batch of rollouts, each quantity computed on first use and then kept.

    One instance serves all rewards and the monitor of a batch, so that a mix of rewards costs one forward pass for the
    token statistics and one forward and backward for each kind of gradient norm asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        rollouts: Rollouts,
        *,
        temperature: float = 1.0,
        micro_batch: int = 16,
        tokenizer: Any = None,
    ) -> None:
        """`temperature` is that of sampling and of the loss; `micro_batch` is the rows of one forward pass.

        `tokenizer` (a transformers tokenizer) is for rewards that put text of their own before the policy.
        """
        self.model = model
        self.rollouts = rollouts
        self.temperature = temperature
        self.micro_batch = micro_batch
        self.tokenizer = tokenizer
        self._token_stats: TokenStats | None = None
        self._grad_norms: dict[tuple[object, ...], Tensor] = {}

    def token_stats(self) -> TokenStats:
        """Statistics of every counted token at the policy's temperature."""
        if self._token_stats is None:
            r = self.rollouts
            self._token_stats = token_stats(
                self.model,
                r.input_ids_BL,
                r.attention_mask_BL,
                r.completion_mask_BL,
                temperature=self.temperature,
                micro_batch=self.micro_batch,
            )
        return self._token_stats

    def grad_norms(
        self,
        parameters: Parameters = "trainable",
        *,
        temperature: float | None = None,
        accumulation: Accumulation = "float32",
    ) -> Float[Tensor, " B"]:
        """‖∇ mean NLL‖ of every row; `temperature` None is the policy's. See `sequence_grad_norms`."""
        temperature = self.temperature if temperature is None else temperature
        key = (parameters, temperature, accumulation)
        if key not in self._grad_norms:
            r = self.rollouts
            norms = sequence_grad_norms(
                self.model,
                r.input_ids_BL,
                r.attention_mask_BL,
                r.completion_mask_BL,
                parameters=parameters,
                temperature=temperature,
                accumulation=accumulation,
            )
            assert isinstance(norms, Tensor)
            self._grad_norms[key] = norms
        return self._grad_norms[key]
