"""The batched method: one forward and one backward for many sequences, and never a parameter gradient.

A `Pass` scores one micro-batch. Where its output head can be run apart from its decoder (head.py), the head works on
counted positions only, part by part, and leaves the gradient of the hidden states; the decoder's backward pass follows.
Elsewhere the model's own logits are differentiated whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vigor.gradnorm import vocabulary
from vigor.gradnorm.capture import Capture
from vigor.gradnorm.head import (
    Counted,
    NoDecoder,
    counted_parts,
    find_decoder,
    hidden_states,
    logits_of,
    vocabulary_size,
)
from vigor.gradnorm.kept import Gradients
from vigor.gradnorm.loop import without_prefix
from vigor.gradnorm.norms import Norms
from vigor.gradnorm.route import captured
from vigor.gradnorm.sharded import Sharding
from vigor.gradnorm.vocabulary import SlicedHead
from vigor.rollouts import Row

Keep = Literal["nothing", "keep", "retain"]
"""What outlives the norms' backward pass: nothing, what a weighted gradient needs, or the graph."""
OnLogits = Callable[[Int[Tensor, " N"], Int[Tensor, " N"], Float[Tensor, "N V"], Int[Tensor, " N"]], None]
"""(row in the call's batch, position, logits / temperature in float32 or wider, token) of N counted tokens."""


