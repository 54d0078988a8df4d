"""Two processes (gloo, CPU) under DeepSpeed ZeRO-2 and ZeRO-3: the norms of the whole model, no gradient communicated.

DeepSpeed is not among the development dependencies; without it these tests are skipped. This file is also the worker
that torchrun starts: `python tests/test_deepspeed.py FOLDER`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers_distributed import results_of_two, write_results
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import parallel

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed: pip install 'vigor-rl[deepspeed]'",
    )
]
WAYS = {
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "ZeRO-3, small ones whole": {
        "stage": 3,
        "stage3_param_persistence_threshold": 20,
        "stage3_max_reuse_distance": 0,  # so that it gathers ahead
        "stage3_prefetch_bucket_size": 1,
    },
    "ZeRO-3, checkpointing": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
CASES = [("ZeRO-3", name) for name in parallel.MODELS] + [(way, "Qwen2, untied") for way in WAYS if way != "ZeRO-3"]
CASES += [("ZeRO-3, checkpointing", "Mixtral"), ("ZeRO-2", "LoRA")]

# The worker -----------------------------------------------------------------------------------------------------------


def engine_of(model: nn.Module, way: str, **config: Any) -> Any:
    import deepspeed

    if "checkpointing" in way:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": WAYS[way],
        **config,
    }
    return deepspeed.initialize(model=model, config=settings)[0]


@contextmanager
def reductions() -> Iterator[list[int]]:
    """Sizes of what DeepSpeed's own communication layer sums over processes."""
    from deepspeed.comm import comm

    backend, seen = comm.cdb, []
    names = [name for name in dir(type(backend)) if "reduce" in name]

    def counted(call: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            tensors = [x for x in given if isinstance(x, Tensor)]
            lists = [x for one in given if isinstance(one, list) for x in one]
            seen.append(max([x.numel() for x in (*tensors, *lists) if isinstance(x, Tensor)], default=0))
            return call(*args, **kwargs)

        return count

    for name in names:
        backend.__dict__[name] = counted(getattr(backend, name))
    try:
        yield seen
    finally:
        for name in names:
            del backend.__dict__[name]


def reference(name: str, rows: Any, **options: Any) -> Tensor:
    """The naive loop over the whole model, float64; float32 where the model's kernels have no other."""
    from vigor.gradnorm import sequence_grad_norms

    model = parallel.MODELS[name]()
    model = model if name == "Mixtral" else model.double()
    return sequence_grad_norms(model, *rows, method="loop", **options)


def norms(rank: int, way: str, name: str) -> dict[str, Any]:
    """Errors of the batched method and of the loop, sketches, and what was communicated."""
    from vigor.gradnorm import sequence_grad_norms

    rows = parallel.batch(rank)
    wanted = reference(name, rows)
    sketched = sequence_grad_norms(parallel.MODELS[name](), *rows, method="sketch")
    engine = engine_of(parallel.MODELS[name](), way)
    with parallel.Communication() as seen, reductions() as sums:
        found = sequence_grad_norms(engine, *rows, method="batched", micro_batch=2)
        loop = sequence_grad_norms(engine.module, *rows, method="loop")
        sketch = sequence_grad_norms(engine.module, *rows, method="sketch")
    assert all(p.grad is None for p in engine.module.parameters())

    def error(x: Tensor, y: Tensor) -> float:
        return float((x / y - 1).abs().max())

    return {
        "way": way, "model": name, "batched": error(found, wanted), "loop": error(loop, wanted),
        "sketch": error(sketch, sketched), "gathers": seen.calls["allgather_base"], "gradients": seen.gradients,
        "sums": sum(size > 1 for size in sums),
    }  # fmt: skip


def trained(rank: int, way: str, *, scored: bool) -> tuple[list[float], int, Any]:
    """Losses of five steps, with norms taken before, within and after each or not, and the sums of the last."""
    from vigor.gradnorm import sequence_grad_norms
    from vigor.signals import token_stats

    engine = engine_of(parallel.qwen2(), way)
    engine.train()
    losses, reduced = [], 0
    for _ in range(5):
        ids, attention, _ = parallel.batch(0)
        ids, attention = ids[rank : rank + 1], attention[rank : rank + 1]
        if scored:
            sequence_grad_norms(engine.module, *parallel.batch(rank))
            token_stats(engine.module, *parallel.batch(rank), micro_batch=2)
        loss = engine(input_ids=ids, attention_mask=attention, labels=ids, use_cache=False).loss
        if scored:
            sequence_grad_norms(engine.module, *parallel.batch(rank), micro_batch=2)
        with reductions() as sums:
            engine.backward(loss)
        if scored:
            sequence_grad_norms(engine.module, *parallel.batch(rank), micro_batch=1)
        engine.step()
        reduced = sum(size > 1 for size in sums)
        losses.append(float(loss.detach()))
    return losses, reduced, engine


def after(rank: int, way: str) -> dict[str, Any]:
    """Steps among which norms are taken are those without, and the norms are those of the updated weights."""
    import deepspeed

    from vigor.gradnorm import sequence_grad_norms
    from vigor.signals import token_stats

    plain, _, engine = trained(rank, way, scored=False)
    ahead = 0
    if "small" in way:  # the first half of a recorded step, after which DeepSpeed is gathering for the second
        ids = parallel.batch(0)[0][rank : rank + 1]
        engine(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
        ahead = len(engine.module.ds_inflight_param_registry)
    first = sequence_grad_norms(engine, *parallel.batch(rank))
    scored, sums, engine = trained(rank, way, scored=True)
    found = sequence_grad_norms(engine, *parallel.batch(rank))
    logps = token_stats(engine, *parallel.batch(rank)).logps_BL
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=WAYS[way]["stage"] == 3):
        weights = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    whole = parallel.qwen2()
    whole.load_state_dict(weights)
    wanted = sequence_grad_norms(whole.double(), *parallel.batch(rank), method="loop")
    return {
        "plain": plain,
        "scored": scored,
        "sums": sums,
        "ahead": ahead,
        "norms": max(float((x / wanted - 1).abs().max()) for x in (found, first)),
        "logps": float((logps - token_stats(whole, *parallel.batch(rank)).logps_BL).abs().max()),
    }


def made_in_parts(rank: int, folder: Path) -> dict[str, float]:
    """A model that transformers loads into parts (`deepspeed.zero.Init`), as it does in a run with ZeRO-3: the largest
    error of its norms, and the bytes that a run would find room for before it trains it."""
    from transformers import Qwen2ForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from vigor.commands.train import _least_bytes
    from vigor.gradnorm import sequence_grad_norms

    rows = parallel.batch(rank)
    if rank == 0:
        parallel.qwen2(tied=False).save_pretrained(folder / "model")
    dist.barrier()
    config = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": WAYS["ZeRO-3"]})
    model = Qwen2ForCausalLM.from_pretrained(folder / "model")
    del config
    assert all(p.numel() == 0 for p in model.parameters())
    job: Any = SimpleNamespace(checkpoint=None, model_args=SimpleNamespace(use_peft=False),
                               args=SimpleNamespace(save_strategy="steps"))  # fmt: skip
    least, _ = _least_bytes(job, SimpleNamespace(model=model))
    before = nn.functional.linear
    assert before is not torch._C._nn.linear  # ZeRO-3's
    found = sequence_grad_norms(engine_of(model, "ZeRO-3"), *rows, method="batched")
    assert nn.functional.linear is before
    return {"error": float((found / reference("Qwen2, untied", rows) - 1).abs().max()), "least": least}


def corners(rank: int) -> dict[str, Any]:
    """A frozen base under adapters, a process without rows, and a part of the model."""
    from vigor.gradnorm import UnsupportedModule, sequence_grad_norms
    from vigor.signals import token_stats

    rows = parallel.batch(rank)
    engine = engine_of(parallel.qwen2(lora=True), "ZeRO-3, checkpointing")
    trains = [p.requires_grad for p in engine.module.parameters()]
    wanted = reference("LoRA", rows, parameters="base")
    base = [sequence_grad_norms(engine, *rows, parameters="base", method=m) for m in ("batched", "loop")]
    assert trains == [p.requires_grad for p in engine.module.parameters()]

    engine, whole = engine_of(parallel.qwen2(tied=False), "ZeRO-3"), parallel.qwen2(tied=False)
    rows = parallel.batch(0)
    rows = rows if rank == 0 else tuple(x[:1] * (i < 2) for i, x in enumerate(rows))  # no counted token
    scored = [sequence_grad_norms(engine, *rows, method=m, micro_batch=1) for m in ("batched", "loop", "sketch")]
    alone = [sequence_grad_norms(whole, *rows, method=m) for m in ("loop", "loop", "sketch")]
    logps = [token_stats(each, *rows, micro_batch=1).logps_BL for each in (engine.module, whole)]
    same = zip([*scored, logps[0]], [*alone, logps[1]], strict=True)
    try:
        sequence_grad_norms(engine.module.model, *rows)
        refused = ""
    except UnsupportedModule as error:
        refused = str(error)
    return {
        "base": max(float((found / wanted - 1).abs().max()) for found in base),
        "uneven": all(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in same),
        "refused": refused,
    }


def memory(rank: int) -> dict[str, int]:
    """How many of eight layers' weights are alive at most when one has been gathered."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from vigor.gradnorm import sequence_grad_norms
    from vigor.gradnorm.partitioned import Partition

    gather = Partition._make_whole
    most: dict[str, int] = {}
    for way, method in (("ZeRO-3", "batched"), ("ZeRO-3", "loop"), ("ZeRO-3, checkpointing", "batched"),
                        ("ZeRO-3, checkpointing", "loop")):  # fmt: skip
        engine = engine_of(Qwen2ForCausalLM(Qwen2Config(**{**parallel.SIZE, "num_hidden_layers": 8})), way)
        alive: dict[Any, list[Any]] = {}
        counts: list[int] = []

        def watched(self: Any, unit: nn.Module, alive: Any = alive, counts: Any = counts) -> None:
            gather(self, unit)
            alive.setdefault(unit, []).extend(StorageWeakRef(p.untyped_storage()) for p in unit.parameters())
            counts.append(sum(any(not ref.expired() for ref in refs) for refs in alive.values()))

        Partition._make_whole = watched
        try:
            sequence_grad_norms(engine, *parallel.batch(rank), method=method, micro_batch=1, self_check=False)
        finally:
            Partition._make_whole = gather
        assert len(alive) == 8
        most[f"{way}, {method}"] = max(counts)
    return most


def tensor_parallel() -> list[str]:
    """What is said of a model in whose layers DeepSpeed splits weights. Comes last: it changes DeepSpeed's groups."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from vigor.gradnorm import UnsupportedModule, sequence_grad_norms

    model = Qwen2ForCausalLM(Qwen2Config(**{**parallel.SIZE, "num_key_value_heads": 2}))
    engine = engine_of(model, "ZeRO-2", tensor_parallel={"autotp_size": 2})
    said = []
    for each in (engine, engine.module):
        try:
            sequence_grad_norms(each, *parallel.batch(0))
        except UnsupportedModule as error:
            said.append(str(error))
    return said


def work(folder: Path) -> None:
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    results = {
        "norms": [norms(rank, way, name) for way, name in CASES],
        "after": {way: after(rank, way) for way in WAYS},
        "corners": corners(rank),
        "memory": memory(rank),
        "made_in_parts": made_in_parts(rank, folder),
        "tensor_parallel": tensor_parallel(),
    }
    write_results(folder, rank, results)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of_two(__file__, tmp_path_factory.mktemp("deepspeed"), timeout=300, DS_ACCELERATOR="cpu")


# The tests ------------------------------------------------------------------------------------------------------------


def test_norms_are_those_of_the_whole_model(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert len(result["norms"]) == len(CASES)
        for row in result["norms"]:
            assert max(row["batched"], row["loop"], row["sketch"]) < 1e-5, row


def test_the_norms_communicate_weights_only(results: list[dict[str, Any]]) -> None:
    for result in results:
        for row in result["norms"]:
            assert (row["gradients"], row["sums"]) == (0, 0), row
            assert (row["gathers"] > 0) == ("ZeRO-3" in row["way"]), row


def test_an_ordinary_backward_pass_would_be_seen(results: list[dict[str, Any]]) -> None:
    assert all(result["after"][way]["sums"] > 0 for result in results for way in WAYS)


def test_training_goes_on_as_if_no_norm_had_been_taken(results: list[dict[str, Any]]) -> None:
    for result in results:
        for found in result["after"].values():
            assert found["scored"] == pytest.approx(found["plain"], rel=1e-6)
            assert found["plain"][-1] < found["plain"][0]
            assert found["norms"] < 1e-5, found
            assert found["logps"] < 1e-5


def test_norms_are_taken_while_deepspeed_gathers_ahead(results: list[dict[str, Any]]) -> None:
    assert all(result["after"]["ZeRO-3, small ones whole"]["ahead"] > 0 for result in results)


def test_one_layers_weights_are_whole_at_a_time(results: list[dict[str, Any]]) -> None:
    for result in results:
        for way, most in result["memory"].items():
            assert most == 1 if way.endswith("batched") else most <= 4, result["memory"]


def test_a_frozen_base_and_a_process_without_rows(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["corners"]["base"] < 1e-5
        assert result["corners"]["uneven"]


def test_a_part_of_the_model_is_refused(results: list[dict[str, Any]]) -> None:
    assert all("deepspeed.initialize was given" in result["corners"]["refused"] for result in results)


def test_tensor_parallel_layers_are_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert len(result["tensor_parallel"]) == 2
        assert all("q_proj.weight is a part of a weight: tensor" in said for said in result["tensor_parallel"])


def test_a_model_made_in_parts_is_scored(results: list[dict[str, Any]]) -> None:
    whole = sum(p.numel() * p.element_size() for p in parallel.qwen2(tied=False).parameters())
    for result in results:
        assert result["made_in_parts"]["error"] < 1e-5
        assert result["made_in_parts"]["least"] == 2 * whole  # model/ and a checkpoint


# Runs -----------------------------------------------------------------------------------------------------------------


def train(folder: Path, name: str, *more: str) -> tuple[list[float], dict[str, Tensor]]:
    """Two steps of the lab's run in two processes: the scores of all completions, and the trained weights."""
    import pandas as pd
    from safetensors.torch import load_file

    settings = {
        "config": "lab", "accelerate_config": name, "num_processes": 2, "mixed_precision": "no", "max_steps": 2,
        "per_device_train_batch_size": 16, "max_completion_length": 24, "lab_eval_prompts": 0, "output_dir": folder,
    }  # fmt: skip
    argv = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "vigor", "train", *argv, "--use_cpu", *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = [pd.read_parquet(path) for path in sorted((folder / "completions").glob("*.parquet"))]
    return [x for table in tables for x in table["vigor/score"]], load_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_runs_are_those_under_ddp(tmp_path: Path) -> None:
    scores, weights = train(tmp_path / "ddp", "multi_gpu")
    assert len(scores) == 64
    for name in ("zero2", "zero3"):
        found, trained = train(tmp_path / name, name)
        assert found == pytest.approx(scores, rel=1e-3)  # of the second step's weights, too
        assert all(torch.allclose(trained[key], weights[key], rtol=0, atol=1e-4) for key in weights)


@pytest.mark.slow
def test_a_run_in_parts_resumes_as_the_same(tmp_path: Path) -> None:
    saving = ("--save_strategy", "steps", "--save_steps", "1")
    _, whole = train(tmp_path / "run", "zero3", *saving)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    _, resumed = train(tmp_path / "run", "zero3", *saving, "--resume")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_another_precision_than_deepspeeds_is_refused(tmp_path: Path) -> None:
    argv = ["--config", "lab", "--accelerate_config", "zero2", "--num_processes", "2", "--dry_run"]
    command = [sys.executable, "-m", "vigor", "train", *argv, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "has DeepSpeed compute in bf16" in done.stderr
    assert "--mixed_precision no" in done.stderr


def test_tensor_parallelism_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    asked = {"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}
    (tmp_path / "deepspeed.json").write_text(json.dumps(asked))
    argv = ["--config", "lab", "--deepspeed", str(tmp_path / "deepspeed.json"), "--use_cpu", "--dry_run"]
    command = [sys.executable, "-m", "vigor", "train", *argv, "--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 2
    assert "the DeepSpeed configuration asks DeepSpeed for tensor parallelism" in done.stderr


if __name__ == "__main__":
    work(Path(sys.argv[1]))
