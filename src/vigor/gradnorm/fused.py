"""The fused update: the norms' own pass gives the policy gradient too.

A policy gradient is Σ_b Σ_t c_bt ∇log π(y_bt), the weights c known once the rewards are. Two ways to it from the pass
that took the norms, cheaper first:

    keep      c_bt is the same on every token of a row, as on the first update after sampling with beta = 0: then it is
              Σ_b w_b ∇NLL_b, and what the backward pass had in hand is kept to form that (kept.py). One forward and
              one backward in all, and one product for each matrix
    retain    any weights: the graph is kept and a second backward pass runs over it. One forward, two backwards

Without fusion the update is a forward and a backward of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vigor.gradnorm.api import Scored, score
from vigor.gradnorm.batched import OnLogits
from vigor.gradnorm.engine import Settings
from vigor.gradnorm.mode import scoring_mode

Fused = Literal["keep", "retain"]
SAME = 1e-4
"""Weights of a row's tokens count as equal if they differ by at most this share."""


class FusedNorms:
    """Gradient norms of a batch, and log-probabilities whose backward pass costs no second forward.

        fused = fused_grad_norms(model, input_ids, attention_mask, completion_mask)
        advantages_B = ...                                   # from fused.norms_B
        loss = -(advantages_B[:, None] * fused.token_logps()).sum() / completion_mask.sum()
        loss.backward()                                      # lands in .grad

    The parameters must not have changed in between. The gradient arrives when every row with counted tokens has had
    its backward pass, in one call or in several: the work is shared between the rows of a micro-batch.
    """

    def __init__(self, model: nn.Module, scored: Scored, mode: Fused) -> None:
        self.model, self.mode = model, mode
        self.norms_B, self.logps_BL = scored.norms_B, scored.logps_BL
        """(B,) and (B, L), float32 or wider; see `sequence_grad_norms`."""
        self.parameters = scored.engine.parameters
        self.zeros = False
        """Give a parameter on which no row depends a gradient of zeros instead of none: DDP waits for one."""
        self._rows = scored.rows
        self._passes = scored.engine.passes
        self._weights = [torch.zeros_like(scored.logps_BL[0, : int(r.completion_L.sum())]) for r in scored.engine.rows]
        self._owner = {b: i for i, group in enumerate(scored.same) for b in group}
        self._waiting = set(self._owner)
        self._gradients: dict[int, Tensor] = {}
        kind = self.norms_B.device.type
        self._autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def token_logps(self, rows: Sequence[int] | None = None) -> Float[Tensor, "R L"]:
        """Log-probabilities of the counted tokens of some rows (all, if None), 0 elsewhere; differentiable once.

        Raises:
            RuntimeError: in the backward pass, if a row has had one already, or if `mode` is "keep" and the tokens of a
                row do not all have the same weight.
        """
        chosen = list(range(len(self._rows))) if rows is None else list(rows)
        delivered: Tensor = torch.zeros((), device=self.logps_BL.device)
        for i, parameter in enumerate(self.parameters.values()):
            delivered = _Deliver.apply(delivered, parameter, self, i == 0)
        logps_RL: Tensor = _TokenLogps.apply(delivered, self, chosen)
        return logps_RL

    def release(self) -> None:
        """Lets go of what was kept; a backward pass is not possible any more."""
        self._passes.clear()

    # What the backward pass calls -------------------------------------------------------------------------------------

    def take_weights(self, rows: list[int], weights_RL: Tensor) -> None:
        """Adds the weights of these rows; with the last ones, the gradient is formed."""
        if not self._passes and self._owner:
            raise RuntimeError("fused update: its backward pass has run already, or release() was called.")
        for b, weights_L in zip(rows, weights_RL, strict=True):
            if b not in self._owner:
                continue
            if b not in self._waiting:
                raise RuntimeError(f"fused update: row {b} has had its backward pass already.")
            self._waiting.remove(b)
            row = self._rows[b]
            self._weights[self._owner[b]] += weights_L[row.positions_L[row.completion_L]]
        if not self._waiting and self.mode == "retain":
            self._second_backwards()

    @property
    def complete(self) -> bool:
        """Whether every row has its weights."""
        return not self._waiting

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """One parameter's gradient, of its dtype; None as long as rows are waiting, or if no row depends on it."""
        if self._waiting:
            return None
        if self.mode == "retain":
            total = self._gradients.pop(id(parameter), None)
        else:
            total = None
            for scored, batch in self._passes:
                weights_B = torch.stack([self._row_weight(i) for i in batch])
                part = scored.weighted(parameter, weights_B)
                total = part if total is None else total if part is None else total + part
        if total is None:
            return torch.zeros_like(parameter) if self.zeros else None
        return total.to(parameter.dtype)

    def _row_weight(self, i: int) -> Tensor:
        """w of w ∇NLL, where every token of the row has the weight -w / T."""
        weights_T = self._weights[i]
        return -weights_T.mean() * len(weights_T)

    def check_equal_weights(self) -> None:
        """Raises RuntimeError unless the tokens of each row have one weight."""
        for b, i in self._owner.items():
            weights_T = self._weights[i]
            # What is not finite is let through: it makes the gradient so, and whoever watches that says why.
            if weights_T.amax() - weights_T.amin() > SAME * weights_T.abs().amax():
                raise RuntimeError(
                    f"fused update: the tokens of row {b} have different weights, from {weights_T.min().item():.6g} to "
                    f"{weights_T.max().item():.6g}, but 'keep' needs one weight a row (importance ratio 1, no KL term, "
                    "no token-level mask or correction). Use 'retain'."
                )

    def _second_backwards(self) -> None:
        with scoring_mode(self.model), torch.enable_grad(), self._autocast:
            for scored, batch in self._passes:
                found = scored.second_backward([self._weights[i] for i in batch])
                for key, gradient in found.items():
                    self._gradients[key] = self._gradients[key] + gradient if key in self._gradients else gradient
        self._passes.clear()


