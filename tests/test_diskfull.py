"""A full disk: who writes what, what is said, what is left behind; a part of the campaign of benchmarks/diskfull.py."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers_files import files_up_to
from helpers_trainer import lab_tokenizer, same_weights, trainer, weights
from safetensors.torch import save_file
from test_checkpoint import write

from vigor import checkpoint
from vigor.checkpoint import CheckpointError, locked, newest, write_durably
from vigor.commands.train import _save_model
from vigor.disk import REFUSALS, FullError, free_below, naming, refuse_full
from vigor.guard import NonFiniteError
from vigor.report import html
from vigor.runfolder import RunFolder, RunFolderError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


# Errors of every library that writes


def _plain(path: Path) -> None:
    with path.open("w") as stream:
        stream.write("x" * 10_000)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "Python": _plain,
    "torch": lambda path: torch.save(torch.zeros(10_000), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(10_000)}, path),
    "pyarrow": lambda path: pd.DataFrame({"a": torch.rand(10_000).numpy()}).to_parquet(path),
    "tokenizers": lambda path: lab_tokenizer().backend_tokenizer.save(str(path)),
    "durably": lambda path: write_durably(path, "x" * 10_000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_write_names_its_file_whichever_library_wrote(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match="file") as caught, naming(path), files_up_to(1000):
        WRITERS[name](path)
    assert caught.value.errno == (errno.EIO if name == "torch" else errno.EFBIG)
    assert caught.value.errno in REFUSALS
    assert caught.value.filename == str(path)
    assert name != "torch" or "a write failed (unexpected pos" in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("os error"), RuntimeError("CUDA out of memory"), OSError("no number")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming("file"):
        raise error
    assert caught.value is error


def test_an_error_that_names_a_file_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, naming("another"):
        (tmp_path / "missing").read_bytes()
    assert caught.value.filename == str(tmp_path / "missing")


def test_a_file_replaced_in_vain_is_the_old_one_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", "old")
    with pytest.raises(OSError, match="file"), files_up_to(1000):
        write_durably(tmp_path / "file", b"new" * 1000)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_the_lock_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"run\.lock"), files_up_to(0), locked(tmp_path, "run.lock"):
        pass


# What is left behind


def test_what_a_checkpoint_was_to_replace_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2, "old")
    real = checkpoint.write_durably

    def full(path: Path, text: str) -> None:
        if path.name == checkpoint.MARKER and path.parent.parent == tmp_path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, text)

    monkeypatch.setattr(checkpoint, "write_durably", full)
    with pytest.raises(OSError, match="COMMITTED"):
        write(tmp_path, 2, "new")
    checkpoint.discard(tmp_path, "checkpoint-2")
    assert (tmp_path / "checkpoint-2" / "model.safetensors").read_text() == "old of step 2"
    assert newest(tmp_path) == (tmp_path / "checkpoint-2", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_an_older_checkpoint_that_cannot_be_deleted_is_no_failure_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rotate(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint-1")

    monkeypatch.setattr(checkpoint, "rotate", rotate)
    made = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1)
    made.train()
    assert checkpoint.fault(tmp_path / "checkpoints" / "checkpoint-2") is None
    assert "An older checkpoint could not be deleted" in capsys.readouterr().out


def test_before_the_first_checkpoint_the_run_is_to_be_started_again(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, log_completions=False)
    real = made._checkpoints.save

    def save(*args: Any) -> None:
        with files_up_to(3000):
            real(*args)

    made._checkpoints.save = save  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"Whole before it: none\. .*start again with a new --output_dir\.$"):
        made.train()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_model_is_whole_or_not_there(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run")
    place = tmp_path / "model"
    with pytest.raises(OSError, match="model"), files_up_to(30_000):  # within the weights
        _save_model(made, place)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    _save_model(made, place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(OSError, match="model"), files_up_to(30_000):
        _save_model(made, place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    again = type(made.model).from_pretrained(place)
    assert same_weights(weights(made.model), weights(again))


def test_a_run_that_goes_on_after_its_end_is_not_finished(tmp_path: Path) -> None:
    """Else a failure before its new end would be taken for that end, and --resume refused."""
    folder = RunFolder(tmp_path)
    for name in ("results.json", "report.html"):
        (tmp_path / name).write_text("{}")
    assert folder.finished
    folder.start({})
    assert not folder.finished


def test_the_picture_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        metrics, rewards = [{"step": 1, "entropy": 1.0}], ["vigor"]

    monkeypatch.setattr(html, "read_runs", lambda _: [Run()])
    (tmp_path / "curves.png").write_bytes(b"old")
    with pytest.raises(OSError, match=r"curves\.png"), files_up_to(1000):
        html.write_report(RunFolder(tmp_path))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("curves.png", b"old")]


# The record of the last step


def test_the_last_step_is_logged_before_its_checkpoint_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is logged after the last checkpoint, no resumed run would write again."""
    tables: list[str] = []
    real = pd.DataFrame.to_parquet

    def to_parquet(self: pd.DataFrame, path: str) -> None:
        tables.append(Path(path).name)
        real(self, path)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", to_parquet)
    made = trainer(tmp_path, max_steps=3, logging_steps=2, save_strategy="steps", save_steps=3)
    made.train()
    assert tables == ["completions_00002.parquet", "completions_00003.parquet"]
    assert [record["step"] for record in made.state.log_history if "reward" in record] == [2, 3]
    state = (tmp_path / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text()
    assert '"step": 3' in state
    assert made.log_completions


@pytest.mark.parametrize("name", ["completions/completions_00001.parquet", "tokens/tokens_00001.parquet"])
def test_a_table_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    made = trainer(tmp_path)
    if "completions" in name:
        made.remove_callback(made._tokens)
    with pytest.raises(OSError, match=re.escape(name)) as caught, files_up_to(1000):
        made.train()
    assert caught.value.errno == errno.EFBIG


# The guard's dump is an extra


def poisoned(folder: Path, **changes: Any) -> Any:
    """A run whose second loss is NaN, and whose dumps end within the weights."""
    made = trainer(folder, max_steps=3, **changes)
    real, dump = made._guard.saw, made._guard._dump

    def saw(inputs: Any, loss: torch.Tensor) -> None:
        real(inputs, loss * (math.nan if made.state.global_step == 1 else 1.0))

    def short(*args: Any) -> None:
        with files_up_to(30_000):
            dump(*args)

    made._guard.saw, made._guard._dump = saw, short
    return made


def test_a_dump_that_cannot_be_written_is_said_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = poisoned(tmp_path, max_skipped_updates=1)
    made.train()
    assert made.state.global_step == 3
    said = capsys.readouterr().out
    assert re.search(r"step 2: .*nan.*could not be written to .*dumps/step-2.*File too large.*MiB are free", said)
    assert "replay" not in said
    assert list((tmp_path / "dumps").iterdir()) == []


def test_where_the_guard_stops_the_run_the_reason_stays_first(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"^step 2: .*nan.*could not be written to .*lower learning_rate"):
        poisoned(tmp_path).train()


# Before the run


def test_too_little_room_for_the_model_is_refused_with_the_numbers(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    refuse_full(tmp_path, 1, "the weights in model/")
    with pytest.raises(FullError, match=r"MiB of free space, and model/ and one checkpoint take at least .* MiB"):
        refuse_full(tmp_path, 2 * free + 2**30, "model/ and one checkpoint")
    assert re.fullmatch(r"[\d,]+ MiB are free there", free_below(tmp_path / "not" / "there"))


def test_a_folder_in_which_nothing_was_written_is_free_and_one_table_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "completions").mkdir()
    (tmp_path / "run.lock").touch()
    RunFolder.open(tmp_path)
    (tmp_path / "completions" / "completions_00001.parquet").touch()
    with pytest.raises(RunFolderError, match="is not empty"):
        RunFolder.open(tmp_path)


# The command


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_standard_output_is_said_without_a_traceback() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vigor", "recipes"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "vigor: standard output cannot be written: No space left on device.\n"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the failing calls are compiled with gcc")
def test_a_run_whose_disk_is_full_stops_clearly_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """At metrics, marker and model."""
    places = r"write metrics\.jsonl|rename .*/COMMITTED|create model/config"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "diskfull.py", "--ways", "stays", "--repeated", "1", "--what", places, "--last"],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| every call from the N-th on | 3 | 3 | 0 | 0 |" in done.stdout, done.stdout
