"""Signals: what one pass over the policy says about a batch, computed once and shared by rewards and monitor."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vigor.gradnorm import (
    FusedNorms,
    SelfCheckFailed,
    UnsupportedModule,
    fused_grad_norms,
    scoring_mode,
    sequence_grad_norms,
)
from vigor.gradnorm.fused import Fused
from vigor.gradnorm.loop import Accumulation
from vigor.gradnorm.parameters import Parameters
from vigor.gradnorm.sharded import idle_batches, inner_model
from vigor.rollouts import Rollouts, strip_padding
from vigor.tokenstats import CHUNK, STANDARD, STATISTICS, StatsCollector, TokenStats

__all__ = ["PolicyPass", "StatsCollector", "TokenStats", "token_stats"]

Value = TypeVar("Value")


def token_stats(
    model: nn.Module,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"],
    completion_mask: Shaped[Tensor, "B L"],
    *,
    wanted: Collection[str] = STANDARD,
    temperature: float = 1.0,
    micro_batch: int = 16,
    chunk: int = CHUNK,
) -> TokenStats:
    """Statistics of every counted token, from one forward pass without gradients.

    Rows are stripped of padding, sorted by length and right-padded again, `micro_batch` at a time; rows that are token
    for token the same are computed once and share their values. Memory: the model's own logits of one micro-batch (of
    the completions only, where the model takes `logits_to_keep`), and three float32 buffers of `chunk` numbers. Neither
    size changes a result beyond float rounding.

    Args:
        model: causal language model, called as `model(input_ids, attention_mask, use_cache=False)`.
        input_ids: int64 token ids, padded anywhere.
        attention_mask: 1 on real tokens; the masks may have any dtype.
        completion_mask: 1 on the counted tokens.
        wanted: names of `vigor.tokenstats.STATISTICS`; each costs a pass over the logits or less.
        temperature: divides the logits.
        micro_batch: rows of a forward pass.
        chunk: logits (tokens x vocabulary) looked at together, one token at least.

    Raises:
        ValueError: temperature, micro_batch or chunk is not positive, an unknown statistic, the tensors differ in
            shape, or a row's first token is counted.
    """
    if not (temperature > 0 and micro_batch > 0 and chunk > 0):
        raise ValueError(
            f"token_stats: temperature ({temperature}), micro_batch ({micro_batch}) and chunk ({chunk}) must be "
            "positive."
        )
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    collector = StatsCollector(input_ids, attention_mask, completion_mask, wanted, dtype=dtype, chunk=chunk)
    rows = collector.rows
    order = sorted((group[0] for group in collector.same), key=lambda b: len(rows[b].ids_L))
    model = inner_model(model)
    idle = idle_batches(model, -(-len(order) // micro_batch), input_ids.device)
    with torch.no_grad(), scoring_mode(model):
        for start in range(0, len(order), micro_batch):
            batch = order[start : start + micro_batch]
            ids = nn.utils.rnn.pad_sequence([rows[b].ids_L for b in batch], batch_first=True)
            attended = nn.utils.rnn.pad_sequence([torch.ones_like(rows[b].ids_L) for b in batch], batch_first=True)
            counted = nn.utils.rnn.pad_sequence([rows[b].completion_L for b in batch], batch_first=True)
            row_N = torch.cat([torch.full_like(rows[b].positions_L[rows[b].completion_L], b) for b in batch])
            position_N = torch.cat([rows[b].positions_L[rows[b].completion_L] for b in batch])
            first = int(counted.any(0).nonzero()[0])  # at least 1: nothing predicts a row's first token
            logits_MV = _logits(model, ids, attended, first - 1).flatten(0, 1)
            at_N = torch.nn.functional.pad(counted[:, first:], (0, 1)).flatten().nonzero().squeeze(1)
            targets_N = ids[counted]
            for part in torch.arange(len(at_N), device=ids.device).split(max(1, chunk // logits_MV.shape[1])):
                logits_NV = logits_MV[at_N[part]].to(dtype)
                collector(row_N[part], position_N[part], logits_NV.div_(temperature), targets_N[part])
            del logits_MV
        for ids in idle:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return collector.finish()


def _logits(
    model: nn.Module, ids_BL: Int[Tensor, "B L"], attended_BL: Int[Tensor, "B L"], first: int
) -> Float[Tensor, "B M V"]:
    """The logits from position `first` on; those before it are not computed where the model can leave them out."""
    keep = ids_BL.shape[1] - first
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits: Tensor = model(
            input_ids=ids_BL, attention_mask=attended_BL, use_cache=False, logits_to_keep=keep
        ).logits
    else:
        logits = model(input_ids=ids_BL, attention_mask=attended_BL, use_cache=False).logits
    return logits[:, -keep:]


class PolicyPass:
    """What the current policy says about a batch of rollouts, each quantity computed on first use and then kept.

    One instance serves all rewards and the monitor of a batch, so that a mix of rewards costs one forward pass for the
    token statistics and one forward and backward for each kind of gradient norm asked for. Told ahead what will be
    asked for (`needs`), it computes all statistics together.
    """

    def __init__(
        self,
        model: nn.Module,
        rollouts: Rollouts,
        *,
        temperature: float = 1.0,
        micro_batch: int = 16,
        tokenizer: Any = None,
        needs: Collection[str] = (),
        fuse: Fused | None = None,
        fuse_if_possible: bool = False,
    ) -> None:
        """`temperature` is that of sampling and of the loss; `micro_batch` is the rows of one forward pass.

        `tokenizer` (a transformers tokenizer) is for rewards that put text of their own before the policy. `needs` are
        those of all rewards that will read this pass: what it saves is time, no result depends on it. With `fuse`, the
        norms of the trainable parameters leave in `fused` what the update needs (see `fused_grad_norms`); a
        model that cannot be scored so raises, or, with `fuse_if_possible`, is scored without.
        """
        self.model = model
        self.rollouts = rollouts
        self.temperature = temperature
        self.micro_batch = micro_batch
        self.tokenizer = tokenizer
        self.needs = frozenset(needs)
        self.fuse, self.fuse_if_possible = fuse, fuse_if_possible
        self.fused: FusedNorms | None = None
        self._token_stats: TokenStats | None = None
        self._grad_norms: dict[tuple[object, ...], Tensor] = {}
        self._kept: dict[Hashable, Any] = {}

    def prepare(self) -> None:
        """Computes what `needs` declares together, where that saves a forward pass; otherwise nothing.

        The gradient norm's own forward pass has the logits from which all statistics follow.
        """
        wanted = self._declared()
        key = ("trainable", self.temperature, "float32")
        if "full_norm" not in self.needs or not wanted or self._token_stats or key in self._grad_norms:
            return
        r = self.rollouts
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        collector = StatsCollector(r.input_ids_BL, r.attention_mask_BL, r.completion_mask_BL, wanted, dtype=dtype)
        self._grad_norms[key] = self._full_norms(collector)
        self._token_stats = collector.finish()

    def _full_norms(self, collector: StatsCollector) -> Tensor:
        """The norms over all trainable parameters; with `fuse`, what the update needs is left in `fused`."""
        r = self.rollouts
        batch = (self.model, r.input_ids_BL, r.attention_mask_BL, r.completion_mask_BL)
        if self.fuse is not None:
            try:
                self.fused = fused_grad_norms(*batch, mode=self.fuse, temperature=self.temperature, on_logits=collector)
            except (UnsupportedModule, SelfCheckFailed) as error:
                if not self.fuse_if_possible:
                    raise
                warnings.warn(f"{error} The update is not fused with the norms.", stacklevel=2)
            else:
                return self.fused.norms_B
        norms = sequence_grad_norms(*batch, temperature=self.temperature, on_logits=collector)
        assert isinstance(norms, Tensor)
        return norms

    def _declared(self) -> set[str]:
        """The statistics that `needs` names."""
        return set(STATISTICS) & self.needs

    def token_stats(self, *names: str) -> TokenStats:
        """Statistics of every counted token at the policy's temperature: those named, and any that are known already.

        Without names: log-probability, entropy and self-certainty.
        """
        self.prepare()
        wanted = set(names or STANDARD)
        known = {} if self._token_stats is None else self._token_stats.values
        if self._token_stats is None or wanted - set(known):
            r = self.rollouts
            # Told nothing, it computes the usual three together: each costs far less than another forward pass.
            missing = (wanted | (self._declared() if self.needs else set(STANDARD))) - set(known)
            found = self._stats_of(r.input_ids_BL, r.attention_mask_BL, r.completion_mask_BL, missing)
            self._token_stats = TokenStats(found.mask_BL, {**known, **found.values})
        return self._token_stats

    def logps(self) -> Float[Tensor, "B L"]:
        """log π of every counted token at the policy's temperature, 0 on all others."""
        return self.token_stats("logps").logps_BL

    def stats_after(self, *names: str) -> TokenStats:
        """As `token_stats`, but of the distribution *after* each counted token, one position later.

        Such is the alignment of one official Intuitor code: the first token's distribution is left out, and that after
        the last one is in. Only statistics that do not depend on the sampled token mean anything here.
        """

        def compute() -> TokenStats:
            r = self.rollouts
            rows = strip_padding(r.input_ids_BL, r.attention_mask_BL, r.completion_mask_BL)
            # One more token a row, whichever, so that something stands where the last distribution points.
            ids = [torch.cat([row.ids_L, row.ids_L[-1:]]) for row in rows]
            counted = [torch.cat([row.completion_L.new_zeros(1), row.completion_L]) for row in rows]
            return self._stats_of(*_right_padded(ids, counted), names)

        return self.keep(("after", names), compute)

    def logps_in_context(self, contexts: Sequence[Sequence[int]]) -> TokenStats:
        """Log-probabilities of each row's completion after another context in place of its prompt.

        Args:
            contexts: for each of the B rows, token ids, one at least. A row's completion is what stands from its first
                counted token on; the result has its own (B, L).

        Raises:
            ValueError: the number of contexts is not B, or one is empty.
        """
        r = self.rollouts
        rows = strip_padding(r.input_ids_BL, r.attention_mask_BL, r.completion_mask_BL)
        if len(contexts) != len(rows) or not all(contexts):
            raise ValueError(
                f"logps_in_context: {len(contexts)} contexts for {len(rows)} rows, {sum(not c for c in contexts)} of "
                "them empty. Give each row a context of at least one token, such as BOS."
            )
        ids, counted = [], []
        for row, context in zip(rows, contexts, strict=True):
            start = int(row.completion_L.nonzero()[0]) if row.completion_L.any() else len(row.ids_L)
            ids.append(torch.cat([row.ids_L.new_tensor(context), row.ids_L[start:]]))
            counted.append(torch.cat([row.completion_L.new_zeros(len(context)), row.completion_L[start:]]))
        return self._stats_of(*_right_padded(ids, counted), ["logps"])

    def logps_without_prompt(self, frame: str = "") -> TokenStats:
        """Log-probabilities of each completion without the question that it answers.

        A conversation keeps its template and its system prompt, and its other turns are emptied. In place of a plain
        text stands `frame`; where that has no tokens, the tokenizer's BOS, or its EOS where it has no BOS.

        Raises:
            ValueError: the pass has no tokenizer, or `frame` is empty and the tokenizer has neither BOS nor EOS.
        """

        def compute() -> TokenStats:
            if self.tokenizer is None:
                raise ValueError(
                    "logps_without_prompt: what stands in place of the prompt must be tokenised. Give PolicyPass the "
                    "policy's tokenizer."
                )
            prompts = self.rollouts.prompts or [""] * len(self.rollouts)
            return self.logps_in_context([_without_question(self.tokenizer, prompt, frame) for prompt in prompts])

        return self.keep(("without prompt", frame), compute)

    def keep(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """What `compute` returned when this key was first asked for."""
        if key not in self._kept:
            self._kept[key] = compute()
        value: Value = self._kept[key]
        return value

    def _stats_of(self, ids: Tensor, attention: Tensor, completion: Tensor, wanted: Collection[str]) -> TokenStats:
        return token_stats(
            self.model,
            ids,
            attention,
            completion,
            wanted=wanted,
            temperature=self.temperature,
            micro_batch=self.micro_batch,
        )

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
        if key == ("trainable", self.temperature, "float32"):
            self.prepare()
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


def _right_padded(ids: Sequence[Tensor], counted: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L) ids, attention mask and completion mask of rows of any length."""
    pad = nn.utils.rnn.pad_sequence
    if not ids:
        nothing = torch.zeros((0, 0), dtype=torch.int64)
        return nothing, nothing, nothing
    return (
        pad(list(ids), batch_first=True),
        pad([torch.ones_like(row) for row in ids], batch_first=True),
        pad([row.long() for row in counted], batch_first=True),
    )


def _without_question(tokenizer: Any, prompt: Any, frame: str) -> list[int]:
    if not isinstance(prompt, str):
        turns = [turn if turn["role"] == "system" else {**turn, "content": ""} for turn in prompt]
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(encoded["input_ids"])
    if ids := list(tokenizer(frame)["input_ids"]) if frame else []:
        return ids
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError(
            "logps_without_prompt: without a question something must predict the first token, but the tokenizer has "
            "neither BOS nor EOS. Give a `frame`."
        )
    return [start]
