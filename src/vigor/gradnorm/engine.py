"""Which method runs on which rows: the batched passes, the self-check, and falling back to the loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vigor.gradnorm.batched import Keep, OnLogits, Pass
from vigor.gradnorm.capture import UnsupportedModule
from vigor.gradnorm.diagnosis import where_gradients_differ, where_rows_differ
from vigor.gradnorm.head import has_decoder, vocabulary_size
from vigor.gradnorm.lengths import switches
from vigor.gradnorm.loop import Accumulation, loop_gradients, loop_row
from vigor.gradnorm.microbatches import LOGITS, micro_batches, most_tokens, own_cost
from vigor.gradnorm.norms import Exact, Norms
from vigor.gradnorm.partitioned import whole_shape
from vigor.gradnorm.sharded import Sharding, idle_row
from vigor.gradnorm.verdicts import Comparison, Kind, Verdict, verdict_of
from vigor.gradnorm.vocabulary import WHOLE_LOGITS
from vigor.rollouts import Row

Method = Literal["auto", "batched", "loop", "sketch"]
Result = tuple[Tensor, Tensor]
"""A row's norm (scalar) and its log-probabilities (T,)."""


CERTAIN = 1e-4
"""Norms below this have the size of rounding errors; those of text that a model may sample are 0.1 and more."""


