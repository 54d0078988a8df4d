"""Which parameters a gradient norm is taken over: trainable ones, or a base's that stay frozen under adapters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

Parameters = str | Callable[[str], bool]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")


def select_parameters(model: nn.Module, parameters: Parameters = "trainable") -> dict[str, nn.Parameter]:
    """The parameters that a norm covers, by name; a tied parameter appears once.

    Args:
        parameters: "trainable" (all with `requires_grad`), "lora" (those whose name contains "lora", as the official
            code selects), "base" (all but adapters', frozen or not: under LoRA the norm that full fine-tuning would
            have), "all-linear" (the weights of the base's linear layers but the output embedding, frozen or not: the
            layers that PEFT means by that name), "head" (the output embedding, which is also the input embedding where
            they are tied), "last_K" such as "last_2" (everything in the model's last K decoder layers and after them; a
            tied output embedding stands before them), or a predicate on a trainable parameter's name.

    Raises:
        ValueError: the choice is unknown or selects nothing, or "base" and "all-linear" would cover a quantised weight.
    """
    if parameters in ("base", "all-linear"):
        return _of_base(model, linear=parameters == "all-linear")
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
            f"gradient norm: unknown parameters={parameters!r}; choose 'trainable', 'lora', 'base', "
            "'all-linear', 'head', 'last_K' (such as 'last_2') or a predicate on parameter names."
        )
    if not chosen:
        raise ValueError(f"gradient norm: parameters={what} selects none of {len(trainable)} trainable parameters.")
    return chosen


@contextmanager
def differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Lets frozen parameters require gradients for a while; none is formed, but autograd must see them."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _of_base(model: nn.Module, *, linear: bool) -> dict[str, nn.Parameter]:
    adapters = _adapter_marks(model)
    head = _output_embedding(model) if linear else None
    chosen: dict[str, nn.Parameter] = {}
    seen: set[int] = {id(p) for p in head.parameters()} if head is not None else set()
    for prefix, module in model.named_modules():
        if linear and not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":  # Conv1D: GPT-2's own
            continue
        for attribute, p in module.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            if id(p) in seen or any(mark in name for mark in adapters) or (linear and attribute != "weight"):
                continue
            if not p.is_floating_point():
                what = "all-linear" if linear else "base"
                kind = type(module).__name__
                raise ValueError(
                    f"gradient norm: parameters={what!r}, but {name} ({kind}) is quantised to {p.dtype} and has no "
                    "gradient. Take 'trainable', the adapters' norm, or a base that is not quantised."
                )
            seen.add(id(p))
            chosen[name] = p
    if not chosen:
        raise ValueError("gradient norm: parameters='all-linear', but the model has no linear layers beside its head.")
    return chosen


def _adapter_marks(model: nn.Module) -> tuple[str, ...]:
    """What the names of a PEFT model's own parameters hold."""
    if not hasattr(model, "peft_config"):
        return ()
    tuner = getattr(model, "base_model", None)
    prefix = getattr(type(tuner), "prefix", None)  # such as "lora_"; prompt tuning has none
    return (*((prefix,) if isinstance(prefix, str) else ()), ".modules_to_save.", "prompt_encoder.")


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
