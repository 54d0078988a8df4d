"""Token statistics: what a policy's next-token distributions say, token by token, from one exponential of the logits.

Alignment: the logits at position t-1 predict token t; a statistic at (b, t) belongs to the distribution from which
token t of row b was sampled. Knows torch only; who runs the forward pass hands over chunks of logits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vigor.rollouts import identical_rows, strip_padding

STATISTICS = ("logps", "entropy", "self_certainty", "collision", "max_prob", "margin", "rank", "logit_grad")
"""What can be asked for; the properties of `TokenStats` say what each is."""
STANDARD = ("logps", "entropy", "self_certainty")
"""What is computed where nothing is asked for by name."""
CHUNK = 1 << 22
"""Most logits of a chunk: 16 MiB in float32 for each of the three buffers that the statistics take."""

_BLOCK = 512


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the counted tokens, each (B, L), float32 (float64 for a float64 model); 0 on all other tokens.

    Asking for a statistic that was not computed raises a ValueError.
    """

    mask_BL: Int[Tensor, "B L"]
    """1 on the counted tokens."""
    values: Mapping[str, Float[Tensor, "B L"]]
    """The statistics by name, those of `STATISTICS` that were asked for."""

    @property
    def logps_BL(self) -> Float[Tensor, "B L"]:
        """log π(token), nats."""
        return self["logps"]

    @property
    def entropy_BL(self) -> Float[Tensor, "B L"]:
        """-Σ π log π, nats."""
        return self["entropy"]

    @property
    def self_certainty_BL(self) -> Float[Tensor, "B L"]:
        """KL(uniform ‖ π) = -(1/V) Σ log(V π), nats (Kang et al. 2025, arXiv 2502.18581; Intuitor, arXiv 2505.19590).

        Intuitor's code has logsumexp(z) - mean(z), which is this plus log V.
        """
        return self["self_certainty"]

    @property
    def collision_BL(self) -> Float[Tensor, "B L"]:
        """Σ π²: the chance that two draws are the same token."""
        return self["collision"]

    @property
    def max_prob_BL(self) -> Float[Tensor, "B L"]:
        """max π: the probability of the likeliest token, sampled or not."""
        return self["max_prob"]

    @property
    def margin_BL(self) -> Float[Tensor, "B L"]:
        """Probability of the likeliest token less that of the second; 0 where two share the first place."""
        return self["margin"]

    @property
    def rank_BL(self) -> Float[Tensor, "B L"]:
        """How many tokens are likelier than the sampled one: 0 for the likeliest."""
        return self["rank"]

    @property
    def logit_grad_BL(self) -> Float[Tensor, "B L"]:
        """‖∇_z log π(token)‖² = 1 - 2 π(token) + Σ π², z the logits divided by the temperature."""
        return self["logit_grad"]

    def __getitem__(self, name: str) -> Float[Tensor, "B L"]:
        if name not in self.values:
            raise ValueError(
                f"token statistics: {name!r} was not computed, only {', '.join(self.values) or 'none'}. "
                f"Ask for it by name; the statistics are {', '.join(STATISTICS)}."
            )
        return self.values[name]

    def mean(self, statistic_BL: Float[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Mean over each row's counted tokens; NaN for a row without any."""
        return self.sum(statistic_BL) / self.mask_BL.sum(1)

    def sum(self, statistic_BL: Float[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Sum over each row's counted tokens; NaN for a row without any."""
        return (statistic_BL * self.mask_BL).sum(1).masked_fill(self.mask_BL.sum(1) == 0, math.nan)

    def min(self, statistic_BL: Float[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Least of each row's counted tokens; NaN for a row without any."""
        if not self.mask_BL.shape[1]:
            return statistic_BL.new_full((len(statistic_BL),), math.nan)
        least = statistic_BL.masked_fill(self.mask_BL == 0, math.inf).amin(1)
        return least.masked_fill(self.mask_BL.sum(1) == 0, math.nan)


class StatsCollector:
    """Fills (B, L) statistics from chunks of logits, whoever computes them.

    Call it with any number of chunks that together hold every counted token of the distinct rows, then `finish`. A
    token that comes twice keeps its last values. What it is given stays unchanged.
    """

    def __init__(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Shaped[Tensor, "B L"],
        completion_mask: Shaped[Tensor, "B L"],
        wanted: Collection[str] = STANDARD,
        *,
        dtype: torch.dtype = torch.float32,
        chunk: int = CHUNK,
    ) -> None:
        """`wanted` of `STATISTICS`; `dtype` of the results; `chunk` bounds the logits looked at together.

        Raises:
            ValueError: an unknown statistic, chunk not positive, tensors of different shapes, or a row whose first
                token is counted.
        """
        if unknown := sorted(set(wanted) - set(STATISTICS)):
            raise ValueError(f"token statistics: unknown {', '.join(unknown)}; choose from {', '.join(STATISTICS)}.")
        if chunk < 1:
            raise ValueError(f"token statistics: chunk ({chunk}) must be positive.")
        self.rows = strip_padding(input_ids, attention_mask, completion_mask)
        self.same = [group for group in identical_rows(self.rows) if self.rows[group[0]].completion_L.any()]
        """Rows with the same tokens, those with counted tokens; the first of each is computed."""
        self.input_ids_BL, self.chunk = input_ids, chunk
        self.mask_BL = (completion_mask.bool() & attention_mask.bool()).long()
        self.values = {name: torch.zeros(input_ids.shape, dtype=dtype, device=input_ids.device)
                       for name in STATISTICS if name in wanted}  # fmt: skip
        self.filled_BL = torch.zeros_like(self.mask_BL, dtype=torch.bool)

    def __call__(
        self,
        row_N: Int[Tensor, " N"],
        position_N: Int[Tensor, " N"],
        logits_NV: Float[Tensor, "N V"],
        targets_N: Int[Tensor, " N"],
    ) -> None:
        """Takes the float32 or wider logits, already divided by the temperature, from which N tokens were sampled.

        `row_N`, `position_N`: where those *tokens* stand in the (B, L) batch: the logits come from position - 1.

        Raises:
            ValueError: a target is not the token at its place: logits and tokens are not aligned.
        """
        if not torch.equal(self.input_ids_BL[row_N, position_N], targets_N):
            raise ValueError(
                "token statistics: some targets are not the tokens at (row, position) of input_ids. `position` is that "
                "of the token which the logits predict, one after the position that they come from."
            )
        size = max(1, self.chunk // logits_NV.shape[1])
        for part in range(0, len(targets_N), size):
            at = slice(part, part + size)
            found = statistics(logits_NV[at].detach(), targets_N[at], self.values)
            for name, values_N in found.items():
                self.values[name][row_N[at], position_N[at]] = values_N.to(self.values[name].dtype)
        self.filled_BL[row_N, position_N] = True

    def finish(self) -> TokenStats:
        """The statistics, identical rows sharing every bit of theirs.

        Raises:
            ValueError: some counted token never came.
        """
        for first, *others in self.same:
            places = self.rows[first].positions_L[self.rows[first].completion_L]
            for b in others:
                own = self.rows[b].positions_L[self.rows[b].completion_L]
                for statistic in self.values.values():
                    statistic[b, own] = statistic[first, places]
                self.filled_BL[b, own] = self.filled_BL[first, places]
        missing_BL = self.mask_BL.bool() & ~self.filled_BL
        if missing_BL.any():
            raise ValueError(
                f"token statistics: no logits came for {int(missing_BL.sum())} of {int(self.mask_BL.sum())} counted "
                f"tokens (first in row {int(missing_BL.any(1).nonzero()[0])})."
            )
        return TokenStats(self.mask_BL, self.values)


def statistics(
    logits_NV: Float[Tensor, "N V"], targets_N: Int[Tensor, " N"], wanted: Collection[str]
) -> dict[str, Float[Tensor, " N"]]:
    """The wanted statistics of N distributions, float64 (float32 on MPS), from one exponential.

    The likeliest token is kept out of the sums: with w_v = exp(z_v - max z) its own weight is 1, and in float32 the
    rest of a confident distribution would vanish beside it.
    """
    highest_N, first_N = _highest(logits_NV)
    z_NV = logits_NV - highest_N[:, None]
    weights_NV = z_NV.exp()
    target_N = _widest(weights_NV.gather(-1, targets_N[:, None]).squeeze(-1))
    weights_NV.scatter_(-1, first_N[:, None], 0.0)
    rest_N = _sum(weights_NV)
    log_total_N, total_N = rest_N.log1p(), 1 + rest_N
    found: dict[str, Tensor] = {}
    if "logps" in wanted:
        found["logps"] = _widest(z_NV.gather(-1, targets_N[:, None]).squeeze(-1)) - log_total_N
    if "self_certainty" in wanted:
        found["self_certainty"] = log_total_N - _sum(z_NV) / z_NV.shape[-1] - math.log(z_NV.shape[-1])
    if "max_prob" in wanted:
        found["max_prob"] = 1 / total_N
    if "margin" in wanted:
        found["margin"] = (1 - _widest(weights_NV.amax(-1))) / total_N
    if "rank" in wanted:
        chosen_N1 = logits_NV.gather(-1, targets_N[:, None])
        # A NaN compares as false: an undefined distribution would make its token the likeliest.
        found["rank"] = _widest((logits_NV > chosen_N1).sum(-1)).masked_fill(total_N.isnan(), math.nan)
    if "entropy" in wanted:
        # A masked entry has logit -inf and no share in the entropy: 0 · log 0 = 0, and not NaN. A NaN among the logits
        # is in log_total.
        found["entropy"] = log_total_N - _sum(z_NV.mul_(weights_NV), nan_is_zero=True) / total_N
    if "collision" in wanted or "logit_grad" in wanted:
        squares_N = _sum(weights_NV.square_())
        if "collision" in wanted:
            found["collision"] = (1 + squares_N) / total_N.square()
        if "logit_grad" in wanted:
            others_N = (squares_N + (1 - target_N.square())).clamp(min=0)
            found["logit_grad"] = ((total_N - target_N).square() + others_N) / total_N.square()
    return found


def _highest(x_NV: Float[Tensor, "N V"]) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """The largest value of each row and where it stands, by way of blocks: several times faster than max on a CPU."""
    whole = x_NV.shape[-1] // _BLOCK * _BLOCK
    if not whole:
        highest_N, first_N = x_NV.max(-1)
        return highest_N, first_N
    blocks_NKB = x_NV[:, :whole].unflatten(-1, (-1, _BLOCK))
    block_N = blocks_NKB.amax(-1).argmax(-1)
    within_N = blocks_NKB[torch.arange(len(x_NV), device=x_NV.device), block_N].argmax(-1)
    first_N = block_N * _BLOCK + within_N
    highest_N = x_NV.gather(-1, first_N[:, None]).squeeze(-1)
    if whole < x_NV.shape[-1]:
        last_N, after_N = x_NV[:, whole:].max(-1)
        later_N = (last_N > highest_N) | last_N.isnan()
        highest_N = torch.where(later_N, last_N, highest_N)
        first_N = torch.where(later_N, after_N + whole, first_N)
    return highest_N, first_N


def _sum(x_NV: Float[Tensor, "N V"], *, nan_is_zero: bool = False) -> Float[Tensor, " N"]:
    """Row sums in float64, from float32 sums of short blocks.

    A flat float32 sum of 152,000 terms makes a self-certainty off by 4e-6 of itself, and a float64 copy of the row
    doubles the memory.
    """
    total = torch.nansum if nan_is_zero else torch.sum
    whole = x_NV.shape[-1] // _BLOCK * _BLOCK
    last_N = total(_widest(x_NV[:, whole:]), -1)
    if not whole:
        return last_N
    return last_N + _widest(total(x_NV[:, :whole].unflatten(-1, (-1, _BLOCK)), -1)).sum(-1)


def _widest(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()  # MPS has no float64
