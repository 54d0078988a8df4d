"""FSDP2 in two processes (gloo, CPU): a resumed run is the uninterrupted one, with state dicts whole and in parts.

This file is also the program of the two: `python tests/test_checkpoint_fsdp.py FOLDER`.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_distributed import forked
from helpers_trainer import dataset, lab_tokenizer, table, tiny_model, trainer
from torch import nn
from transformers import AutoModelForCausalLM

from vigor import checkpoint
from vigor.checkpoint import CheckpointError
from vigor.commands.train import leave_process_group
from vigor.statedicts import refuse_code

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import parallel

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:torch"),
]

EIGHT = [f"Q:{a}+2\nA:" for a in range(8)]
KINDS = {"whole": "FULL_STATE_DICT", "parts": "SHARDED_STATE_DICT"}
CASES = [("whole", False), ("parts", False), ("whole", True)]

# The worker -----------------------------------------------------------------------------------------------------------


def make(folder: Path, *, lora: bool = False, seed: int = 0, **settings: Any) -> Any:
    """A generation serves two updates, so that a checkpoint after an odd step lies between them."""
    from peft import LoraConfig

    steps = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "shuffle_dataset": True}
    torch.manual_seed(seed)
    return trainer(
        folder, "vigor", data=dataset(EIGHT), per_device_train_batch_size=4, ddp_backend="gloo",
        model=tiny_model(0 if lora else seed),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if lora else None,
        **{**steps, **settings},
    )  # fmt: skip


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights, those of all processes put together."""
    return {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}


def result(made: Any) -> dict[str, Any]:
    """What a process ends with."""
    logs = [
        {key: value for key, value in log.items() if not key.startswith(("step_time", "time/", "train_"))}
        for log in made.state.log_history
        if "loss" in log
    ]
    return {"logs": logs, "weights": whole(made.model)}


def resumed(root: Path, rank: int, kind: str, lora: bool) -> dict[str, Any]:
    """A run in one go, and one that goes on from its third step with other weights and random numbers in hand."""
    name = f"{kind}-{lora}"
    first = make(root / name, lora=lora)
    first.train()
    first.save_model(str(root / name / "model"))
    again = make(root / f"{name}-again", lora=lora, seed=7)
    torch.manual_seed(rank)
    again.train(resume_from_checkpoint=str(root / name / "checkpoints" / "checkpoint-3"))
    return {"once": result(first), "again": result(again)}


def ended(root: Path, kind: str) -> None:
    """All steps are done, and the model was never written."""
    made = make(root / f"{kind}-ended", seed=7)
    made.load_weights(str(root / f"{kind}-False" / "checkpoints" / "checkpoint-5"))
    made.save_model(str(root / f"{kind}-ended" / "model"))


def refused(root: Path) -> str:
    """A resume with state dicts of the other kind, or without FSDP."""
    try:
        make(root / "refused").train(resume_from_checkpoint=str(root / "whole-False" / "checkpoints" / "checkpoint-3"))
    except CheckpointError as error:
        return str(error)
    return ""


