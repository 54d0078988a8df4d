"""The public entry point of the gradient-norm engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vigor.gradnorm.batched import OnLogits
from vigor.gradnorm.engine import Engine, Method, Settings
from vigor.gradnorm.loop import Accumulation
from vigor.gradnorm.mode import scoring_mode
from vigor.gradnorm.norms import Exact, Sketch
from vigor.gradnorm.packed import unpack
from vigor.gradnorm.parameters import Parameters, differentiable, select_parameters
from vigor.gradnorm.sharded import inner_model, sharding_of
from vigor.rollouts import Row, identical_rows, strip_padding


def sequence_grad_norms(
    model: nn.Module,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, ...] | None,
    completion_mask: Shaped[Tensor, "B L"],
    *,
    position_ids: Int[Tensor, "B L"] | None = None,
    sequence_ids: Int[Tensor, "B L"] | None = None,
    parameters: Parameters = "trainable",
    method: Method = "auto",
    temperature: float = 1.0,
    micro_batch: int | None = None,
    accumulation: Accumulation = "float32",
    projections: int = 32,
    seed: int = 0,
    self_check: bool = True,
    return_token_logps: bool = False,
    on_logits: OnLogits | None = None,
) -> Float[Tensor, " N"] | tuple[Float[Tensor, " N"], Float[Tensor, "B L"]]:
    """‖∇_θ NLL_b‖₂ for every row b: the quantity under VIGOR's reward (arXiv 2605.09920).

    NLL_b is the mean over the counted tokens of row b of -log softmax(logits / temperature), the logit at t-1
    predicting token t. Rows that are token for token the same are computed once and share their value. Padding, its
    side and amount, the order of the rows, their micro-batches and gradient checkpointing do not change a norm beyond
    float rounding. Dropout is off meanwhile; `.grad` and the modules' train/eval flags are left as they were.

    Args:
        model: causal language model, called as `model(input_ids, attention_mask, use_cache=False).logits`.
        input_ids: int64 token ids, padded anywhere.
        attention_mask: 1 on real tokens, None if all are; the masks may have any dtype.
        completion_mask: 1 on the counted tokens; a row's first real token cannot be counted.
        position_ids, sequence_ids: one of them if rows are packed, several sequences in each; see `unpack`, by which
            they are taken apart. Below, a row is then a sequence.
        parameters: see `select_parameters`.
        method: "loop" differentiates row by row: one forward and backward each, the definition itself. "batched" takes
            one forward and one backward for a micro-batch and forms no parameter gradient: exact for linear layers,
            embeddings (tied too), norms, biases and adapters made of them; anything else is refused by name. "auto"
            is "batched" where that is possible and "loop", with one warning, where it is not. "sketch" is the batched
            pass with matrices' norms estimated from `projections` random projections: without bias, with a relative
            standard error of a few per cent (docs/gradnorm.md), and at the same cost for any length.
        temperature: divides the logits; the temperature of sampling, so that reward and policy are one distribution.
        micro_batch: rows of one batched pass; None takes rows of like length, as many as fit 16,384 tokens (and 2^28
            logits, in a model that does not name its decoder). The loop takes one row at a time whatever this says.
        accumulation: "float32" squares in float32 and sums in float64; "gradient_dtype" squares, sums and takes the
            root in the gradient's own dtype, as the official code does (bfloat16 rounds 1-6 % away; loop only).
        projections, seed: of the sketch; the same seed gives a completion the same estimate in every batch.
        self_check: compare the longest and the shortest row of a micro-batch with the loop, once for each kind of
            micro-batch (padded or not, its length and tokens in powers of √2) that a model, as it is, meets with these
            parameters and dtype; one row on the calls 4, 16, 64 and so on; and each call, until rows had company.
        return_token_logps: also return the (B, L) log-probabilities of the counted tokens (0 elsewhere).
        on_logits: called with (row_N, position_N, logits_NV, token_N) for N counted tokens at a time until all are
            done: the token stands at (row, position) of `input_ids`, the logits, without a graph, are in float32 or
            wider and divided by the temperature. Rows that are token for token the same are reported once, under the
            first of them; after a fallback to the loop, tokens come again.

    Returns:
        (B,) float32 (float64 for a float64 model), in nats per parameter unit; NaN for a row without counted tokens.
        From packed rows (N,), a norm a sequence, in the order of rows and of places in them; token log-probabilities
        and `on_logits` keep to the packed layout.

    Raises:
        ValueError: unknown method or accumulation, temperature or micro_batch not positive, `parameters` selects
            nothing, an encoder-decoder, tensors of different shapes, a row whose first token is counted, or packed rows
            that cannot be taken apart.
        UnsupportedModule: method="batched" or "sketch" met a use of a parameter that it cannot compute exactly.
        SelfCheckFailed: method="batched" or "sketch" disagreed with the loop.
    """
    _check(method, accumulation, temperature, micro_batch, projections)
    packed = None
    if position_ids is not None or sequence_ids is not None:
        packed = unpack(
            input_ids, attention_mask, completion_mask, position_ids=position_ids, sequence_ids=sequence_ids
        )
        input_ids, attention_mask = packed.input_ids_NT, packed.attention_mask_NT
        completion_mask = packed.completion_mask_NT
        on_logits = None if on_logits is None else packed.reported(on_logits)
    settings = Settings(
        temperature=temperature,
        accumulation=accumulation,
        norms=partial(Sketch, projections, seed) if method == "sketch" else Exact,
        on_logits=on_logits,
    )
    scored = score(
        model,
        input_ids,
        torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        completion_mask,
        parameters=parameters,
        method=method,
        micro_batch=micro_batch,
        self_check=self_check,
        settings=settings,
    )
    if not return_token_logps:
        return scored.norms_B
    return scored.norms_B, scored.logps_BL if packed is None else packed.pack(scored.logps_BL)


@dataclass(frozen=True)
class Scored:
    """A batch's norms and log-probabilities, and the engine that computed them."""

    norms_B: Float[Tensor, " B"]
    logps_BL: Float[Tensor, "B L"]
    rows: list[Row]
    same: list[list[int]]
    """Rows that are token for token the same, of those with counted tokens: one entry for each of the engine's rows."""
    engine: Engine


