"""Which method runs on which rows: micro-batches, the self-check, and falling back to the loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vigor.gradnorm.batched import Keep, OnLogits, Pass
from vigor.gradnorm.capture import UnsupportedModule
from vigor.gradnorm.head import has_decoder
from vigor.gradnorm.loop import Accumulation, loop_gradients, loop_row
from vigor.gradnorm.norms import Exact, Norms
from vigor.gradnorm.sharded import Sharding, idle_row
from vigor.rollouts import Row

Method = Literal["auto", "batched", "loop", "sketch"]
Result = tuple[Tensor, Tensor]
"""A row's norm (scalar) and its log-probabilities (T,)."""

ACTIVATIONS, LOGITS, TOKENS = 1 << 25, 1 << 28, 16_384
"""Most inputs and outputs of linear maps (numbers), most logits where the head cannot be run apart, and most tokens of
a micro-batch chosen by the library. It is to need less memory than a training step of the same rows."""
FULL_SPEED = {"cpu": 1024}
"""Tokens at which matrix products run at full speed; more activations are allowed to reach that, where it is no more
than half of the call's tokens and activations are not checkpointed, and to reach half of it anyway. Elsewhere 4096."""
ENOUGH, PADDING = 256, 0.15
"""Once a micro-batch holds this many tokens, the next longer row joins only if at most this share is padding."""


CERTAIN = 1e-4
"""Norms below this have the size of rounding errors; those of text that a model may sample are 0.1 and more."""


class SelfCheckFailed(RuntimeError):
    """The batched method disagreed with the loop on this model."""


_verdicts: WeakKeyDictionary[nn.Module, dict[object, bool]] = WeakKeyDictionary()
"""For each model and choice of parameters: True if the batched method may be used, False if it may not."""


@dataclass(frozen=True)
class Settings:
    """What a call computes of every row."""

    temperature: float = 1.0
    accumulation: Accumulation = "float32"
    norms: Callable[[], Norms] = Exact
    keep: Keep = "nothing"
    on_logits: OnLogits | None = None


