"""The public entry point of the gradient-norm engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vigor.gradnorm.batched import batched_rows
from vigor.gradnorm.capture import UnsupportedModule
from vigor.gradnorm.loop import Accumulation, loop_row
from vigor.gradnorm.mode import scoring_mode
from vigor.gradnorm.parameters import Parameters, select_parameters
from vigor.rollouts import Row, identical_rows, strip_padding

Method = Literal["auto", "batched", "loop"]

TOKENS = 16_384
LOGITS = 1 << 28
"""Most tokens, and most logits (tokens x vocabulary), of a micro-batch chosen by the library."""
ENOUGH, PADDING = 256, 0.15
"""Once a micro-batch holds this many tokens, the next longer row joins only if at most this share is padding."""


class SelfCheckFailed(RuntimeError):
    """The batched method disagreed with the loop on this model."""


def sequence_grad_norms(
    model: nn.Module,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"],
    completion_mask: Shaped[Tensor, "B L"],
    *,
    parameters: Parameters = "trainable",
    method: Method = "auto",
    temperature: float = 1.0,
    micro_batch: int | None = None,
    accumulation: Accumulation = "float32",
    self_check: bool = True,
    return_token_logps: bool = False,
) -> Float[Tensor, " B"] | tuple[Float[Tensor, " B"], Float[Tensor, "B L"]]:
    """‖∇_θ NLL_b‖₂ for every row b: the quantity under VIGOR's reward (arXiv 2605.09920).

    NLL_b is the mean over the counted tokens of row b of -log softmax(logits / temperature), the logit at t-1
    predicting token t. Rows that are token for token the same are computed once and share their value. Padding, its
    side and amount, the order of the rows, their micro-batches and gradient checkpointing do not change a norm beyond
    float rounding. Dropout is off meanwhile; `.grad` and the modules' train/eval flags are left as they were.

    Args:
        model: causal language model, called as `model(input_ids, attention_mask, use_cache=False).logits`.
        input_ids: int64 token ids, padded anywhere.
        attention_mask: 1 on real tokens; the masks may have any dtype.
        completion_mask: 1 on the counted tokens; a row's first real token cannot be counted.
        parameters: see `select_parameters`.
        method: "loop" differentiates row by row: one forward and backward each, the definition itself. "batched" takes
            one forward and one backward for a micro-batch and forms no parameter gradient: exact for linear layers,
            embeddings (tied too), norms, biases and adapters made of them; anything else is refused by name. "auto"
            is "batched" where that is possible and "loop", with one warning, where it is not.
        temperature: divides the logits; the temperature of sampling, so that reward and policy are one distribution.
        micro_batch: rows of one batched pass; None takes rows of like length, as many as fit 16,384 tokens and 2^28
            logits. The loop takes one row at a time whatever this says.
        accumulation: "float32" squares in float32 and sums in float64; "gradient_dtype" squares, sums and takes the
            root in the gradient's own dtype, as the official code does (bfloat16 rounds 1-6 % away; loop only).
        self_check: on the first batched pass over a model with these parameters and dtype, compare one row with the
            loop; again on the next, until the row shared its micro-batch with others.
        return_token_logps: also return the (B, L) log-probabilities of the counted tokens (0 elsewhere).

    Returns:
        (B,) float32 (float64 for a float64 model), in nats per parameter unit; NaN for a row without counted tokens.

    Raises:
        ValueError: unknown method or accumulation, temperature or micro_batch not positive, `parameters` selects
            nothing, tensors of different shapes, or a row whose first token is counted.
        UnsupportedModule: method="batched" met a use of a parameter that it cannot compute exactly.
        SelfCheckFailed: method="batched" disagreed with the loop.
    """
    _check(method, accumulation, temperature, micro_batch)
    chosen = select_parameters(model, parameters)
    rows = strip_padding(input_ids, attention_mask, completion_mask)
    dtype = torch.promote_types(next(iter(chosen.values())).dtype, torch.float32)
    norms = torch.full((len(rows),), torch.nan, dtype=dtype, device=input_ids.device)
    logps = torch.zeros(input_ids.shape, dtype=dtype, device=input_ids.device)
    same = [group for group in identical_rows(rows) if rows[group[0]].completion_L.any()]
    distinct = [rows[group[0]] for group in same]
    # Before torch 2.10, weights that autocast cast under no_grad are reused without their graph (pytorch#112583): a
    # forward pass such as that of `token_stats`, in the same autocast region, would leave gradients out.
    torch.clear_autocast_cache()
    with scoring_mode(model), torch.enable_grad():
        engine = _Engine(model, chosen, temperature, accumulation)
        results = engine.run(distinct, method, micro_batch, self_check)
    for group, (norm, logps_T) in zip(same, results, strict=True):
        for b in group:
            norms[b] = norm
            logps[b, rows[b].positions_L[rows[b].completion_L]] = logps_T.to(dtype)
    return (norms, logps) if return_token_logps else norms


def _check(method: str, accumulation: str, temperature: float, micro_batch: int | None) -> None:
    if method not in get_args(Method):
        raise ValueError(f"sequence_grad_norms: unknown method {method!r}; choose 'auto', 'batched' or 'loop'.")
    if accumulation not in get_args(Accumulation):
        raise ValueError(
            f"sequence_grad_norms: unknown accumulation {accumulation!r}; choose 'float32' or 'gradient_dtype'."
        )
    if accumulation == "gradient_dtype" and method == "batched":
        raise ValueError(
            "sequence_grad_norms: accumulation='gradient_dtype' rounds whole parameter gradients, which "
            "method='batched' never forms. Use method='loop'."
        )
    if not temperature > 0:
        raise ValueError(f"sequence_grad_norms: temperature must be positive, got {temperature}.")
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"sequence_grad_norms: micro_batch must be at least 1, got {micro_batch}.")


Result = tuple[Tensor, Tensor]
"""A row's norm (scalar) and its log-probabilities (T,)."""