class SelfCheckFailed(RuntimeError):
    """The batched method disagreed with the loop on this model."""


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
        self.choice = (frozenset(parameters), first.dtype, autocast, settings.keep)
        # transformers computes norms and rotary embeddings in float32 whatever the dtype
        coarse = any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters())  # a base under adapters
        dtype = torch.bfloat16 if coarse else autocast or first.dtype
        self.tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 5e-2)

    def run(self, method: Method, micro_batch: int | None, self_check: bool) -> list[Result]:
        """Every row's result, in order.

        Raises:
            UnsupportedModule, SelfCheckFailed: unless the method is "auto", which then takes the loop.
        """
        if self.sharding is not None:
            return self.run_together(self.sharding, method, micro_batch, self_check)
        if method == "loop" or self.settings.accumulation != "float32" or not self.rows:
            return self.loop()
        verdict = verdict_of(self.model, self.choice)
        if method == "auto" and verdict.refused:
            return self.loop()
        try:
            results, due = self.batched(micro_batch, verdict if self_check else None)
            for comparison in due:
                if self.compare(results, comparison, again=comparison.company) and comparison.settles is not None:
                    verdict.passed.add(comparison.settles)
        except (UnsupportedModule, SelfCheckFailed) as error:
            self.passes.clear()
            verdict.refused = True
            if method != "auto":
                raise
            warnings.warn(f"{error} Falling back to the loop for this model.", stacklevel=4)
            return self.loop()
        return results

    def run_together(
        self,
        sharding: Sharding,
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
        verdict = verdict_of(self.model, self.choice)
        with sharding.held():
            if method == "loop":
                most = sharding.most(len(self.rows), self.device)
                return [self.loop_together(sharding, b) for b in range(most)][: len(rows)]
            results, due = self.batched(micro_batch, verdict if self_check else None)
            conclusive: set[Kind] = set()
            failed = None
            for i in range(sharding.most(len(due), self.device)):
                comparison = due[i] if i < len(due) else Comparison([0], 0)
                again = bool(sharding.most(comparison.company, self.device))
                try:
                    if self.compare(results, comparison, again=again) and comparison.settles is not None:
                        conclusive.add(comparison.settles)
                except SelfCheckFailed as error:
                    failed = error
            if sharding.most(failed is not None, self.device):
                raise failed or SelfCheckFailed("batched gradient norm: another process found it to be wrong.")
            verdict.passed |= conclusive
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

    def batched(self, micro_batch: int | None, verdict: Verdict | None) -> tuple[list[Result], list[Comparison]]:
        """Many rows at a time; also what is to be compared with the loop."""
        results: dict[int, Result] = {}
        self.passes.clear()
        lengths = [len(row.ids_L) for row in self.rows]
        apart = switches(self.model, max(lengths))
        # The longest and the shortest, which are compared with the loop, stand last: a module that takes something from
        # the rows before them does so there.
        runs = micro_batches(lengths, micro_batch, *self.bounds(), apart)
        batches = [[*run[1:], run[0]] for run in runs]
        due: list[Comparison] = []
        if verdict is not None:
            counted = torch.stack([row.completion_L.sum() for row in self.rows]).tolist()
            most, company = WHOLE_LOGITS // vocabulary_size(self.model), micro_batch is None
            due = verdict.due(batches, lengths, counted, most=most, company=company, apart=apart)
        idle = 0 if self.sharding is None else self.sharding.most(len(batches), self.device) - len(batches)
        for batch in batches:
            scored = self.one_pass(batch, self.settings.norms(), self.settings.keep)
            results.update(zip(batch, zip(scored.norms_B, scored.logps, strict=True), strict=True))
            if self.settings.keep != "nothing":
                self.passes.append((scored, batch))
        for _ in range(idle):  # other processes gather parameters for theirs
            self.one_pass(batches[0], self.settings.norms(), "nothing", silent=True)
        return [results[b] for b in range(len(self.rows))], due

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

    def compare(self, results: list[Result], comparison: Comparison, *, again: bool) -> bool:
        """Compares a row with the loop: its norm and, where kept, its gradient.

        `again`: its norm from one more pass over the comparison's micro-batch rather than from the results. Returns
        whether that says anything: the norm of a row that is all but certain is rounding error, 1 - π.

        Raises:
            SelfCheckFailed: they differ.
        """
        b, batch = comparison.row, comparison.batch
        norm = results[b][0]
        if again or self.settings.norms is not Exact:  # an estimate cannot be compared; that of which it is one can
            norm = self.one_pass(batch, Exact(), "nothing", silent=True).norms_B[batch.index(b)]
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
        error = ((norm - expected).abs() / _positive(expected)).item()
        self.refuse_beyond(error, "norm", norm, expected, b, batch, gradients)
        if expected.isnan():
            return False
        for scored, rows in self.passes:
            if b in rows:
                found = scored.row_gradients(rows.index(b))
                off = [_zeros(f, p) - _zeros(g, p) for f, g, p in zip(
                    found, gradients, self.parameters.values(), strict=True)]  # fmt: skip
                error = (_norm(off) / _positive(_norm(gradients))).item()
                self.refuse_beyond(error, "update", _norm(found), expected, b, batch, gradients)
        return True

    def refuse_beyond(
        self,
        error: float,
        what: str,
        found: Tensor,
        expected: Tensor,
        b: int,
        batch: list[int],
        gradients: list[Tensor | None],
    ) -> None:
        if not error <= self.tolerance and not (expected.isnan() and found.isnan()):
            raise SelfCheckFailed(
                f"batched gradient {what}: {found.item():.6g} instead of {expected.item():.6g} for a row of "
                f"{len(self.rows[b].ids_L)} tokens (relative error {error:.1e}, allowed {self.tolerance:.0e}): "
                f"{self.culprit(b, batch, gradients)}. Use method='loop'."
            )

    def culprit(self, b: int, batch: list[int], gradients: list[Tensor | None]) -> str:
        """What is wrong, with the name of the module or parameter."""
        if self.sharding is not None:  # another forward pass would have to run in every process
            return "some module mixes the sequences of a batch, or lets padding change a row's result"
        rows, at = [self.rows[i] for i in batch], batch.index(b)
        module = where_rows_differ(self.model, rows, at, self.tolerance)
        if module is not None:
            return f"{module} mixes the sequences of a batch, or lets padding change a row's result"
        found = self.one_pass(batch, Exact(), "keep", silent=True).row_gradients(at)
        name = where_gradients_differ(list(self.parameters), found, gradients)
        return f"the gradient of {name} is wrong, so that some module mixes the sequences of a batch after its use"

    def bounds(self) -> tuple[int, int]:
        """Most tokens of a micro-batch, and what each costs by itself, in tokens."""
        matrices = [shape for p in self.model.parameters() if len(shape := whole_shape(p)) == 2]
        kind, sides = self.device.type, sum(map(sum, matrices))
        checkpointing = any(m.training and vars(m).get("gradient_checkpointing") for m in self.model.modules())
        estimates = self.settings.norms is not Exact
        most = most_tokens(
            kind,
            len(self.rows) * max(len(row.ids_L) for row in self.rows),
            sides,
            whole=self.settings.keep != "nothing" or (estimates and not checkpointing),
            checkpointing=checkpointing,
        )
        if not has_decoder(self.model):
            most = min(most, LOGITS // vocabulary_size(self.model))
        return most, own_cost(kind, sides)


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    squares = [g.double().square().sum() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def _zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)