class _TokenLogps(torch.autograd.Function):
    """The log-probabilities of some rows; backward hands over their weights."""

    @staticmethod
    def forward(ctx: Any, delivered: Tensor, fused: FusedNorms, rows: list[int]) -> Tensor:
        ctx.fused, ctx.rows = fused, rows
        return fused.logps_BL[rows]

    @staticmethod
    def backward(ctx: Any, weights_RL: Tensor) -> Any:
        ctx.fused.take_weights(ctx.rows, weights_RL)
        if ctx.fused.complete and ctx.fused.mode == "keep":
            ctx.fused.check_equal_weights()
        return weights_RL.new_zeros(()), None, None


class _Deliver(torch.autograd.Function):
    """Passes a scalar on; backward gives one parameter its gradient, so that its hooks (DDP's among them) run."""

    @staticmethod
    def forward(ctx: Any, delivered: Tensor, parameter: nn.Parameter, fused: FusedNorms, last: bool) -> Tensor:
        ctx.fused, ctx.parameter, ctx.last = fused, parameter, last
        return delivered.view_as(delivered)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        gradient = ctx.fused.gradient(ctx.parameter)
        if ctx.last and ctx.fused.complete:
            ctx.fused.release()
        return g, gradient, None, None


def fused_grad_norms(
    model: nn.Module,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"],
    completion_mask: Shaped[Tensor, "B L"],
    *,
    mode: Fused = "keep",
    temperature: float = 1.0,
    micro_batch: int | None = None,
    self_check: bool = True,
    on_logits: OnLogits | None = None,
) -> FusedNorms:
    """`sequence_grad_norms` over all trainable parameters, with the update to follow from the same pass.

    Args:
        model, input_ids, attention_mask, completion_mask, temperature, micro_batch, on_logits: as there.
        mode: "keep" if every token of a row will have the same weight in the loss, else "retain".
        self_check: as there; it compares the rows' gradients with the loop's as well.

    Raises:
        ValueError, UnsupportedModule, SelfCheckFailed: as there, with method="batched".
    """
    if mode not in ("keep", "retain"):
        raise ValueError(f"fused_grad_norms: unknown mode {mode!r}; choose 'keep' or 'retain'.")
    scored = score(
        model,
        input_ids,
        attention_mask,
        completion_mask,
        parameters="trainable",
        method="batched",
        micro_batch=micro_batch,
        self_check=self_check,
        settings=replace(Settings(temperature=temperature, on_logits=on_logits), keep=mode),
    )
    return FusedNorms(model, scored, mode)