class Engine:
    """One call's model, parameters, rows (distinct, with counted tokens) and settings."""

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        rows: list[Row],
        settings: Settings,
        *,
        device: torch.device,
        sharding: Sharding | None = None,
    ) -> None:
        self.model, self.parameters, self.rows, self.settings = model, parameters, rows, settings
        self.device, self.sharding = device, sharding
        self.passes: list[tuple[Pass, list[int]]] = []
        """What the batched run left, with the rows of each, where something is kept."""
        first = next(iter(parameters.values()))
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if autocast is None and sharding is not None:
            autocast = sharding.dtype
        self.key = (frozenset(parameters), first.dtype, autocast, settings.keep)
        # transformers computes norms and rotary embeddings in float32 whatever the dtype
        coarse = any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters())  # a base under adapters
        dtype = torch.bfloat16 if coarse else autocast or first.dtype
        self.tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 5e-2)

    def run(self, method: Method, micro_batch: int | None, self_check: bool) -> list[Result]:
        """Every row's result, in order.

        Raises:
            UnsupportedModule, SelfCheckFailed: unless the method is "auto", which then takes the loop.
        """
        verdicts = _verdicts.setdefault(self.model, {})
        if self.sharding is not None:
            return self.run_together(self.sharding, verdicts, method, micro_batch, self_check)
        if method == "loop" or self.settings.accumulation != "float32" or not self.rows:
            return self.loop()
        if method == "auto" and verdicts.get(self.key) is False:
            return self.loop()
        try:
            unchecked = self_check and verdicts.get(self.key) is not True
            results, together = self.batched(micro_batch, unchecked=unchecked)
            conclusive = self.compare(results, together) if unchecked else False
        except (UnsupportedModule, SelfCheckFailed) as error:
            self.passes.clear()
            verdicts[self.key] = False
            if method != "auto":
                raise
            warnings.warn(f"{error} Falling back to the loop for this model.", stacklevel=4)
            return self.loop()
        if conclusive and together:
            verdicts[self.key] = True
        return results

    def run_together(
        self,
        sharding: Sharding,
        verdicts: dict[object, bool],
        method: Method,
        micro_batch: int | None,
        self_check: bool,
    ) -> list[Result]:
        """`run` where the processes must gather sharded parameters equally often; "auto" does not fall back there.

        Raises:
            UnsupportedModule, SelfCheckFailed: in every process.
        """
        rows = list(self.rows)
        if not rows:
            self.rows, self.settings = [idle_row(self.device)], replace(self.settings, on_logits=None)
        sharding.choose(self.parameters)
        with sharding.held():
            if method == "loop":
                most = sharding.most(len(self.rows), self.device)
                return [self.loop_together(sharding, b) for b in range(most)][: len(rows)]
            unchecked = self_check and verdicts.get(self.key) is not True
            results, together = self.batched(micro_batch, unchecked=unchecked)
            if unchecked:
                conclusive, failed = False, None
                try:
                    conclusive = self.compare(results, together)
                except SelfCheckFailed as error:
                    failed = error
                if sharding.most(failed is not None, self.device):
                    raise failed or SelfCheckFailed("batched gradient norm: another process found it to be wrong.")
                if sharding.most(conclusive and bool(together), self.device):
                    verdicts[self.key] = True
        return results[: len(rows)]

    def loop_together(self, sharding: Sharding, b: int) -> Result:
        """One row of the loop; past the last, the last once more without a report."""
        row = self.rows[min(b, len(self.rows) - 1)]
        report = self.settings.on_logits if b < len(self.rows) else None
        return sharding.loop_norm(row, temperature=self.settings.temperature, on_logits=report, index=b)

    def loop(self) -> list[Result]:
        """Row by row."""
        settings, chosen = self.settings, list(self.parameters.values())
        return [
            loop_row(
                self.model,
                row,
                chosen,
                temperature=settings.temperature,
                accumulation=settings.accumulation,
                on_logits=settings.on_logits,
                index=b,
            )
            for b, row in enumerate(self.rows)
        ]

    def batched(self, micro_batch: int | None, *, unchecked: bool) -> tuple[list[Result], list[int]]:
        """Many rows at a time; also the rows that shared a micro-batch, for a row alone cannot show that rows mix."""
        results: dict[int, Result] = {}
        together: list[int] = []
        self.passes.clear()
        batches = self.micro_batches(micro_batch, company=unchecked)
        idle = 0 if self.sharding is None else self.sharding.most(len(batches), self.device) - len(batches)
        for batch in batches:
            together += batch if len(batch) > 1 else []
            scored = self.one_pass(batch, self.settings.norms(), self.settings.keep)
            results.update(zip(batch, zip(scored.norms_B, scored.logps, strict=True), strict=True))
            if self.settings.keep != "nothing":
                self.passes.append((scored, batch))
        for _ in range(idle):  # other processes gather parameters for theirs
            self.one_pass(batches[0], self.settings.norms(), "nothing", silent=True)
        return [results[b] for b in range(len(self.rows))], together

    def one_pass(self, batch: list[int], norms: Norms, keep: Keep, *, silent: bool = False) -> Pass:
        """One micro-batch."""
        return Pass(
            self.model,
            [self.rows[b] for b in batch],
            self.parameters,
            temperature=self.settings.temperature,
            norms=norms,
            keep=keep,
            on_logits=None if silent else self.settings.on_logits,
            indices=batch,
            sharding=self.sharding,
        )

    def compare(self, results: list[Result], together: list[int]) -> bool:
        """Compares the shortest row, of those with company, with the loop: its norm and, where kept, its gradient.

        Returns whether that says anything: the norm of a row that is all but certain is rounding error, 1 - π.

        Raises:
            SelfCheckFailed: they differ.
        """
        b = min(together or range(len(self.rows)), key=lambda i: len(self.rows[i].ids_L))
        norm = results[b][0]
        if self.settings.norms is not Exact:  # an estimate cannot be compared; that of which it is one can
            company = next((i for i in together if i != b), b)
            norm = self.one_pass([b, company] if company != b else [b], Exact(), "nothing").norms_B[0]
        gradients: list[Tensor | None] = []
        if self.sharding is not None:
            expected = self.sharding.loop_norm(self.rows[b], temperature=self.settings.temperature)[0].to(norm.dtype)
        else:
            gradients = loop_gradients(
                self.model, self.rows[b], list(self.parameters.values()), temperature=self.settings.temperature
            )
            expected = _norm(gradients).to(norm.dtype)
        if torch.maximum(norm, expected) < CERTAIN:
            return False
        self.refuse_beyond(((norm - expected).abs() / _positive(expected)).item(), "norm", norm, expected, b)
        if expected.isnan():
            return False
        for scored, batch in self.passes:
            if b in batch:
                found = scored.row_gradients(batch.index(b))
                off = [_zeros(f, p) - _zeros(g, p) for f, g, p in zip(
                    found, gradients, self.parameters.values(), strict=True)]  # fmt: skip
                error = (_norm(off) / _positive(_norm(gradients))).item()
                self.refuse_beyond(error, "update", _norm(found), expected, b)
        return True

    def refuse_beyond(self, error: float, what: str, found: Tensor, expected: Tensor, b: int) -> None:
        if not error <= self.tolerance and not (expected.isnan() and found.isnan()):
            raise SelfCheckFailed(
                f"batched gradient {what}: {found.item():.6g} instead of {expected.item():.6g} for a row of "
                f"{len(self.rows[b].ids_L)} tokens (relative error {error:.1e}, allowed {self.tolerance:.0e}): some "
                "module mixes the sequences of a batch, or lets padding change a row's result. Use method='loop'."
            )

    def micro_batches(self, micro_batch: int | None, *, company: bool) -> list[list[int]]:
        """Rows in ascending length, in runs that keep to the micro-batch, or to the bounds above.

        `company`: the two shortest rows share one, if the library chooses.
        """
        lengths = [len(row.ids_L) for row in self.rows]
        batches = micro_batches(lengths, micro_batch, self.most_tokens())
        if company and micro_batch is None and len(batches) > 1 and len(batches[0]) == 1:
            batches[0] += batches[1][:1]
            batches[1] = batches[1][1:]
        return [batch for batch in batches if batch]

    def most_tokens(self) -> int:
        """The bounds above, in tokens."""
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        full_speed = FULL_SPEED.get(self.device.type, 4096)
        if self.settings.keep == "nothing":  # else all micro-batches are held anyway
            half = sum(len(row.ids_L) for row in self.rows) // 2
            if any(module.training and vars(module).get("gradient_checkpointing") for module in self.model.modules()):
                half = 0
            full_speed = max(full_speed // 2, min(full_speed, half))
        most = min(TOKENS, max(full_speed, ACTIVATIONS // max(1, sum(sum(p.shape) for p in matrices))))
        if has_decoder(self.model):
            return most
        return min(most, LOGITS // max((len(p) for p in matrices), default=1))


def micro_batches(lengths: list[int], micro_batch: int | None, most_tokens: int) -> list[list[int]]:
    """Indices in ascending length, in runs of at most `micro_batch` rows, or, if None, of like length."""
    batches: list[list[int]] = []
    real = 0
    for b in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        rows = len(batches[-1]) + 1 if batches else 1
        tokens = rows * lengths[b]  # b is the longest so far, and all are padded to it
        if micro_batch is not None:
            fits = rows <= micro_batch
        else:
            wasteful = real >= ENOUGH and tokens - real - lengths[b] > PADDING * tokens
            fits = tokens <= most_tokens and not wasteful
        if batches and fits:
            batches[-1].append(b)
            real += lengths[b]
        else:
            batches.append([b])
            real = lengths[b]
    return batches


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    squares = [g.double().square().sum() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def _zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)
