"""Two processes (gloo, CPU) whose model is sharded: the norms of the whole model, and no gradient communicated.

This file is also the program of the two: `python tests/test_parallel_norms.py FOLDER`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers_distributed import forked, results_of_two, write_results
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import parallel  # noqa: E402
import parallel_memory  # noqa: E402

WAYS = list(parallel.ways())
CASES = [(way, "Qwen2, untied") for way in WAYS] + [("FSDP2, units as in accelerate", name) for name in parallel.MODELS]
CASES += [("FSDP2, checkpointing", "Mixtral"), ("DDP", "LoRA")]

# The worker -----------------------------------------------------------------------------------------------------------


def after(rank: int) -> dict[str, float]:
    """An ordinary backward pass after the norms gives the gradients of the whole model, accumulation included."""
    from vigor.gradnorm import sequence_grad_norms

    def loss(model: nn.Module, r: int) -> torch.Tensor:
        ids = parallel.batch(r)[0][:2]
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss

    whole = parallel.qwen2()
    (2 * (loss(whole, 0) + loss(whole, 1)) / 2).backward()
    model = parallel.shard(parallel.qwen2(), units="tail", reshard_after_forward=True)
    model.set_requires_gradient_sync(False)
    loss(model, rank).backward()
    sequence_grad_norms(model, *parallel.batch(rank), method="batched")
    model.set_requires_gradient_sync(True)
    loss(model, rank).backward()
    off = {
        name: p.grad.full_tensor() - dict(whole.named_parameters())[name].grad for name, p in model.named_parameters()
    }
    return {"gradients": max(float(x.abs().max()) for x in off.values())}


def uneven(rank: int) -> dict[str, Any]:
    """One process has no row at all, and the loop, statistics and norms go on together."""
    from vigor.gradnorm import sequence_grad_norms
    from vigor.signals import token_stats

    model = parallel.shard(parallel.qwen2(tied=False))
    rows = parallel.batch(0)
    rows = rows if rank == 0 else tuple(x[:1] * (i < 2) for i, x in enumerate(rows))  # no counted token
    whole = parallel.qwen2(tied=False)
    seen: list[int] = []
    found = {
        "norms": sequence_grad_norms(model, *rows, micro_batch=1, on_logits=lambda b, *_: seen.extend(b.tolist())),
        "loop": sequence_grad_norms(model, *rows, method="loop"),
        "sketch": sequence_grad_norms(model, *rows, method="sketch"),
        "logps": token_stats(model, *rows, micro_batch=1).logps_BL.sum(1),
    }
    wanted = {
        "norms": sequence_grad_norms(whole, *rows, method="loop"),
        "loop": sequence_grad_norms(whole, *rows, method="loop"),
        "sketch": sequence_grad_norms(whole, *rows, method="sketch"),
        "logps": token_stats(whole, *rows).logps_BL.sum(1),
    }
    same = {name: bool(torch.allclose(found[name], wanted[name], 1e-5, equal_nan=True)) for name in found}
    return {**same, "reported": sorted(set(seen)) == ([0, 1, 2, 3] if rank == 0 else [])}


def disagreement(rank: int) -> dict[str, str]:
    """The self-check fails in one process; both stop."""
    from vigor.gradnorm import SelfCheckFailed, sequence_grad_norms
    from vigor.gradnorm.engine import Engine

    check = Engine.refuse_beyond
    Engine.refuse_beyond = lambda self, error, *rest: check(self, error + rank, *rest)
    try:
        sequence_grad_norms(parallel.shard(parallel.qwen2()), *parallel.batch(rank))
    except SelfCheckFailed as error:
        return {"error": str(error)}
    finally:
        Engine.refuse_beyond = check
    return {"error": ""}


def frozen(rank: int) -> dict[str, float]:
    """The whole base's norm while only adapters train."""
    from vigor.gradnorm import sequence_grad_norms

    rows = parallel.batch(rank)
    wanted = sequence_grad_norms(parallel.qwen2(lora=True), *rows, parameters="base", method="loop")
    model = parallel.shard(parallel.qwen2(lora=True), units="tail")
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    off = 0.0
    for method in ("batched", "loop"):
        found = sequence_grad_norms(model, *rows, parameters="base", method=method)
        off = max(off, float((found / wanted - 1).abs().max()))
        assert found.isfinite().all()
        assert trains == [name for name, p in model.named_parameters() if p.requires_grad]
    return {"error": off}


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {
        "norms": parallel.norms(rank, CASES),
        "after": after(rank),
        "uneven": uneven(rank),
        "disagreement": disagreement(rank),
        "frozen": frozen(rank),
    }
    write_results(folder, rank, results)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of_two(__file__, tmp_path_factory.mktemp("parallel"), start=forked)


