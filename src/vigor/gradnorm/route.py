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

from vigor.gradnorm.capture import Capture, UnsupportedModule
from vigor.gradnorm.partitioned import plain_linear
from vigor.gradnorm.sharded import Sharding
from vigor.gradnorm.watch import Watch

_EXPERTS = "_experts_implementation_internal"
_ATTENTION = "_attn_implementation_internal"


@contextmanager
def captured(model: nn.Module, capture: Capture, sharding: Sharding | None = None) -> Iterator[None]:
    """Wraps the forwards of the modules with a chosen parameter in them, and unwraps them at the end."""
    had: dict[nn.Module, Any] = {}
    configs = [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
    experts = {id(config): (config, vars(config)[_EXPERTS]) for config in configs if _EXPERTS in vars(config)}
    flex = any(vars(config).get(_ATTENTION) == "flex_attention" for config in configs)
    within: dict[nn.Module, list[Any]] = {}
    wrapped = _Wrapped(capture, moving=sharding is not None)
    capture.constants.of_model(model, capture.names)
    with ExitStack() as stack:
        stack.enter_context(plain_linear())
        if "torch._dynamo" in sys.modules and not flex:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # what is compiled cannot be watched
        try:
            for config, _ in experts.values():
                vars(config)[_EXPERTS] = "eager"
            for name, module in model.named_modules():
                if sharding is None:
                    chosen = _chosen(capture, module, not flex, within)
                else:
                    chosen = sharding.reach(module, not flex)
                if chosen:
                    _refuse_liger(name, module, capture)
                    found = partial(list, chosen) if sharding is None else partial(
                        sharding.gathered, capture, module, chosen)  # fmt: skip
                    had[module] = module.__dict__.get("forward")
                    module.__dict__["forward"] = partial(wrapped.forward, name, found, module.forward)
            yield
        finally:
            for config, implementation in experts.values():
                vars(config)[_EXPERTS] = implementation
            for module, forward in had.items():
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward
            for parameter in capture.thawed:
                parameter.requires_grad_(False)
            capture.thawed.clear()


def _chosen(capture: Capture, module: nn.Module, recurse: bool, within: dict[nn.Module, list[Any]]) -> list[Any]:
    """The chosen parameters in a module and its submodules; `within` remembers, so that all modules take one walk."""
    if module not in within:
        own = [p for p in module._parameters.values() if p is not None and id(p) in capture.names]
        inner = [_chosen(capture, child, recurse, within) for child in module.children()] if recurse else []
        within[module] = list({id(p): p for part in (own, *inner) for p in part}.values())
    return within[module]


def _refuse_liger(name: str, module: nn.Module, capture: Capture) -> None:
    """Liger's modules that own a weight use it in a kernel, which forms its gradient over all sequences at once."""
    makers = (type(module).__module__, module.forward.__module__)
    mine = [p for p in module._parameters.values() if p is not None and id(p) in capture.names]
    if mine and any(maker.split(".")[0] == "liger_kernel" for maker in makers):
        raise UnsupportedModule(
            f"batched gradient norm: {name} ({type(module).__name__}) runs a kernel of Liger's, in which its weight's "
            "gradient cannot be taken apart by sequence. Load the model without Liger (use_liger_kernel=False), or use "
            "method='loop'."
        )


class _Wrapped:
    """One pass's wrapped forwards: the outermost one starts to watch, those inside give their name."""

    def __init__(self, capture: Capture, *, moving: bool) -> None:
        self.capture, self.moving = capture, moving
        self.watch: Watch | None = None
        self.copied: set[int] = set()

    def forward(
        self, name: str, chosen: Callable[[], list[Any]], forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.watch is None:
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dtype == torch.int64]
            self.capture.outermost = name or "the model"
            self.watch = Watch(self.capture, name, chosen(), inputs, self.copied)
            try:
                with self.watch:
                    return forward(*args, **kwargs)
            finally:
                self.watch = None
        if self.capture.paused:
            return forward(*args, **kwargs)
        before, self.watch.module = self.watch.module, name
        if self.moving:
            self.watch.learn(chosen())
        try:
            return self.watch.tokens.module(forward, *args, **kwargs)
        finally:
            self.watch.module = before
