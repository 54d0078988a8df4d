"""Lengths: where a model computes a row otherwise because of the length of the longest row of its batch.

Rotary embeddings of two kinds do (transformers' `rope_type`): "longrope" takes other frequencies for the whole batch
once one row is longer than the model's original context; "dynamic" scales them with the longest row seen so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from vigor.gradnorm.capture import UnsupportedModule


def switches(model: nn.Module, longest: int) -> list[int]:
    """The lengths that two rows of one micro-batch may not lie on either side of; (0, n] and (n, ∞) are the sides.

    Raises:
        UnsupportedModule: a row of `longest` tokens has no result of its own.
    """
    found: set[int] = set()
    for name, module in model.named_modules():
        own = vars(module)
        kinds = own.get("rope_type")
        kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
        if "longrope" in kinds or "original_max_position_embeddings" in own:
            found.update(_numbers("original_max_position_embeddings", own))
            config = own.get("config")
            found.update(_numbers("original_max_position_embeddings", vars(config) if config is not None else {}))
        if any("dynamic" in str(kind) for kind in kinds) or "DynamicNTK" in type(module).__name__:
            limit = own.get("original_max_seq_len") or own.get("max_position_embeddings")
            grown = isinstance(limit, int) and own.get("max_seq_len_cached", 0) > limit
            if not isinstance(limit, int) or longest > limit or (grown and longest == limit):
                raise UnsupportedModule(
                    f"batched gradient norm: {name} ({type(module).__name__}) scales its rotary frequencies with the "
                    f"longest row that it has seen (rope_type 'dynamic'), so that a row of {longest} tokens, more than "
                    f"{limit}, has no result of its own. Give shorter rows, or load the model with another rope_type."
                )
    return sorted(found)


def _numbers(name: str, values: Any) -> Iterator[int]:
    """The numbers of this name in a dictionary and those inside it."""
    for key, value in values.items():
        if key == name and isinstance(value, int):
            yield value
        elif isinstance(value, dict):
            yield from _numbers(name, value)
