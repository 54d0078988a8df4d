"""Commit-marked checkpoints: what is whole is found, what is not is passed over with the reason, at every moment."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_files import files_up_to
from helpers_trainer import same_weights, trainer, weights

from vigor import checkpoint
from vigor.checkpoint import CheckpointError, LockedError, commit, fault, locked, newest, rotate, sync_tree

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def write(root: Path, step: int, text: str = "weights") -> Path:
    """A checkpoint of two files, written and committed as the trainer does."""
    checkpoint.clear(root)
    written = root / checkpoint.WRITING / f"checkpoint-{step}"
    (written / "shard").mkdir(parents=True)
    (written / "model.safetensors").write_text(f"{text} of step {step}")
    (written / "shard" / "0.bin").write_bytes(bytes(range(256)))
    sync_tree(written)
    return commit(root, f"checkpoint-{step}", {"step": step, "processes": 1})


def flip(path: Path) -> None:
    """Changes one byte; size and place stay."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# The files


def test_a_committed_checkpoint_is_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    assert fault(path) is None
    assert newest(tmp_path) == (path, [])
    assert names(tmp_path) == ["checkpoint-3"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["about"] == {"processes": 1, "step": 3} == checkpoint.about(path)
    assert manifest["files"]["shard/0.bin"] == {
        "bytes": 256,
        "sha256": "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880",
    }


DAMAGES: list[tuple[str, Callable[[Path], Any]]] = [
    ("it has no COMMITTED", lambda path: (path / "COMMITTED").unlink()),
    ("it has no manifest.json", lambda path: (path / "manifest.json").unlink()),
    ("manifest.json is not the one", lambda path: (path / "manifest.json").write_text("{}")),
    ("manifest.json is not the one", lambda path: (path / "COMMITTED").write_bytes(b"\xff\x00")),
    ("shard/0.bin is missing", lambda path: (path / "shard" / "0.bin").unlink()),
    ("0.bin has 255 bytes instead of 256", lambda path: os.truncate(path / "shard" / "0.bin", 255)),
    ("0.bin has 0 bytes", lambda path: os.truncate(path / "shard" / "0.bin", 0)),
    (r"model.safetensors has changed since.*SHA-256", lambda path: flip(path / "model.safetensors")),
]


@pytest.mark.parametrize(("why", "damage"), DAMAGES, ids=[str(i) for i in range(len(DAMAGES))])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(
    tmp_path: Path, why: str, damage: Callable[[Path], Any]
) -> None:
    good, bad = write(tmp_path, 9), write(tmp_path, 10)
    damage(bad)
    path, (rejected,) = newest(tmp_path)
    assert path == good
    assert rejected.path == bad
    assert re.search(why, rejected.why)
    assert str(rejected).startswith(f"{bad} is not used: ")


def test_folders_in_the_making_and_strangers_are_no_checkpoints(tmp_path: Path) -> None:
    good = write(tmp_path, 2)
    for name in (".writing/checkpoint-7", "checkpoint-last", "checkpoint-", ".deleting-checkpoint-8"):
        shutil.copytree(good, tmp_path / name)
    assert newest(tmp_path) == (good, [])
    assert newest(tmp_path / "nowhere") == (None, [])


def test_a_kill_at_any_call_to_the_file_system_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """A child commits step 2 beside step 1 and is ended, without clean-up, before its n-th such call, for each n."""
    program = """
        import os, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[3])
        from test_checkpoint import write
        left = int(sys.argv[2])
        def counted(real):
            def call(*args, **kwargs):
                global left
                left -= 1
                if left < 0:
                    os._exit(9)
                return real(*args, **kwargs)
            return call
        import io, shutil
        for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"),
                             (os, "rmdir"), (io, "open")):
            setattr(module, name, counted(getattr(module, name)))
        write(Path(sys.argv[1]), 2, sys.argv[4])
    """
    code = "\n".join(line[8:] for line in program.splitlines())
    root = tmp_path / "root"
    committed, kills = [], 0
    for again in (False, True):  # the second time a whole checkpoint of the same step is replaced
        for n in range(1000):
            shutil.rmtree(root, ignore_errors=True)
            write(root, 1)
            if again:
                write(root, 2, "old")
            done = fork(code, [str(root), str(n), str(Path(__file__).parent), "new"])
            checkpoint.clear(root)
            path, rejected = newest(root)
            assert path is not None
            assert len(rejected) <= 1
            text = (path / "model.safetensors").read_text()
            assert text in (["old of step 2", "new of step 2"] if again else ["weights of step 1", "new of step 2"])
            assert {name for name in names(root) if name.startswith(".")} == set()
            committed.append(text.startswith("new"))
            kills += done == 9
            if done == 0:
                assert committed[-1]
                break
    assert kills > 20
    assert not all(committed)


def fork(code: str, argv: list[str]) -> int:
    """Runs a program in a fork of this process, which costs no start of Python; returns its exit status."""
    child = os.fork()
    if child == 0:
        try:
            sys.argv = ["", *argv]
            exec(compile(code, "child", "exec"), {"__name__": "child"})
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_retention_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write(tmp_path, step)
    assert rotate(tmp_path, None, None) == []
    assert [path.name for path in rotate(tmp_path, 2, "checkpoint-1")] == ["checkpoint-2"]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-10", "checkpoint-3"]


def test_retention_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / "COMMITTED").unlink()
    assert rotate(tmp_path, 1, None) == []
    assert newest(tmp_path)[0] == tmp_path / "checkpoint-1"


