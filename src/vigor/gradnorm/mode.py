"""The mode in which a policy is scored: dropout off, gradient checkpointing kept, everything restored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

_FUNCTION = "_gradient_checkpointing_func"  # where transformers keeps the function that checkpoints a module


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Switches dropout off while the policy is scored, so that a score is a property of the completion.

    The official code scores in `train()` mode, so LoRA dropout makes its norms noisy. Modules that implement gradient
    checkpointing (transformers: those with a true attribute `gradient_checkpointing`) checkpoint only in train mode;
    they alone keep it, their submodules do not. Decoder layers that checkpoint themselves lose it too once inside the
    checkpoint, for some, such as OPT's, apply dropout of their own; their checkpoints are of the non-reentrant kind
    meanwhile, because a reentrant one cannot be differentiated with respect to chosen parameters.
    """
    modes = [(module, module.training) for module in model.modules()]
    keep = {module for module, training in modes if training and vars(module).get("gradient_checkpointing")}
    layers = {module for module in keep if hasattr(type(module), "gradient_checkpointing")}
    functions = [(module, vars(module)[_FUNCTION]) for module in layers]
    try:
        for module, _ in modes:
            # A container need not train if its layers checkpoint themselves; training, it may drop layers at random.
            module.training = module in (layers or keep)
        for module in layers:
            vars(module)[_FUNCTION] = partial(_checkpoint_in_eval_mode, module)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, function in functions:
            vars(module)[_FUNCTION] = function


def _checkpoint_in_eval_mode(layer: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    def evaluate(*args: Any) -> Any:
        layer.training = False
        try:
            return function(*args)
        finally:
            layer.training = True

    return checkpoint(evaluate, *args, use_reentrant=False)