def score(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    parameters: Parameters,
    method: Method,
    micro_batch: int | None,
    self_check: bool,
    settings: Settings,
) -> Scored:
    """What `sequence_grad_norms` and `fused_grad_norms` share; see there."""
    model = inner_model(model)
    _check_model(model)
    chosen = select_parameters(model, parameters)
    sharding = sharding_of(model)
    _check_sharded(sharding is not None, settings)
    rows = strip_padding(input_ids, attention_mask, completion_mask)
    dtype = torch.promote_types(next(iter(chosen.values())).dtype, torch.float32)
    norms = torch.full((len(rows),), torch.nan, dtype=dtype, device=input_ids.device)
    logps = torch.zeros(input_ids.shape, dtype=dtype, device=input_ids.device)
    same = [group for group in identical_rows(rows) if rows[group[0]].completion_L.any()]
    # Before torch 2.10, weights that autocast cast under no_grad are reused without their graph (pytorch#112583): a
    # forward pass such as that of `token_stats`, in the same autocast region, would leave gradients out.
    torch.clear_autocast_cache()
    with scoring_mode(model), torch.enable_grad(), differentiable(chosen.values()):
        first = [group[0] for group in same]
        engine = Engine(
            model,
            chosen,
            [rows[b] for b in first],
            _reported(settings, rows, first),
            device=input_ids.device,
            sharding=sharding,
        )
        results = engine.run(method, micro_batch, self_check)
    for group, (norm, logps_T) in zip(same, results, strict=True):
        for b in group:
            norms[b] = norm
            logps[b, rows[b].positions_L[rows[b].completion_L]] = logps_T.to(dtype)
    return Scored(norms, logps, rows, same, engine)


def _check(method: str, accumulation: str, temperature: float, micro_batch: int | None, projections: int) -> None:
    if method not in get_args(Method):
        raise ValueError(f"sequence_grad_norms: unknown method {method!r}; choose from {', '.join(get_args(Method))}.")
    if accumulation not in get_args(Accumulation):
        raise ValueError(
            f"sequence_grad_norms: unknown accumulation {accumulation!r}; choose 'float32' or 'gradient_dtype'."
        )
    if accumulation == "gradient_dtype" and method in ("batched", "sketch"):
        raise ValueError(
            "sequence_grad_norms: accumulation='gradient_dtype' rounds whole parameter gradients, which "
            f"method={method!r} never forms. Use method='loop'."
        )
    if not temperature > 0:
        raise ValueError(f"sequence_grad_norms: temperature must be positive, got {temperature}.")
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"sequence_grad_norms: micro_batch must be at least 1, got {micro_batch}.")
    if projections < 1:
        raise ValueError(f"sequence_grad_norms: projections must be at least 1, got {projections}.")


def _check_model(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"sequence_grad_norms: {type(model).__name__} is an encoder-decoder: its encoder would see the completion "
            "that is to be scored. Give a causal language model (is_encoder_decoder=False)."
        )


def _check_sharded(sharded: bool, settings: Settings) -> None:
    if sharded and settings.keep != "nothing":
        raise ValueError(
            "fused_grad_norms: the parameters are sharded (FSDP2, ZeRO-3), and the update's gradients would have to be "
            "scattered by hand. Take the norms with sequence_grad_norms, the update from a backward pass of its own."
        )
    if sharded and settings.accumulation != "float32":
        raise ValueError(
            f"sequence_grad_norms: accumulation={settings.accumulation!r} rounds whole gradients as the official code "
            "does, in one process; the parameters are sharded (FSDP2, ZeRO-3). Use 'float32'."
        )


def _reported(settings: Settings, rows: list[Row], first: list[int]) -> Settings:
    """Translates the engine's rows and stripped positions into the caller's for `on_logits`."""
    given = settings.on_logits
    if given is None or not first:
        return settings
    row_B = torch.tensor(first, device=rows[first[0]].ids_L.device)
    positions_BL = nn.utils.rnn.pad_sequence([rows[b].positions_L for b in first], batch_first=True)

    def on_logits(row_N: Tensor, position_N: Tensor, logits_NV: Tensor, token_N: Tensor) -> None:
        given(row_B[row_N], positions_BL[row_N, position_N], logits_NV, token_N)

    return replace(settings, on_logits=on_logits)
