"""Sharded: what a pass does differently where FSDP2 (`torch.distributed.fsdp.fully_shard`) or ZeRO-3 shards parameters.

A unit's parameters are gathered when it runs forward, and again when it runs backward, by FSDP's own hooks; in between
the model holds shards (`DTensor`), and other tensor objects than those that its operations saw. So

    parameters      are looked up when a module runs, by where they stand (`Slots`)
    outer units     (the root and what lies beside the decoder, such as the head) are gathered once a call: the head is
                    run apart, part by part, and each part would gather them again
    processes       gather together, so all run equally many passes: those with fewer micro-batches repeat one
    the loop        takes each parameter's whole gradient in turn, squares it and drops it (`loop_norm`)

Under DeepSpeed ZeRO-3 the tensor objects stay and only their numbers come and go; partitioned.py gathers them.

No gradient of a parameter is ever formed by the batched method, and the loop's never reaches an AccumulateGrad node, so
no gradient is communicated: all-gathers of weights only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vigor.gradnorm.capture import Capture, UnsupportedModule
from vigor.gradnorm.head import NoDecoder, find_decoder
from vigor.gradnorm.loop import gradient_norm, row_logps
from vigor.gradnorm.partitioned import Partition, is_partitioned, is_whole
from vigor.rollouts import Row

Slot = tuple[nn.Module, str, nn.Parameter]
"""The module that owns a chosen parameter, the attribute, and the parameter as it was chosen."""


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside DDP or DeepSpeed's engine, whose own forward waits for gradients that never come.

    Raises:
        UnsupportedModule: FSDP1.
    """
    if isinstance(model, DistributedDataParallel) or _is_engine(model):
        model = cast(nn.Module, model.module)
    if dist.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        for name, module in model.named_modules():
            if isinstance(module, FullyShardedDataParallel):
                raise UnsupportedModule(
                    f"gradient norm: {name or 'the model'} is sharded by FSDP version 1, which merges parameters into "
                    "flat ones. Use version 2 (fully_shard; in accelerate, fsdp_version: 2)."
                )
    return model


def _is_engine(model: nn.Module) -> bool:
    return "deepspeed" in sys.modules and isinstance(model, sys.modules["deepspeed"].DeepSpeedEngine)


