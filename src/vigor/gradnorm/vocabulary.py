"""The output head in slices of the vocabulary: for one sequence whose logits would be too many to hold at once.

Two passes over the head. The first takes a chunk of tokens at a time, with all their logits, and leaves each token's
log-sum-exp. With that at hand the second takes a slice of the vocabulary at a time, with all tokens: the gradient of a
slice of the logits is (π - onehot)·w/τ, with π = exp(z - logsumexp), and needs no other slice. What the model does with
its output embedding's result (soft cap, logit scale) is run by the model's own code, on the slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vigor.gradnorm.capture import Capture
from vigor.gradnorm.head import logits_of, replaced_forward

WHOLE_LOGITS = 1 << 28
"""Most logits of one sequence that are held at once (1 GiB in float32, and about three such buffers)."""
SLICE_LOGITS = 1 << 25
"""Most logits of a chunk or slice, where a sequence has more (128 MiB in float32)."""
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far a slice's logits may be off those of the whole vocabulary, relative to the largest; 5e-2 in other types."""


@dataclass(frozen=True)
class SlicedHead:
    """A head whose output embedding can be had in slices."""

    model: nn.Module
    decoder: nn.Module
    output: Any
    embedding: nn.Linear
    paused: Callable[[], AbstractContextManager[None]]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        decoder: nn.Module,
        output: Any,
        hidden_1Th: Float[Tensor, "1 T h"],
        parameters: Iterable[Tensor],
        paused: Callable[[], AbstractContextManager[None]],
    ) -> SlicedHead | None:
        """None where it cannot be: no plain linear output embedding, or what follows it is not done number by number,
        as the first token's logits show, or has a chosen parameter of its own."""
        get = getattr(model, "get_output_embeddings", None)
        embedding = get() if callable(get) else None
        if type(embedding) is not nn.Linear or type(embedding.weight) is not nn.Parameter:
            return None
        if embedding._forward_hooks or embedding._forward_pre_hooks:
            return None
        head = cls(model, decoder, output, embedding, paused)
        try:
            return head if head._agrees(hidden_1Th[:, :1].detach(), list(parameters)) else None
        except (RuntimeError, ValueError, IndexError):  # shapes that fit the whole vocabulary only
            return None

    def _agrees(self, hidden_11h: Tensor, parameters: list[Tensor]) -> bool:
        """Whether one token's logits are the same in two slices."""
        size = len(self.embedding.weight)
        with self.paused(), torch.no_grad():
            whole_V = logits_of(self.model, self.decoder, self.output, hidden_11h, self.paused).flatten()
            x_11p = self.input(hidden_11h)
        if len(whole_V) != size:
            return False
        limit = AGREEMENT.get(whole_V.dtype, 5e-2) * whole_V.abs().max()
        for columns in (slice(0, size // 2), slice(size // 2, size)):
            logits_11v, u_11v = self.logits(hidden_11h, x_11p, columns)
            if logits_11v.shape != u_11v.shape:
                return False
            if not ((logits_11v.detach().flatten() - whole_V[columns]).abs() <= limit).all():
                return False
            if logits_11v is not u_11v:
                found, *others = torch.autograd.grad(logits_11v.sum(), [u_11v, *parameters], allow_unused=True)
                if found is None or any(gradient is not None for gradient in others):
                    return False
        return True

    def differentiate(
        self,
        capture: Capture,
        hidden_1Th: Float[Tensor, "1 T h"],
        targets_1T: Int[Tensor, "1 T"],
        weights_1T: Tensor,
        *,
        temperature: float,
        report: Callable[[Tensor, slice], None],
    ) -> tuple[Float[Tensor, "1 T"], Float[Tensor, "1 T h"]]:
        """log π, and the gradient of Σ weights · log π in the hidden states; the embedding's goes to the capture.

        Args:
            temperature: divides the logits.
            report: called with logits / temperature, float32 or wider, of some tokens, and which these are.
        """
        sums, logps = [], []
        for tokens in _steps(hidden_1Th.shape[1], max(1, SLICE_LOGITS // len(self.embedding.weight))):
            with self.paused(), torch.no_grad():
                hidden_1th = hidden_1Th[:, tokens].detach()
                z_1tV = _wide(logits_of(self.model, self.decoder, self.output, hidden_1th, self.paused))
                z_1tV /= temperature
            report(z_1tV, tokens)
            sums.append(z_1tV.logsumexp(-1))
            logps.append(z_1tV.gather(-1, targets_1T[:, tokens, None]).squeeze(-1) - sums[-1])
            del z_1tV
        logsumexp_1T = torch.cat(sums, dim=1)
        x_1Tp = self.input(hidden_1Th)
        kind, dtype = x_1Tp.device.type, x_1Tp.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        a_1Tp = x_1Tp.detach().to(dtype)
        gradient_1Tp = torch.zeros_like(a_1Tp, dtype=torch.promote_types(dtype, torch.float32))

        def parts() -> Iterator[tuple[int, Tensor]]:
            for columns in _steps(len(self.embedding.weight), max(1, SLICE_LOGITS // a_1Tp.shape[1])):
                g_1Tv = self._slice_gradient(
                    hidden_1Th, a_1Tp, columns, logsumexp_1T, targets_1T, weights_1T, temperature
                )
                with torch.autocast(kind, enabled=False):
                    gradient_1Tp.add_(g_1Tv @ self.embedding.weight.detach()[columns].to(dtype))
                    yield columns.start, g_1Tv

        weight, bias = id(self.embedding.weight), id(self.embedding.bias)
        capture.add_slices(
            weight if weight in capture.names else None,
            bias if bias in capture.names else None,
            a_1Tp,
            len(self.embedding.weight),
            parts(),
        )
        (found,) = capture.backward([x_1Tp], [gradient_1Tp.to(x_1Tp.dtype)], [hidden_1Th])
        assert found is not None
        return torch.cat(logps, dim=1), found

    def _slice_gradient(
        self,
        hidden_1Th: Tensor,
        a_1Tp: Tensor,
        columns: slice,
        logsumexp_1T: Tensor,
        targets_1T: Tensor,
        weights_1T: Tensor,
        temperature: float,
    ) -> Float[Tensor, "1 T v"]:
        """The gradient in a slice of the output embedding's result."""
        logits_1Tv, u_1Tv = self.logits(hidden_1Th, a_1Tp, columns)
        weights_1T1 = (weights_1T / temperature).to(logsumexp_1T.dtype)[..., None]
        g_1Tv = (_wide(logits_1Tv.detach()) / temperature).sub_(logsumexp_1T[..., None]).exp_().mul_(-weights_1T1)
        index_1T1 = (targets_1T - columns.start)[..., None]
        inside_1T1 = (index_1T1 >= 0) & (index_1T1 < g_1Tv.shape[-1])
        g_1Tv.scatter_add_(-1, index_1T1.clamp(0, g_1Tv.shape[-1] - 1), weights_1T1 * inside_1T1)
        g_1Tv = g_1Tv.to(logits_1Tv.dtype)
        return g_1Tv if logits_1Tv is u_1Tv else torch.autograd.grad(logits_1Tv, u_1Tv, g_1Tv)[0]

    def input(self, hidden_1Th: Tensor) -> Float[Tensor, "1 T p"]:
        """What the output embedding gets for hidden states."""
        seen: list[Tensor] = []

        def forward(x_1Tp: Tensor, *_: Any, **__: Any) -> Tensor:
            seen.append(x_1Tp)
            return x_1Tp.detach()[..., :1]

        with replaced_forward(self.embedding, forward):
            logits_of(self.model, self.decoder, self.output, hidden_1Th, self.paused)
        (x_1Tp,) = seen
        return x_1Tp

    def logits(self, hidden_1Th: Tensor, x_1Tp: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """The logits of a slice, and the output embedding's result, a leaf."""
        bias = self.embedding.bias
        with torch.no_grad():
            u_1Tv = F.linear(x_1Tp, self.embedding.weight[columns], None if bias is None else bias[columns])
        u_1Tv.requires_grad_()
        with self.paused(), replaced_forward(self.embedding, lambda *_, **__: u_1Tv):
            return logits_of(self.model, self.decoder, self.output, hidden_1Th.detach(), self.paused), u_1Tv


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _steps(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