# Disk full


@pytest.mark.parametrize("size", [500, 3000, 30_000, 100_000])
def test_a_write_that_fails_stops_the_run_and_leaves_the_checkpoint_before(tmp_path: Path, size: int) -> None:
    """The limit strikes the configuration, the tokenizer, the weights and the optimizer, one after the other."""
    made = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, log_completions=False)
    real, calls = made._checkpoints.save, []

    def save(*args: Any) -> None:
        calls.append(args)
        with files_up_to(size) if len(calls) == 2 else files_up_to(resource.RLIM_INFINITY):
            real(*args)

    made._checkpoints.save = save  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"of step 2 could not be.*Whole before it: checkpoint-1\..*--resume"):
        made.train()
    root = tmp_path / "checkpoints"
    assert names(root) == ["checkpoint-1"]
    assert fault(root / "checkpoint-1") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_leaves_the_checkpoint_before_and_gives_its_space_back(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(small)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        made = trainer(small, max_steps=4, save_strategy="steps", save_steps=1, log_completions=False)
        with pytest.raises(CheckpointError, match=r"could not be written.*MiB are free"):
            made.train()
        path, rejected = newest(small / "checkpoints")
        assert path is not None
        assert rejected == []
        assert checkpoint.step_of(path) == made.state.global_step - 1
        assert shutil.disk_usage(small).free > 0
        for older in (small / "checkpoints").glob("checkpoint-*"):
            if older != path:
                shutil.rmtree(older)
        again = trainer(small, max_steps=4, save_strategy="no", log_completions=False)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 4
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# The trainer


def test_what_a_trainer_saves_is_whole_and_kept_to_the_limit(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    made.train()
    root = tmp_path / "checkpoints"
    assert names(root) == ["checkpoint-3", "checkpoint-4"]
    for path in root.iterdir():
        assert fault(path) is None
        listed = json.loads((path / "manifest.json").read_text())["files"]
        present = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        assert present == {*listed, "manifest.json", "COMMITTED"}
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "vigor_state_0.pt"} <= present
        for name in ("optimizer.pt", "scheduler.pt", "vigor_state_0.pt"):
            torch.load(path / name, weights_only=True)


def test_the_best_checkpoint_is_recorded_where_it_lies_and_kept(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    losses = iter([1.0, 4.0, 3.0, 2.0])

    def evaluated(*_: Any, **__: Any) -> None:
        made._determine_best_metric({"eval_loss": next(losses)}, None)

    made.args.metric_for_best_model, made.args.greater_is_better = "loss", False
    real = made._save_checkpoint
    made._save_checkpoint = lambda *args: (evaluated(), real(*args))[1]  # type: ignore[method-assign, func-returns-value]
    made.train()
    root = tmp_path / "checkpoints"
    assert names(root) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    for name in names(root):
        state = json.loads((root / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(root / "checkpoint-1")


def test_a_trainer_resumes_from_the_newest_whole_checkpoint_and_says_what_it_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    first = trainer(tmp_path, **settings)
    first.train()
    flip(tmp_path / "checkpoints" / "checkpoint-3" / "optimizer.pt")
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is not used: optimizer.pt has changed" in capsys.readouterr().out
    assert same_weights(weights(first.model), weights(again.model))
    assert fault(tmp_path / "checkpoints" / "checkpoint-3") is None


def test_a_named_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **settings).train()
    path = tmp_path / "checkpoints" / "checkpoint-1"
    flip(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be resumed from: model.safetensors has changed"):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=str(path))
    with pytest.raises(CheckpointError, match="holds no checkpoint to resume from"):
        trainer(tmp_path / "new", **settings).train(resume_from_checkpoint=True)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["VIGOR_TEST_EVIL"],)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "vigor_state_0.pt"])
def test_nothing_in_a_checkpoint_is_unpickled(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where marker and manifest have been made to fit."""
    monkeypatch.setenv("VIGOR_TEST_EVIL", str(tmp_path / "evil"))
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **settings).train()
    root = tmp_path / "checkpoints"
    about = checkpoint.about(root / "checkpoint-1")
    staged = root / checkpoint.WRITING / "checkpoint-1"
    staged.parent.mkdir()
    os.rename(root / "checkpoint-1", staged)
    for own in ("manifest.json", "COMMITTED"):
        (staged / own).unlink()
    torch.save(Evil(), staged / name)
    path = commit(root, "checkpoint-1", about)
    with pytest.raises(Exception, match=r"[Ww]eights_only|[Uu]npickl"):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=str(path))
    assert not (tmp_path / "evil").exists()


# The lock


def test_a_folder_has_one_writer_and_the_lock_dies_with_it(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from vigor.checkpoint import locked\n" + (
        "with locked(Path(sys.argv[1]), 'run.lock'): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=rf"process {holder.pid} on .*--output_dir"), locked(tmp_path, "run.lock"):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert holder.stdin is not None
    holder.stdin.close()
    with locked(tmp_path, "run.lock"):
        assert f"process {os.getpid()} " in (tmp_path / "run.lock").read_text()
