"""Which parameters a gradient norm is taken over."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

Parameters = str | Callable[[str], bool]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")


def select_parameters(model: nn.Module, parameters: Parameters = "trainable") -> dict[str, nn.Parameter]:
    """The trainable parameters that a norm covers, by name; a tied parameter appears once.

    Args:
        parameters: "trainable" (all with `requires_grad`), "lora" (those whose name contains "lora", as the official
            VIGOR code selects), "head" (the output embedding, which is also the input embedding where they are tied),
            "last_K" such as "last_2" (everything in the model's last K decoder layers and after them; a tied output
            embedding stands before them), or a predicate on the parameter's name.

    Raises:
        ValueError: the choice is unknown or selects nothing.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "gradient norm: the model has no trainable parameter. Call model.requires_grad_(True), or attach an "
            "adapter."
        )
    if callable(parameters):
        chosen = {name: p for name, p in trainable.items() if parameters(name)}
        what = "the given predicate"
    elif parameters == "trainable":
        return trainable
    elif parameters == "lora":
        chosen = {name: p for name, p in trainable.items() if "lora" in name}
        what = "'lora' (no trainable parameter has 'lora' in its name)"
    elif parameters == "head":
        head = _output_embedding(model)
        chosen = {name: p for name, p in trainable.items() if any(p is q for q in head.parameters())}
        what = "'head' (the output embedding is frozen)"
    elif match := re.fullmatch(r"last_(\d+)", parameters):
        last = _last_layers([name for name, _ in model.named_parameters()], int(match[1]))
        chosen = {name: p for name, p in trainable.items() if name in last}
        what = f"{parameters!r} (all of them are frozen there)"
    else:
        raise ValueError(
            f"gradient norm: unknown parameters={parameters!r}; choose 'trainable', 'lora', 'head', 'last_K' "
            "(such as 'last_2') or a predicate on parameter names."
        )
    if not chosen:
        raise ValueError(f"gradient norm: parameters={what} selects none of {len(trainable)} trainable parameters.")
    return chosen


def _output_embedding(model: nn.Module) -> nn.Module:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    if head is None:
        raise ValueError(
            "gradient norm: parameters='head' needs a model with get_output_embeddings(); pass a predicate on "
            "parameter names instead."
        )
    return head


def _last_layers(names: list[str], count: int) -> set[str]:
    layer = {name: int(match[1]) for name in names if (match := _LAYER.search(name))}
    layers = len(set(layer.values()))
    if not 1 <= count <= layers:
        raise ValueError(
            f"gradient norm: parameters='last_{count}', but the model has {layers} numbered decoder layers; "
            "choose last_1 to last_N of them, or pass a predicate on parameter names."
        )
    first = max(layer.values()) + 1 - count
    after = max(i for i, name in enumerate(names) if name in layer)
    return {name for i, name in enumerate(names) if layer.get(name, -1) >= first or i > after}