def killed(root: Path) -> int:
    """The second process is killed while the parts of the third checkpoint are written; returns its exit status.

    Both are forks with a process group of their own, so that what follows finds everything imported.
    """
    from torch.distributed.checkpoint import FileSystemWriter

    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.environ |= {"MASTER_PORT": os.environ["OTHER_PORT"], "TORCHELASTIC_USE_AGENT_STORE": "False"}
    write, calls = FileSystemWriter.write_data, [0]

    def half(self: Any, plan: Any, planner: Any) -> Any:
        calls[0] += 1
        done = write(self, plan, planner)
        if calls[0] == 6 and os.environ["RANK"] == "1":  # model and optimizer of each step
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    FileSystemWriter.write_data = half
    try:
        with parallel.sharding(True, FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT"):
            make(root / "killed").train()
    except CheckpointError as error:
        (root / "told").write_text(str(error))
    finally:
        os._exit(1)


def work(root: Path) -> None:
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {"status": killed(root)}
    for kind, lora in CASES:
        with parallel.sharding(True, FSDP_STATE_DICT_TYPE=KINDS[kind]):
            found[f"{kind}-{lora}"] = resumed(root, rank, kind, lora)
    for kind, named in KINDS.items():
        with parallel.sharding(True, FSDP_STATE_DICT_TYPE=named):
            ended(root, kind)
    with parallel.sharding(True, FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT"):
        found["other kind"] = refused(root)
        found["left"] = str(checkpoint.newest(root / "killed" / "checkpoints")[0])
        again = make(root / "killed", save_strategy="no")
        again.train(resume_from_checkpoint=True)
        found["after the kill"] = result(again)
    found["DDP"] = refused(root)
    torch.save(found, root / f"found-{rank}.pt")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("fsdp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = forked(__file__, root, timeout=300, OTHER_PORT=str(port))
    assert done.returncode == 0, done.stderr[-4000:]
    return root, [torch.load(root / f"found-{rank}.pt", weights_only=True) for rank in (0, 1)]


# The tests ------------------------------------------------------------------------------------------------------------


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("kind", "lora"), CASES)
def test_a_resumed_run_is_the_same_bit_for_bit(ran: Any, kind: str, lora: bool) -> None:
    root, found = ran
    name = f"{kind}-{lora}"
    for each in found:
        once, again = each[name]["once"], each[name]["again"]
        assert equal(once["weights"], again["weights"])
        assert len(once["logs"]) == len(again["logs"]) == 5
        assert once["logs"][3:] == again["logs"][3:]
    for step in (4, 5):
        tables = [table(root / folder, step).to_dict("list") for folder in (name, f"{name}-again")]
        assert repr(tables[0]) == repr(tables[1])


def test_training_changed_the_weights(ran: Any) -> None:
    """Else the test above could not fail."""
    _, found = ran
    trained = found[0]["whole-False"]["once"]["weights"]
    assert not any(torch.equal(p, trained[name]) for name, p in tiny_model().named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_parts_are_in_a_whole_checkpoint(ran: Any, kind: str) -> None:
    root, _ = ran
    path, rejected = checkpoint.newest(root / f"{kind}-False" / "checkpoints")
    assert path is not None
    assert path.name == "checkpoint-5"
    assert rejected == []
    about = checkpoint.about(path)
    assert about["processes"] == 2
    assert about["settings"]["FSDP"] == KINDS[kind]
    files = set(json.loads((path / "manifest.json").read_text("utf-8"))["files"])
    weights = {"pytorch_model_fsdp.bin", "optimizer.bin"}
    parts = {f"{n}/__{r}_0.distcp" for n in ("pytorch_model_fsdp_0", "optimizer_0") for r in (0, 1)}
    assert files >= (weights if kind == "whole" else parts)
    assert files >= {f"{name}_{r}.{end}" for r in (0, 1) for name, end in (("rng_state", "pth"), ("vigor_state", "pt"))}


@pytest.mark.parametrize("folder", ["whole-False", "parts-False", "whole-ended", "parts-ended"])
def test_the_model_is_written_whole(ran: Any, folder: str) -> None:
    """With state dicts in parts too, and by a resume that has only this to do."""
    root, found = ran
    loaded = dict(AutoModelForCausalLM.from_pretrained(root / folder / "model").named_parameters())
    assert equal(found[0]["whole-False"]["once"]["weights"], {name: p.detach() for name, p in loaded.items()})
    assert (root / folder / "model" / "tokenizer.json").is_file()


def test_a_kill_within_a_save_leaves_the_checkpoint_before_it(ran: Any) -> None:
    root, found = ran
    assert [each["status"] for each in found] == [1, -signal.SIGKILL]
    assert "the checkpoint of step 3 could not be written" in (root / "told").read_text()
    assert "Whole before it: checkpoint-1, checkpoint-2." in (root / "told").read_text()
    for each in found:
        assert Path(each["left"]).name == "checkpoint-2"
        assert equal(each["parts-False"]["once"]["weights"], each["after the kill"]["weights"])
        assert each["parts-False"]["once"]["logs"] == each["after the kill"]["logs"]


def test_another_kind_of_checkpoint_is_refused_in_every_process(ran: Any) -> None:
    _, found = ran
    for each in found:
        assert "FSDP: 'FULL_STATE_DICT' → 'SHARDED_STATE_DICT'" in each["other kind"]
        assert "FSDP: 'FULL_STATE_DICT' → None" in each["DDP"]


@pytest.mark.parametrize(("kind", "remedy"), [("whole", "--model_name_or_path"), ("parts", "accelerate merge-weights")])
def test_another_number_of_processes_is_refused(ran: Any, tmp_path: Path, kind: str, remedy: str) -> None:
    root, _ = ran
    made = trainer(tmp_path, tokenizer=lab_tokenizer(), data=dataset(EIGHT), max_steps=5)
    with pytest.raises(CheckpointError, match=rf"(?s)by 2 processes, this run has 1.*with {remedy} .*checkpoint-3"):
        made.train(resume_from_checkpoint=str(root / f"{kind}-False" / "checkpoints" / "checkpoint-3"))


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["HOSTILE"]) / "made"),)


@pytest.mark.parametrize(("content", "why"), [(Hostile(), "it calls (posix|nt).mkdir"), (None, "ran out of input")])
def test_a_description_of_parts_that_runs_code_is_refused(
    content: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTILE", str(tmp_path))
    (tmp_path / "optimizer_0").mkdir()
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(b"" if content is None else pickle.dumps(content))
    with pytest.raises(CheckpointError, match=rf"(?i)optimizer_0/.metadata is no description of a state dict \({why}"):
        refuse_code(tmp_path)
    assert not (tmp_path / "made").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
    leave_process_group()