_verdicts: WeakKeyDictionary[nn.Module, dict[object, bool]] = WeakKeyDictionary()
"""For each model and choice of parameters: True if the batched method may be used, False if it may not."""


class _Engine:
    """One call's model, parameters and settings."""

    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], temperature: float, accumulation: Accumulation
    ) -> None:
        self.model, self.parameters = model, parameters
        self.temperature, self.accumulation = temperature, accumulation
        kind = next(iter(parameters.values())).device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.key = (frozenset(parameters), next(iter(parameters.values())).dtype, autocast)
        exact = {torch.float64: 1e-9, torch.float32: 1e-4}
        self.together: list[int] = []
        """Rows of the last batched pass that shared a micro-batch: a row alone cannot show that sequences mix."""
        self.tolerance = exact.get(autocast or next(iter(parameters.values())).dtype, 5e-2)

    def run(self, rows: list[Row], method: Method, micro_batch: int | None, self_check: bool) -> list[Result]:
        verdicts = _verdicts.setdefault(self.model, {})
        if method == "loop" or self.accumulation != "float32" or not rows:
            return self.loop(rows)
        if method == "auto" and verdicts.get(self.key) is False:
            return self.loop(rows)
        try:
            results = self.batched(rows, micro_batch)
            if self_check and verdicts.get(self.key) is not True:
                self.compare(rows, results)
        except (UnsupportedModule, SelfCheckFailed) as error:
            verdicts[self.key] = False
            if method == "batched":
                raise
            warnings.warn(f"{error} Falling back to the loop for this model.", stacklevel=4)
            return self.loop(rows)
        if self_check and self.together:
            verdicts[self.key] = True
        return results

    def loop(self, rows: list[Row]) -> list[Result]:
        chosen = list(self.parameters.values())
        return [
            loop_row(self.model, row, chosen, temperature=self.temperature, accumulation=self.accumulation)
            for row in rows
        ]

    def batched(self, rows: list[Row], micro_batch: int | None) -> list[Result]:
        order = sorted(range(len(rows)), key=lambda b: len(rows[b].ids_L))
        results: dict[int, Result] = {}
        self.together = []
        for batch in _micro_batches(order, lambda b: len(rows[b].ids_L), micro_batch, self.vocabulary):
            self.together += batch if len(batch) > 1 else []
            norms, logps = batched_rows(
                self.model, [rows[b] for b in batch], self.parameters, temperature=self.temperature
            )
            results.update(zip(batch, zip(norms, logps, strict=True), strict=True))
        return [results[b] for b in range(len(rows))]

    @property
    def vocabulary(self) -> int:
        """Rows of the largest matrix: the vocabulary, in any language model; only used to bound memory."""
        return max((p.shape[0] for p in self.model.parameters() if p.ndim == 2), default=1)

    def compare(self, rows: list[Row], results: list[Result]) -> None:
        """Raises SelfCheckFailed unless the loop gives the same norm for the shortest row, of those with company."""
        b = min(self.together or range(len(rows)), key=lambda i: len(rows[i].ids_L))
        expected = self.loop([rows[b]])[0][0]
        error = ((results[b][0] - expected).abs() / expected.clamp(min=torch.finfo(expected.dtype).tiny)).item()
        if not error <= self.tolerance and not (expected.isnan() and results[b][0].isnan()):
            raise SelfCheckFailed(
                f"batched gradient norm: {results[b][0].item():.6g} instead of {expected.item():.6g} for a row of "
                f"{len(rows[b].ids_L)} tokens (relative error {error:.1e}, allowed {self.tolerance:.0e}): some module "
                "mixes the sequences of a batch, or uses a weight outside its own forward. Use method='loop'."
            )


def _micro_batches(
    order: list[int], length: Callable[[int], int], micro_batch: int | None, vocabulary: int
) -> list[list[int]]:
    """Consecutive runs of `order` (ascending length) that keep to the micro-batch, or to the bounds above."""
    batches: list[list[int]] = []
    real = 0
    for b in order:
        rows = len(batches[-1]) + 1 if batches else 1
        tokens = rows * length(b)  # b is the longest so far, and all are padded to it
        if micro_batch is not None:
            fits = rows <= micro_batch
        else:
            wasteful = real >= ENOUGH and tokens - real - length(b) > PADDING * tokens
            fits = tokens <= min(TOKENS, LOGITS // vocabulary) and not wasteful
        if batches and fits:
            batches[-1].append(b)
            real += length(b)
        else:
            batches.append([b])
            real = length(b)
    return batches
