"""EMA: a slow copy of the trainable weights, and a block in which the model wears it. Knows torch only.

    copy ← rate · weights + (1 - rate) · copy

The copy is float32 or wider whatever the model's dtype: at a rate of 1e-5 a bfloat16 copy would never move. Under LoRA
the trainable weights are the adapters, so the averaged policy is that of the averaged A and B, not of their product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class CosineRate:
    """A rate that falls from `start` to `end` along half a cosine.

    Source: Co-rewarding-II, tmlr-group/Co-rewarding@6c60ea4 `sharding_manager/fsdp_vllm.py`; 0.01 → 1e-5 in its script.

    Raises:
        ValueError: a rate outside [0, 1].
    """

    start: float = 0.01
    end: float = 1e-5

    def __post_init__(self) -> None:
        if not (0 <= self.start <= 1 and 0 <= self.end <= 1):
            raise ValueError(f"CosineRate: rates lie in [0, 1], got start={self.start} and end={self.end}.")

    def __call__(self, step: int, total: int) -> float:
        """The rate of the update before the rollouts of step `step`, counted from 1, of `total`."""
        passed = min(max(step - 1, 0) / max(total, 1), 1.0)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * passed)) / 2


@dataclass(frozen=True)
class TeacherPlan:
    """What a reward asks of the teacher whose completions it reads."""

    rate: CosineRate
    on_cpu: bool = False
    """Keep the copy in the CPU's memory: slower, and no memory of the device."""


class EMA:
    """An exponential moving average of a model's trainable parameters."""

    def __init__(self, model: nn.Module, *, device: torch.device | str | None = None) -> None:
        """Copies the trainable parameters as they are.

        Args:
            model: without a distributed wrapper, so that names match later; parameters must not be sharded.
            device: where the copy lives, such as "cpu"; None is each parameter's own device.

        Raises:
            ValueError: the model has no trainable parameter, or one without elements (a shard of ZeRO-3).
        """
        self._device = None if device is None else torch.device(device)
        self._copy: dict[str, Tensor] = {}
        for name, parameter in _trainable(model).items():
            if parameter.numel() == 0:
                raise ValueError(
                    f"EMA: parameter {name!r} has no elements; sharded parameters cannot be averaged here."
                )
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self._copy[name] = parameter.detach().to(self._home(parameter), wide, copy=True)
        if not self._copy:
            raise ValueError("EMA: the model has no trainable parameter to average.")

    @torch.no_grad()
    def update(self, model: nn.Module, rate: float) -> None:
        """Moves the copy by `rate`, in [0, 1], towards the model's parameters.

        Raises:
            ValueError: the rate lies outside [0, 1], or the trainable parameters are not those of the copy.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"EMA: the rate must lie in [0, 1], got {rate}.")
        for name, parameter in self._matching(model).items():
            copy = self._copy[name]
            copy.lerp_(parameter.detach().to(copy.device, copy.dtype), rate)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged parameters inside the block, and bit for bit its own ones afterwards.

        The parameters are overwritten in place, so no graph that needs them may be alive. While the block runs the
        model's own parameters wait on the copy's device.

        Raises:
            ValueError: the trainable parameters are not those of the copy.
        """
        parameters = self._matching(model)
        own = {name: p.detach().to(self._home(p), copy=True) for name, p in parameters.items()}
        try:
            self._write(parameters, self._copy)
            yield
        finally:
            self._write(parameters, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The copy by parameter name; the tensors themselves, not clones of them."""
        return dict(self._copy)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the values of a `state_dict`.

        Raises:
            ValueError: names or shapes differ.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self._copy.items()}
        if (given := {name: tuple(tensor.shape) for name, tensor in state.items()}) != shapes:
            wrong = sorted(set(given.items()) ^ set(shapes.items()))
            raise ValueError(
                f"EMA: the saved average is of other parameters ({len(given)} saved, {len(shapes)} here; first "
                f"difference: {wrong[0][0]!r} {wrong[0][1]}). Resume with the same model and the same peft settings."
            )
        for name, tensor in state.items():
            self._copy[name].copy_(tensor)

    def _home(self, parameter: Tensor) -> torch.device:
        return parameter.device if self._device is None else self._device

    def _matching(self, model: nn.Module) -> dict[str, nn.Parameter]:
        parameters = _trainable(model)
        if parameters.keys() != self._copy.keys():
            wrong = sorted(parameters.keys() ^ self._copy.keys())
            raise ValueError(
                f"EMA: the model's trainable parameters are not those of the copy ({len(wrong)} differ, first: "
                f"{wrong[0]!r}). Make the EMA after the parameters to train are chosen, of the unwrapped model."
            )
        return parameters

    @staticmethod
    @torch.no_grad()
    def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