# The tests ------------------------------------------------------------------------------------------------------------


def test_sharded_norms_are_those_of_the_whole_model(results: list[dict[str, Any]]) -> None:
    assert len(results[0]["norms"]) == len(CASES)
    for row in results[0]["norms"]:
        allowed = 5e-2 if "bf16" in row["way"] else 1e-5
        assert row["error"] < allowed, row
        assert row["loop"] < allowed, row


def test_the_norms_communicate_weights_only(results: list[dict[str, Any]]) -> None:
    for row in results[0]["norms"]:
        assert row["gradients"] == 0, row
        assert (row["gathers"] > 0) == (row["way"] not in ("DDP", "HSDP, 2 replicas")), row


def test_communication_of_an_ordinary_backward_pass_would_be_seen() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
        with parallel.Communication() as seen:
            dist.all_reduce(torch.tensor(1))
            assert seen.gradients == 0
            dist.all_reduce(model.module.weight.detach().clone())
    finally:
        dist.destroy_process_group()
    assert seen.gradients > 0


def test_an_update_after_the_norms_has_the_whole_models_gradients(results: list[dict[str, Any]]) -> None:
    assert all(result["after"]["gradients"] < 1e-5 for result in results)


def test_processes_with_different_numbers_of_rows_go_on_together(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert all(result["uneven"].values()), result["uneven"]


def test_a_failed_self_check_stops_every_process(results: list[dict[str, Any]]) -> None:
    assert "another process found it to be wrong" in results[0]["disagreement"]["error"]
    assert "relative error" in results[1]["disagreement"]["error"]


def test_the_frozen_bases_norm_is_the_same_sharded(results: list[dict[str, Any]]) -> None:
    assert all(result["frozen"]["error"] < 1e-5 for result in results)


def test_the_table_in_the_docs_has_the_whole_matrix_within_tolerance() -> None:
    text = (Path(__file__).parent.parent / "docs" / "results" / "parallel.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    norms = {(r[0], r[1]): r[2:] for r in rows if len(r) == 6}
    runs = {(r[0], r[1]): r[2:] for r in rows if len(r) == 9}
    for way in WAYS:
        for name in parallel.MODELS:
            batched, loop, _, gradients = norms[way, name]
            assert int(gradients) == 0
            assert "bf16" in way or max(float(batched), float(loop)) < 1e-5
    for way in ("DDP", "FSDP2", "HSDP"):
        for variant in parallel.VARIANTS if way != "HSDP" else ("full", "LoRA"):
            _, *found = runs[way, variant]
            assert "bf16" in variant or max(map(float, found)) < 1e-4
    memory = {r[0]: [int(cell) for cell in r[1:]] for r in rows if len(r) == 5 and r[1].isdecimal()}
    for case in parallel_memory.CASES:
        _, training, batched, loop = memory[case.name]
        assert max(batched, loop) < training
    assert re.search(r"\d{4}-\d\d-\d\d, torch \d", text)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's account")
def test_the_norms_peak_below_a_training_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # torchrun leaves a folder there
    small = parallel_memory.Case("small", layers=6)  # 80 MB of weights
    (found,) = parallel_memory.measure((small,))
    assert max(found["norms"], found["loop"]) < 0.9 * found["training"], found


if __name__ == "__main__":
    work(Path(sys.argv[1]))