def sharding_of(model: nn.Module) -> Sharding | None:
    """How FSDP2 or ZeRO-3 shards the model; None where neither does.

    Raises:
        UnsupportedModule: parameters are sharded in another way (tensor parallelism), or the root is no unit of FSDP's.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if hasattr(parameter, "tensor_model_parallel") and parameter.tensor_model_parallel:
            raise UnsupportedModule(
                f"gradient norm: {name} is a part of a weight: tensor parallelism (DeepSpeed's autotp_size, Megatron) "
                "splits the sums that a norm is made of. Shard with FSDP2 or ZeRO-3 instead."
            )
    if any(is_partitioned(p) for p in model.parameters()):
        return Sharding(model)
    sharded = next(((name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if sharded is None and not units:
        return None
    if not isinstance(model, FSDPModule):
        where = sharded[0] if sharded else "the model"
        how = "its root is no unit of FSDP2: call fully_shard on the whole model too" if units else (
            "no unit of FSDP2 gathers it (tensor parallelism splits the sums that a norm is made of). Shard with FSDP2 "
            "instead")  # fmt: skip
        raise UnsupportedModule(f"gradient norm: {where} is sharded, but {how}.")
    return Sharding(model)


class Sharding:
    """A model that FSDP2 or ZeRO-3 shards, and the processes that gather its parameters together."""

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        self.model = model
        self.slots: dict[nn.Module, list[Slot]] = {}
        self.names: dict[int, str] = {}
        self.dtype: torch.dtype | None = None
        """What the units compute in, where a mixed-precision policy says so."""
        self.partition: Partition | None = None
        if any(is_partitioned(p) for p in model.parameters()):
            self.partition = Partition(model)
            self.group: dist.ProcessGroup | None = self.partition.group
            self.units = {model, *self.partition.units}
            return
        try:
            decoder: nn.Module | None = find_decoder(model)
        except NoDecoder:
            decoder = None
        inside = set() if decoder is None else set(decoder.modules()) - {decoder}
        self.outer: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule) and m not in inside]
        self.units = {module for module in model.modules() if isinstance(module, FSDPModule)}
        """Modules whose parameters are whole together."""
        meshes = [p for p in model.parameters() if isinstance(p, DTensor)]
        self.group = None
        for parameter in meshes[:1]:
            dim = next((i for i, placement in enumerate(parameter.placements) if placement.is_shard()), 0)
            self.group = parameter.device_mesh.get_group(dim)
        self.dtype = self.outer[0]._get_fsdp_state()._mp_policy.param_dtype

    def most(self, count: int, device: torch.device) -> int:
        """The largest of the processes' counts."""
        largest = torch.tensor(count, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return int(largest)

    def choose(self, parameters: dict[str, nn.Parameter]) -> None:
        """Notes where the chosen parameters stand; to be called while all are sharded."""
        chosen = self.names = {id(p): name for name, p in parameters.items()}
        for module in self.model.modules():
            own = [(module, attr, p) for attr, p in module._parameters.items() if p is not None and id(p) in chosen]
            if own:
                self.slots[module] = own

    @contextmanager
    def held(self) -> Iterator[None]:
        """Gathers the outer units, and keeps them so until the end."""
        if self.partition is not None:
            with self.partition.held():
                yield
            return
        state = self.outer[0]._get_fsdp_state()
        state._lazy_init()  # the root's first forward pass would do it, and set anew what is set here
        groups = {id(g): g for unit in self.outer if (g := unit._get_fsdp_state()._fsdp_param_group) is not None}
        before = [(g, g.post_forward_mesh_info, g.reshard_after_backward) for g in groups.values()]
        try:
            for group in groups.values():
                group.post_forward_mesh_info, group.reshard_after_backward = None, False
            for unit in self.outer:
                unit.unshard()
            yield
        finally:
            for group, mesh, reshard in before:
                group.post_forward_mesh_info, group.reshard_after_backward = mesh, reshard
            for unit in self.outer:
                unit.reshard()

    # The batched method -----------------------------------------------------------------------------------------------

    def reach(self, module: nn.Module, recurse: bool) -> list[Slot]:
        """The slots of a module, those of its submodules included."""
        modules = module.modules() if recurse else [module]
        return [slot for each in modules for slot in self.slots.get(each, [])]

    def gathered(self, capture: Capture, module: nn.Module, slots: list[Slot]) -> list[nn.Parameter]:
        """The parameters that stand in these slots and are whole now, made known to the capture.

        Raises:
            UnsupportedModule: one of the module's own is still a shard although the module runs.
        """
        whole = []
        for owner, attribute, parameter in slots:
            current = owner._parameters[attribute]
            assert current is not None
            if _is_shard(current):
                if owner is module:
                    raise self._elsewhere(parameter, current)
                continue
            if current is not parameter and id(current) not in capture.names:
                capture.names[id(current)] = capture.names[id(parameter)]
                capture.live.append(current)
                if parameter.requires_grad and not current.requires_grad:  # a frozen one that is chosen, see `score`
                    current.requires_grad_(True)
                    capture.thawed.append(current)
            whole.append(current)
        return whole

    def _elsewhere(self, parameter: nn.Parameter, current: Any) -> UnsupportedModule:
        if self.partition is not None:
            return UnsupportedModule(
                f"gradient norm: {self.names[id(parameter)]} is partitioned by ZeRO-3, and was not gathered when its "
                "module ran: the layer around it was not called as a module. Shard with FSDP2 instead."
            )
        return UnsupportedModule(
            f"gradient norm: {self.names[id(parameter)]} is sharded in another way than by FSDP2 "
            f"({current.placements}): tensor parallelism splits the sums that a norm is made of."
        )

    # The loop ---------------------------------------------------------------------------------------------------------

    def loop_norm(
        self,
        row: Row,
        *,
        temperature: float,
        on_logits: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
        index: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """‖∇ NLL‖ of one row and its log-probabilities: autograd's gradient of one whole parameter after another."""
        squares: list[Tensor] = []
        anchor = torch.zeros((), device=row.ids_L.device, requires_grad=True)
        with self._probed(anchor, squares):
            logps_T = row_logps(self.model, row, temperature, on_logits, index)
            torch.autograd.grad(-logps_T.mean(), anchor)
        total = torch.stack(squares).sum() if squares else logps_T.new_zeros((), dtype=torch.float64)
        return total.sqrt().to(logps_T.dtype), logps_T.detach()

    @contextmanager
    def _probed(self, anchor: Tensor, squares: list[Tensor]) -> Iterator[None]:
        """For a while, each unit's chosen parameters are stood for by tensors whose gradient is squared and dropped."""
        probes: dict[int, Tensor] = {}
        had: dict[nn.Module, Any] = {}
        try:
            for unit in self.model.modules():
                if slots := self.reach(unit, unit in self.units):
                    had[unit] = unit.__dict__.get("forward")
                    probe = partial(_probe, anchor, squares)
                    unit.__dict__["forward"] = partial(self._run_probed, unit, unit.forward, slots, probes, probe)
            yield
        finally:
            for unit, forward in had.items():
                if forward is None:
                    del unit.__dict__["forward"]
                else:
                    unit.__dict__["forward"] = forward

    def _run_probed(
        self,
        unit: nn.Module,
        forward: Callable[..., Any],
        slots: list[Slot],
        probes: dict[int, Tensor],
        probe: Callable[[Tensor], Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        shadowed = []
        for owner, attribute, parameter in slots:
            if attribute in owner.__dict__:  # a unit around has done it
                continue
            current = owner._parameters[attribute]
            assert current is not None
            if _is_shard(current):  # of a unit inside
                if owner is unit:
                    raise self._elsewhere(parameter, current)
                continue
            if id(current) not in probes:
                probes[id(current)] = probe(current.detach())
            elif self.partition is not None:
                probes[id(current)].data = current.data
            owner.__dict__[attribute] = probes[id(current)]  # found before nn.Module looks among its parameters
            shadowed.append((owner, attribute))
        try:
            return forward(*args, **kwargs)
        finally:
            for owner, attribute in shadowed:
                if self.partition is not None and id(owner._parameters[attribute]) in self.partition.inner:
                    owner.__dict__[attribute].data = owner.__dict__[attribute].new_empty(0)  # the next unit's turn
                del owner.__dict__[attribute]


def _is_shard(parameter: nn.Parameter) -> bool:
    from torch.distributed.tensor import DTensor

    return not is_whole(parameter) if is_partitioned(parameter) else isinstance(parameter, DTensor)


def _probe(anchor: Tensor, squares: list[Tensor], parameter: Tensor) -> Tensor:
    probe: Tensor = _Probe.apply(parameter, anchor, squares)
    return probe


class _Probe(torch.autograd.Function):
    """A parameter; backward squares its gradient, all uses added up, and drops it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, anchor: Tensor, squares: list[Tensor]) -> Tensor:
        ctx.squares = squares
        probe: Tensor = torch.ops.aten._unsafe_view.default(parameter, parameter.shape)  # a view would hold its base
        return probe

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.squares.append(gradient_norm([g], "float32").double().square())
        return None, g.new_zeros((), dtype=torch.float32), None


def idle_batches(model: nn.Module, batches: int, device: torch.device) -> list[Tensor]:
    """(1, 2) input ids of the forward passes that this process must add to its own, so that all run equally many.

    To be called by all, before the first: afterwards each process waits for what it gathers with the others.
    """
    sharding = sharding_of(model)
    idle = 0 if sharding is None else sharding.most(batches, device) - batches
    return [idle_row(device).ids_L[None]] * idle


def idle_row(device: torch.device) -> Row:
    """What a process without rows scores while the others score theirs."""
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    at = torch.arange(2, device=device)
    return Row(ids, at == 1, at)
