"""The mode in which a policy is scored: dropout off, gradient checkpointing kept, everything restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Switches dropout off while the policy is scored, so that a score is a property of the completion.

    The official code scores in `train()` mode, so LoRA dropout makes its norms noisy. Modules that implement gradient
    checkpointing (transformers' decoder layers: those with a true attribute `gradient_checkpointing`) checkpoint only
    in train mode; they alone keep it, their submodules do not.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, training in modes:
            checkpoints = "gradient_checkpointing" in module.__dict__ and module.__dict__["gradient_checkpointing"]
            module.training = bool(training and checkpoints)
        yield
    finally:
        for module, training in modes:
            module.training = training
