"""What cannot be had on sharded parameters is refused by name: one process, its own process group."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from helpers_trainer import config, dataset, lab_tokenizer, tiny_model
from models import SAMPLES, padded, qwen2, qwen2_untied
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers.distributed import DistributedConfig

from vigor.demands import check_policy
from vigor.gradnorm import UnsupportedModule, fused_grad_norms, sequence_grad_norms
from vigor.launch import read_launch
from vigor.rewards import get
from vigor.trainer import VigorTrainer

BATCH = padded(SAMPLES)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def sharded(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def test_one_process_shards_too() -> None:
    expected = sequence_grad_norms(qwen2(), *BATCH)
    assert torch.allclose(sequence_grad_norms(sharded(qwen2()), *BATCH, method="batched"), expected, rtol=1e-5)


def test_tensor_parallel_layers_are_refused() -> None:
    model = qwen2()
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    parallelize_module(model.model.layers[0].mlp, mesh, {"up_proj": ColwiseParallel()})
    with pytest.raises(UnsupportedModule, match=r"mlp.up_proj.weight is sharded.*tensor parallelism"):
        sequence_grad_norms(model, *BATCH)


def test_tensor_parallel_layers_inside_fsdp_are_refused() -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    model = qwen2()
    parallelize_module(model.model.layers[0].mlp, mesh["tp"], {"up_proj": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(UnsupportedModule, match=r"mlp.up_proj.weight is sharded in another way than by FSDP2"):
        sequence_grad_norms(model, *BATCH, method="batched")
    with pytest.raises(UnsupportedModule, match=r"mlp.up_proj.weight is sharded in another way"):
        sequence_grad_norms(model, *BATCH, method="loop")


def test_parts_of_weights_that_are_plain_tensors_are_refused() -> None:
    """As DeepSpeed and Megatron-LM leave them; tests/test_deepspeed.py has DeepSpeed's own."""
    model = qwen2()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.tensor_model_parallel = True
        layer.mlp.gate_proj.weight.tensor_model_parallel = False
    with pytest.raises(UnsupportedModule, match=r"0.mlp.up_proj.weight is a part of a weight: tensor parallelism"):
        sequence_grad_norms(model, *BATCH)


def test_a_root_that_is_no_unit_is_refused() -> None:
    model = qwen2()
    fully_shard(model.model.layers[0])
    with pytest.raises(UnsupportedModule, match="call fully_shard on the whole model too"):
        sequence_grad_norms(model, *BATCH)


def test_fsdp_version_1_is_refused() -> None:
    model = qwen2_untied()
    model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0], device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedModule, match=r"model.layers.0 is sharded by FSDP version 1.*fsdp_version: 2"):
        sequence_grad_norms(model, *BATCH)


def test_whole_gradients_are_refused() -> None:
    model = sharded(qwen2())
    with pytest.raises(ValueError, match=r"fused_grad_norms: the parameters are sharded"):
        fused_grad_norms(model, *BATCH)
    with pytest.raises(ValueError, match=r"accumulation='gradient_dtype'.*sharded"):
        sequence_grad_norms(model, *BATCH, method="loop", accumulation="gradient_dtype")


def test_what_the_batched_method_cannot_do_is_not_left_to_the_loop() -> None:
    """Falling back in one process would leave the others waiting for what it gathers."""

    class Odd(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rms_norm(
                x, x.shape[-1:], self.weight.flip(0).sort().values.cumsum(0)[: x.shape[-1]] / x.mean(), self.eps
            )

    model = qwen2()
    model.model.norm = Odd(model.model.norm)
    model = sharded(model)
    with pytest.raises(UnsupportedModule):
        sequence_grad_norms(model, *BATCH)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("TP_SIZE", r"tensor parallelism \(tp_size = 2\).*FSDP2 shard instead"),
        ("CP_SIZE", r"context parallelism \(cp_size = 2\)"),
        ("SP_SIZE", r"sequence parallelism \(sp_size = 2\)"),
        ("DP_SHARD_SIZE", r"dp_replicate_size 1 × dp_shard_size 2 = 2 processes, and 1 are started"),
    ],
)
def test_what_accelerates_environment_splits_is_refused_before_a_model_is_loaded(
    size: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size}", "2")
    with pytest.raises(ValueError, match=message):
        config(tmp_path)


