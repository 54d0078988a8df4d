"""Route: send a model's operations on chosen parameters through a capture.

For the time of a pass every module with chosen parameters in it, its own or its submodules', gets its `forward`
wrapped. Inside the outermost one (in the backward pass: inside each that gradient checkpointing runs again) all
operations are watched (watch.py): compiled functions run uncompiled, and models of transformers loop over their
experts, for grouped products merge the sequences. Only flex attention must be compiled: with it, the modules that own a
chosen parameter are watched one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vigor.gradnorm.capture import Capture
from vigor.gradnorm.watch import Watch

_EXPERTS = "_experts_implementation_internal"
_ATTENTION = "_attn_implementation_internal"


@contextmanager
def captured(model: nn.Module, capture: Capture) -> Iterator[None]:
    """Wraps the forwards of the modules with a chosen parameter in them, and unwraps them at the end."""
    had: dict[nn.Module, Any] = {}
    configs = [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
    experts = {id(config): (config, vars(config)[_EXPERTS]) for config in configs if _EXPERTS in vars(config)}
    flex = any(vars(config).get(_ATTENTION) == "flex_attention" for config in configs)
    wrapped = _Wrapped(capture)
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules and not flex:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # what is compiled cannot be watched
        try:
            for config, _ in experts.values():
                vars(config)[_EXPERTS] = "eager"
            for name, module in model.named_modules():
                chosen = [p for p in module.parameters(recurse=not flex) if id(p) in capture.names]
                if chosen:
                    had[module] = module.__dict__.get("forward")
                    module.__dict__["forward"] = partial(wrapped.forward, name, chosen, module.forward)
            yield
        finally:
            for config, implementation in experts.values():
                vars(config)[_EXPERTS] = implementation
            for module, forward in had.items():
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward


class _Wrapped:
    """One pass's wrapped forwards: the outermost one starts to watch, those inside give their name."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.watch: Watch | None = None
        self.copied: set[int] = set()

    def forward(
        self, name: str, chosen: list[nn.Parameter], forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.capture.paused:
            return forward(*args, **kwargs)
        if self.watch is None:
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dtype == torch.int64]
            self.watch = Watch(self.capture, name, chosen, inputs, self.copied)
            try:
                with self.watch:
                    return forward(*args, **kwargs)
            finally:
                self.watch = None
        before, self.watch.module = self.watch.module, name
        with self.watch.tokens.module() as done:
            try:
                return done(forward(*args, **kwargs))
            finally:
                self.watch.module = before
