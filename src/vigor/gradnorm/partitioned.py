"""Partitioned: whole weights for a pass over a model whose parameters DeepSpeed ZeRO-3 partitions.

ZeRO-3 keeps a parameter as an empty tensor, and puts the whole one, gathered from all processes, into the same object
when it is used. Its own hooks do so module by module, follow a recorded order of modules that a pass of another kind
breaks, and gather the output head for each part of its work anew. They are taken off for the time of a pass, so that
they never see it; meanwhile

    outer parameters    (embeddings, final norm, output head) are gathered once a call, and kept until its end
    units               the members of the model's lists of modules, such as decoder layers, are gathered one at a time:
                        when one runs forward, and when backward reaches it
    what is saved       of a unit's weights for the backward pass is a note of where it stands in the weight: kept
                        itself, it would keep alive the whole weights of all units

Gathering is `deepspeed.zero.GatheredParameters`, so it goes over DeepSpeed's own process groups. No gradient is formed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vigor.gradnorm.capture import UnsupportedModule


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 keeps this parameter, whole at the moment or not."""
    return hasattr(parameter, "ds_id")


def is_whole(parameter: Any) -> bool:
    """Whether a parameter that ZeRO-3 keeps is whole at the moment."""
    return bool(parameter.ds_status.name == "AVAILABLE")


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of the whole parameter."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class _Saved:
    """What stands for a tensor that is (a part of) a unit's parameter, until backward asks for it."""

    unit: nn.Module
    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        whole = self.parameter.detach()
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


class Partition:
    """The units of a model under ZeRO-3, of which one at a time is whole.

    Attributes:
        units: each unit's parameters; those of several units, or of none, are outer ones.
        inner: ids of the units' parameters.
        group: the processes that hold the parameters together.

    Raises:
        UnsupportedModule: this is not what DeepSpeed's engine holds.
    """

    def __init__(self, model: nn.Module) -> None:
        if not hasattr(model, "ds_inflight_param_registry"):
            raise UnsupportedModule(
                "gradient norm: the parameters are partitioned by ZeRO-3, but this is not the model that "
                "deepspeed.initialize was given. Give that one, or its engine."
            )
        self.model: Any = model
        self.units = _units(model)
        self.inner = {id(p) for parameters in self.units.values() for p in parameters}
        self.outer = [p for p in model.parameters() if is_partitioned(p) and id(p) not in self.inner]
        kept: Any = next(p for p in model.parameters() if is_partitioned(p))
        self.group = kept.ds_process_group
        self.current: nn.Module | None = None
        self._gathered = ExitStack()
        self._starts: list[int] = []
        self._at: list[nn.Parameter] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Whole weights, as above, for the forward and backward passes inside; nothing is left of it afterwards."""
        with ExitStack() as stack:
            stack.enter_context(_without_hooks(self.model))
            self._settle()
            for parameter in self.outer:  # one by one: gloo takes as much again for what it is gathering
                stack.enter_context(_gathered([parameter]))
            stack.callback(self._release)
            for unit in self.units:
                before = unit.register_forward_pre_hook(lambda module, _: self._make_whole(module), prepend=True)
                after = unit.register_forward_hook(self._watch_output)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            yield

    def _settle(self) -> None:
        """Waits for what DeepSpeed was gathering ahead of a pass that never came, and lets go of it."""
        for parameter, handle in self.model.ds_inflight_param_registry.items():
            handle.wait()
            parameter.partition()
        self.model.ds_inflight_param_registry.clear()

    def _make_whole(self, unit: nn.Module) -> None:
        if unit is self.current:
            return
        with torch._C.DisableTorchFunction():  # what watches the model's operations is not to see, and hold, these
            self._release()
            self._gathered.enter_context(_gathered(self.units[unit]))
        self.current = unit
        whole = sorted((p for p in self.units[unit] if p.numel()), key=Tensor.data_ptr)
        self._at, self._starts = whole, [p.data_ptr() for p in whole]

    def _watch_output(self, unit: nn.Module, _: Any, output: Any) -> None:
        """Backward comes through the output; gradient checkpointing then runs the unit again without its hooks."""
        for x in output if isinstance(output, tuple | list) else [output]:
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda _: self._make_whole(unit))

    def _release(self) -> None:
        self._gathered.close()
        self.current, self._at, self._starts = None, [], []

    def _pack(self, saved: Tensor) -> Tensor | _Saved:
        found = self._find(saved) if self.current is not None and saved.numel() else None
        if found is None:
            return saved.detach()  # with its history, an output would hold itself
        assert self.current is not None
        offset = (saved.data_ptr() - found.data_ptr()) // saved.element_size()
        return _Saved(self.current, found, saved.shape, saved.stride(), offset)

    def _find(self, saved: Tensor) -> nn.Parameter | None:
        """The whole parameter of the current unit in whose memory a tensor lies."""
        at = saved.data_ptr()
        i = bisect_right(self._starts, at) - 1
        if i < 0:
            return None
        parameter = self._at[i]
        inside = at < self._starts[i] + parameter.numel() * parameter.element_size()
        return parameter if inside and saved.dtype == parameter.dtype else None

    def _unpack(self, packed: Tensor | _Saved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._make_whole(packed.unit)
        return packed.tensor()


def _units(model: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """The members of the outermost lists of modules, and each one's parameters that no other module has."""
    members: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.ModuleList):
                members.append(child)
            else:
                walk(child)

    walk(model)
    owners: dict[int, set[int]] = {}
    unit_of = {id(module): id(unit) for unit in members for module in unit.modules()}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(unit_of.get(id(module), 0))
    return {
        unit: [p for p in unit.parameters() if is_partitioned(p) and owners[id(p)] == {id(unit)}] for unit in members
    }


@contextmanager
def _gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Makes whole those that are not; DeepSpeed keeps small ones whole, and goes on doing so."""
    from deepspeed import zero

    apart = [p for p in parameters if not is_whole(p)]
    with zero.GatheredParameters(apart, enabled=bool(apart)):
        yield


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Takes DeepSpeed's hooks off the modules for a while."""
    hooks = [vars(module)[kind] for module in model.modules() for kind in _HOOKS]
    before: list[tuple[dict[int, Callable[..., Any]], dict[int, Callable[..., Any]]]] = [
        (own, dict(own)) for own in hooks
    ]
    try:
        for own, all_of_it in before:
            for key, hook in all_of_it.items():
                if hook.__module__.startswith("deepspeed."):
                    del own[key]
        yield
    finally:
        for own, all_of_it in before:
            own.clear()
            own.update(all_of_it)


@contextmanager
def plain_linear() -> Iterator[None]:
    """torch's own `linear` for a while: ZeRO-3 puts another in its place, for all models, that cannot be watched."""
    functional: Any = torch.nn.functional
    before = functional.linear
    functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = before