class Pass:
    """One micro-batch of rows that have counted tokens: its norms, and afterwards its weighted gradient.

    `norms_B` and `logps` (each row's log-probabilities, (T,)) are float32 or wider.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: list[Row],
        parameters: dict[str, nn.Parameter],
        *,
        temperature: float,
        norms: Norms,
        keep: Keep = "nothing",
        on_logits: OnLogits | None = None,
        indices: list[int] | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self.model, self.rows, self.temperature, self.keep = model, rows, temperature, keep
        self.on_logits, self.indices, self.sharded = on_logits, indices, sharding is not None
        self.ids_BL = nn.utils.rnn.pad_sequence([row.ids_L for row in rows], batch_first=True)
        self.attended_BL = nn.utils.rnn.pad_sequence([torch.ones_like(row.ids_L) for row in rows], batch_first=True)
        self.counted_BL = nn.utils.rnn.pad_sequence([row.completion_L for row in rows], batch_first=True)
        self.lengths = self.counted_BL.sum(1).tolist()
        self.capture = Capture(
            parameters,
            batch=len(rows),
            length=self.ids_BL.shape[1],
            device=self.ids_BL.device,
            norms=norms,
            keep=keep == "keep",
        )
        self.logps: list[Tensor] = []
        with captured(model, self.capture, sharding):
            try:
                self._forward()
            except NoDecoder:
                self.capture.matrices.clear()
                self._forward_whole()
        self.norms_B = self.capture.finish().sqrt().to(self.logps[0].dtype)

    # The norms --------------------------------------------------------------------------------------------------------

    def _forward(self) -> None:
        self.decoder = find_decoder(self.model)
        inputs = {"input_ids": self.ids_BL, "attention_mask": self.attended_BL}
        self.output = hidden_states(self.model, self.decoder, inputs, self._paused)
        self.hidden_BLh = without_prefix(self.output.last_hidden_state, self.ids_BL.shape[1])
        self.vocabulary = vocabulary_size(self.model)
        self.parts = counted_parts(self.ids_BL, self.counted_BL, self.lengths, self.vocabulary)
        gradient_BLh = torch.zeros_like(self.hidden_BLh)
        for part in self.parts:
            # Mean over the row's counted tokens of -log π: each token's log-probability has the weight -1/T.
            weights_BT = -part.real_BT.double() / part.real_BT.sum(1, keepdim=True)
            logps_BT = self._head(part, weights_BT, gradient_BLh)
            lengths = self.lengths[part.rows]
            self.logps += [logps_T[:n] for logps_T, n in zip(logps_BT, lengths, strict=True)]
        self._body(gradient_BLh, retain_graph=self.keep == "retain")
        if self.keep != "retain":
            del self.hidden_BLh, self.output

    def _head(self, part: Counted, weights_BT: Tensor, gradient_BLh: Tensor) -> Tensor:
        """Backward through the head of Σ weights · log π; returns the log-probabilities, without a graph."""
        with self.capture.head(part.rows, part.at_BT.shape[1]):
            picked_BTh = part.pick(self.hidden_BLh)
            sliced = self._sliced(picked_BTh)
            if sliced is not None:
                logps_1T, gradient_1Th = sliced.differentiate(
                    self.capture,
                    picked_BTh,
                    part.targets_BT,
                    weights_BT,
                    temperature=self.temperature,
                    report=partial(self._report, part),
                )
                part.scatter(gradient_1Th, gradient_BLh)
                return logps_1T
            logits_BTV = logits_of(self.model, self.decoder, self.output, picked_BTh, self._paused)
            logps_BT, dlogits_BTV = self._differentiate(logits_BTV.detach(), part, weights_BT)
            (found,) = self.capture.backward([logits_BTV], [dlogits_BTV], [picked_BTh])
        if found is not None:
            part.scatter(found, gradient_BLh)
        return logps_BT

    def _sliced(self, picked_BTh: Tensor) -> SlicedHead | None:
        """The head in slices, where it is one row's and its logits are too many, and it can be had so."""
        B, T = picked_BTh.shape[:2]
        kept = self.capture.kept is not None  # the update needs the logits' gradient whole
        if B > 1 or T * self.vocabulary <= vocabulary.WHOLE_LOGITS or kept or self.sharded:
            return None
        chosen = self.capture.parameters.values()
        return SlicedHead.of(self.model, self.decoder, self.output, picked_BTh, chosen, self._paused)

    def _differentiate(self, logits_BTV: Tensor, part: Counted, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """log π (B, T), and the gradient of Σ weights · log π in the logits."""
        z_BTV = self._scaled(logits_BTV)
        self._report(part, z_BTV, slice(None))
        log_probs_BTV = z_BTV.log_softmax(-1)
        logps_BT = log_probs_BTV.gather(-1, part.targets_BT[..., None]).squeeze(-1)
        weights_BT1 = (weights_BT / self.temperature).to(z_BTV.dtype)[..., None]
        gradient_BTV = log_probs_BTV.exp_().mul_(-weights_BT1)
        gradient_BTV.scatter_add_(-1, part.targets_BT[..., None], weights_BT1)
        return logps_BT, gradient_BTV.to(logits_BTV.dtype)

    def _scaled(self, logits_BTV: Tensor) -> Tensor:
        """Logits / temperature, float32 or wider."""
        z_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return z_BTV if self.temperature == 1 else z_BTV / self.temperature

    def _report(self, part: Counted, z_BTV: Tensor, tokens: slice) -> None:
        """Hands the logits of some of the part's tokens to `on_logits`, once."""
        if self.on_logits is None or self.capture.gradients is not None:
            return
        assert self.indices is not None
        real_BT, at_BT, targets_BT = (x[:, tokens] for x in (part.real_BT, part.at_BT, part.targets_BT))
        row_B = torch.tensor(self.indices[part.rows], device=z_BTV.device)
        row_N = row_B[:, None].expand_as(real_BT)[real_BT]
        even = len(set(self.lengths[part.rows])) == 1  # then there is no padding, and no need to copy all logits
        z_NV = z_BTV.flatten(0, 1) if even else z_BTV[real_BT]
        self.on_logits(row_N, at_BT[real_BT] + 1, z_NV, targets_BT[real_BT])

    def _body(self, gradient_BLh: Tensor, *, retain_graph: bool) -> None:
        if self.hidden_BLh.requires_grad:
            self.capture.backward([self.hidden_BLh], [gradient_BLh], retain_graph=retain_graph)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        before, self.capture.paused = self.capture.paused, True
        try:
            yield
        finally:
            self.capture.paused = before

    def _forward_whole(self) -> None:
        self.parts = [Counted.of(slice(0, len(self.rows)), self.ids_BL, self.counted_BL, max(self.lengths))]
        (part,) = self.parts
        inputs: dict[str, Any] = {"input_ids": self.ids_BL, "attention_mask": self.attended_BL}
        logits_BLV = without_prefix(self.model(**inputs, use_cache=False).logits, self.ids_BL.shape[1])
        index = part.at_BT[..., None].expand(-1, -1, logits_BLV.shape[-1])
        self.logits_BTV = logits_BLV.gather(1, index)
        del logits_BLV
        weights_BT = -part.real_BT.double() / part.real_BT.sum(1, keepdim=True)
        logps_BT, dlogits_BTV = self._differentiate(self.logits_BTV.detach(), part, weights_BT)
        self.logps = [logps_T[:n] for logps_T, n in zip(logps_BT, self.lengths, strict=True)]
        self.capture.backward([self.logits_BTV], [dlogits_BTV], retain_graph=self.keep == "retain")
        if self.keep != "retain":
            del self.logits_BTV

    # The update -------------------------------------------------------------------------------------------------------

    def weighted(self, parameter: nn.Parameter, weights_B: Float[Tensor, " B"]) -> Tensor | None:
        """Σ_b w_b ∇ NLL_b for one parameter, from what was kept; None if no row depends on it."""
        assert self.capture.kept is not None
        key = id(parameter)
        total: Tensor | None = None
        for part in self.capture.kept.gradient(key, parameter, weights_B, self.capture.vectors.get(key)):
            total = part if total is None else total + part
        return total

    def row_gradients(self, b: int) -> list[Tensor | None]:
        """∇ NLL_b for each parameter, from what was kept or over the retained graph, which stays."""
        chosen = list(self.capture.parameters.values())
        if self.capture.kept is not None:
            weights_B = torch.zeros(len(self.rows), dtype=torch.float64, device=self.ids_BL.device)
            weights_B[b] = 1
            return [self.weighted(parameter, weights_B) for parameter in chosen]
        weights = [torch.zeros_like(logps_T) for logps_T in self.logps]
        weights[b] -= 1 / self.lengths[b]
        gradients = self.second_backward(weights, retain_graph=True)
        return [gradients.get(id(parameter)) for parameter in chosen]

    def second_backward(self, weights: list[Tensor], *, retain_graph: bool = False) -> dict[int, Tensor]:
        """The gradients, by the parameter's id, of Σ weights · log π with (T,) weights a row: over the retained graph.

        To be called in the mode and under the autocast of the first; a head that was run apart is run again.
        """
        self.capture.gradients = Gradients()
        weights_BT = nn.utils.rnn.pad_sequence(weights, batch_first=True)
        with captured(self.model, self.capture):
            if hasattr(self, "hidden_BLh"):
                gradient_BLh = torch.zeros_like(self.hidden_BLh)
                for part in self.parts:
                    self._head(part, weights_BT[part.rows, : part.at_BT.shape[1]], gradient_BLh)
                self._body(gradient_BLh, retain_graph=retain_graph)
            else:
                (part,) = self.parts
                _, dlogits_BTV = self._differentiate(self.logits_BTV.detach(), part, weights_BT)
                self.capture.backward([self.logits_BTV], [dlogits_BTV], retain_graph=retain_graph)
        found = self.capture.gradients.of
        self.capture.gradients = None
        return found
