"""Verdicts: on which models, and on which kinds of micro-batches, the batched method was found to agree with the loop.

A model may pad, pack, chunk or drop tokens in one batch and not in another, so that one comparison does not speak for
all: each kind of micro-batch is compared once, and a few later ones again. A model that was changed is another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import log2
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

Kind = tuple[bool, int, int]
"""A micro-batch of several rows: padded or not, and the magnitudes, in powers of √2, of its length and tokens."""
AGAIN = 4
"""A further comparison on calls 4, 16, 64 and so on."""


@dataclass(frozen=True)
class Comparison:
    """A row to be compared with the loop, and a micro-batch that it stands in (both by index in the call)."""

    batch: list[int]
    row: int
    settles: Kind | None = None
    company: bool = False
    """The micro-batch is none of the call's but made for the comparison: a row alone cannot show that rows mix."""


@dataclass
class Verdict:
    """What is known of one model, choice of parameters and dtype.

    It decides what is compared, never how a row is scored: a resumed run, which knows less, must round as the first
    did.
    """

    refused: bool = False
    passed: set[Kind] = field(default_factory=set)
    calls: int = 0

    def due(
        self,
        batches: list[list[int]],
        lengths: Sequence[int],
        counted: Sequence[int],
        *,
        most: int,
        company: bool = True,
        apart: Sequence[int] = (),
    ) -> list[Comparison]:
        """What a call is to compare: of each new kind of micro-batch the longest and the shortest row.

        The shortest has the most padding. Rows of more than `most` counted tokens are left out, unless nothing was
        compared ever, for the loop holds all logits of a row.

        Args:
            batches: rows by index.
            lengths, counted: tokens and counted tokens of each row.
            company: whether a later call may put rows together that stand alone in this one.
            apart: lengths that two rows of a micro-batch may not lie on either side of.
        """
        due: list[Comparison] = []
        seen = set(self.passed)
        self.calls += 1
        for batch in batches:
            found = kind([lengths[b] for b in batch])
            small = sorted((b for b in batch if counted[b] <= most), key=lambda b: lengths[b])
            if found is None or found in seen or not small:
                continue
            seen.add(found)
            due += [Comparison(batch, b) for b in small[-1:] if lengths[b] > lengths[small[0]]]
            due.append(Comparison(batch, small[0], found))
        if not due and not self.passed:
            due.append(_first(batches, lengths, company, apart))
        elif not due and _is_power(self.calls):
            batch = batches[self.calls % len(batches)]
            b = batch[self.calls // AGAIN % len(batch)]
            due += [Comparison(batch, b)] if counted[b] <= most else []
        return due


def _first(batches: list[list[int]], lengths: Sequence[int], company: bool, apart: Sequence[int]) -> Comparison:
    """The shortest row of the largest micro-batch, or of two, where each row has one of its own."""
    batch = max(batches, key=len)
    shortest = sorted((b for other in batches for b in other), key=lambda b: lengths[b])[:2]
    low, high = lengths[shortest[0]], lengths[shortest[-1]]
    company = company and len(batch) == 1 and len(shortest) == 2 and not any(low <= n < high for n in apart)
    if company:
        batch = shortest[::-1]
    row = min(batch, key=lambda b: lengths[b])
    return Comparison(batch, row, kind([lengths[b] for b in batch]), company)


def kind(lengths: Sequence[int]) -> Kind | None:
    """The kind of a micro-batch of rows of these lengths; None for a row alone, which cannot show that rows mix."""
    if len(lengths) < 2:
        return None
    longest = max(lengths)
    return min(lengths) < longest, int(2 * log2(longest)), int(2 * log2(longest * len(lengths)))


def verdict_of(model: nn.Module, choice: tuple[Any, ...]) -> Verdict:
    """The verdict on a model as it is now, with a choice of parameters and dtypes."""
    return _verdicts.setdefault(model, {}).setdefault((*choice, _structure(model)), Verdict())


_verdicts: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Verdict]] = WeakKeyDictionary()


def _is_power(calls: int) -> bool:
    while calls > 1 and calls % AGAIN == 0:
        calls //= AGAIN
    return calls == 1


def _structure(model: nn.Module) -> int:
    """A hash of what decides which operations a model runs: its modules, their switches, hooks and patches."""
    return hash((
        tuple(part for module in model.modules() for part in _of_module(module)),
        tuple(name for name, p in model.named_parameters() if p.requires_grad),
    ))  # fmt: skip


def _of_module(module: nn.Module) -> Iterator[object]:
    own = vars(module)
    yield id(module)
    yield type(module)
    yield len(module._forward_hooks), len(module._forward_pre_hooks)
    yield id(own["forward"]) if "forward" in own else None
    if "config" in own:
        yield vars(own["config"]).get("_attn_implementation_internal") if hasattr(own["config"], "__dict__") else None
    for name, value in own.items():
        if isinstance(value, bool | str):
            yield name, value
        elif isinstance(value, list | tuple) and all(isinstance(x, str) for x in value):
            yield name, tuple(value)