def test_megatron_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(ValueError, match="Megatron-LM, which leaves each process a part"):
        config(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"parallelism_config": ParallelismConfig(tp_size=2)},
        {"model_init_kwargs": {"tp_plan": "auto"}},
        {"model_init_kwargs": '{"tp_size": 2}'},
        {"model_init_kwargs": {"distributed_config": DistributedConfig(fsdp_size=2)}},
    ],
)
def test_what_the_settings_split_is_refused_before_a_model_is_loaded(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(tp_size|tp_plan|distributed_config).*leaves each process a part"):
        config(tmp_path, **settings)


def accelerates_file(folder: Path, config: dict[str, Any]) -> list[str]:
    """The flags of a launch by a file of accelerate's, which names one of DeepSpeed's."""
    (folder / "deepspeed.json").write_text(json.dumps(config), "utf-8")
    named = f"deepspeed_config: {{deepspeed_config_file: {folder / 'deepspeed.json'}}}\n"
    (folder / "mine.yaml").write_text("distributed_type: DEEPSPEED\nnum_processes: 2\n" + named, "utf-8")
    return ["--accelerate_config", str(folder / "mine.yaml")]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, r"tensor parallelism \(tensor_parallel.autotp_size = 2\).*ZeRO-3"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 4}}, r"expert parallelism \(.*autoep_size = 4\)"),
        ({"sequence_parallel_size": 2}, r"sequence parallelism \(sequence_parallel_size = 2\)"),
    ],
)
def test_what_deepspeeds_file_splits_is_refused_before_a_model_is_loaded(
    asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"deepspeed.json asks DeepSpeed for " + message):
        read_launch(accelerates_file(tmp_path, {"zero_optimization": {"stage": 1}, **asked}))


def test_the_stage_is_that_of_deepspeeds_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module)  # as if DeepSpeed were installed
    whole = {"tensor_parallel": {"autotp_size": 1}, "sequence_parallel_size": 1}
    assert read_launch(accelerates_file(tmp_path, {"zero_optimization": {"stage": 3}, **whole})).zero_stage == 3
    with pytest.raises(ValueError, match=r"deepspeed_config_file: .*deepspeed.json has no entry 'zero_optimization'"):
        read_launch(accelerates_file(tmp_path, whole))


def test_a_parallelism_of_whole_models_is_accepted(tmp_path: Path) -> None:
    assert config(tmp_path, parallelism_config=ParallelismConfig()).parallelism_config is not None


def test_a_model_in_parts_is_refused_by_the_trainer(tmp_path: Path) -> None:
    made = tiny_model()
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    parallelize_module(made.model.layers[1].mlp, mesh, {"up_proj": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight is in parts already .*let accelerate shard it"):
        VigorTrainer(made, "random", config(tmp_path), train_dataset=dataset(), processing_class=lab_tokenizer())


@pytest.mark.parametrize(
    ("reward", "state", "message"),
    [
        ("vigor", {"is_fsdp_enabled": True, "version": 1}, "FSDP version 1"),
        ("head_grad_norm", {"is_deepspeed_enabled": True, "version": 2}, "ZeRO-3 must not"),
        ("head_grad_norm", {"is_fsdp_enabled": True, "version": 2}, "differ in number between processes"),
    ],
)
def test_rewards_that_cannot_be_had_sharded_are_refused(reward: str, state: dict[str, Any], message: str) -> None:
    plugins = SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(zero_stage=3), fsdp_plugin=SimpleNamespace(fsdp_version=state.pop("version"))
    )
    stand_in = SimpleNamespace(
        _is_vlm=False,
        accelerator=SimpleNamespace(state=plugins),
        **{"is_fsdp_enabled": False, "is_deepspeed_enabled": False, **state},
    )
    stand_in.is_zero3 = VigorTrainer.is_zero3.fget(stand_in)
    with pytest.raises(ValueError, match=message):
        check_policy(stand_in, [get(reward)])
