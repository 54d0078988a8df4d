"""Signals: the first ends the run after its step, saved and resumable; the second, or one outside training, at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_trainer import PROMPTS, save_tiny, trainer, write_jsonl
from transformers import TrainerCallback

from vigor import checkpoint
from vigor.cli import main
from vigor.interrupt import SIGNALS, Interrupt, exit_status
from vigor.runfolder import RunFolder

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("undrawn")]


class Send(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_step_is_finished_and_saved(tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(tmp_path, max_steps=5)
    interrupt = Interrupt(made)
    made.add_callback(interrupt)
    made.add_callback(Send(number, 2))
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with interrupt.catching():
        made.train()
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert interrupt.stopped_by == number
    assert made.state.global_step == 2
    path, rejected = checkpoint.newest(tmp_path / "checkpoints")
    assert path == tmp_path / "checkpoints" / "checkpoint-2"
    assert rejected == []
    assert f"{signal.Signals(number).name}: finishing this optimizer step, about" in capsys.readouterr().err


def test_without_a_signal_nothing_stops(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=2)
    interrupt = Interrupt(made)
    made.add_callback(interrupt)
    with interrupt.catching():
        made.train()
    assert interrupt.stopped_by is None
    assert made.state.global_step == 2
    assert not (tmp_path / "checkpoints").exists()


def test_another_thread_leaves_the_handlers_alone(tmp_path: Path) -> None:
    interrupt, failures = Interrupt(trainer(tmp_path)), []

    def work() -> None:
        try:
            with interrupt.catching():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_the_second_signal_is_the_kernels_affair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupt = Interrupt(trainer(tmp_path))
    with interrupt.catching():
        os.kill(os.getpid(), signal.SIGTERM)
        while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            time.sleep(0.001)
        assert [signal.getsignal(each) for each in SIGNALS] == [signal.SIG_DFL, signal.SIG_DFL]


def test_exit_statuses_are_those_of_shells() -> None:
    assert exit_status(signal.SIGTERM) == 143
    assert exit_status(signal.SIGINT) == 130


# The command


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("settings")
    settings = {
        "prompts": str(write_jsonl(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])),
        "model_name_or_path": str(save_tiny(folder / "model")),
        "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 8, "learning_rate": 1e-3,
        "max_steps": 400, "save_strategy": "no", "use_cpu": True, "gradient_checkpointing": False,
    }  # fmt: skip
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["train", "--config", str(path)]


def start(argv: list[str], run: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, up to its first steps."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "vigor", *argv, "--output_dir", str(run)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(run.parent)},
    )  # fmt: skip
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.01)
    return process


def test_the_command_says_how_it_ended_and_goes_on(argv: list[str], tmp_path: Path) -> None:
    process = start(argv, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    path, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert path is not None
    step = checkpoint.step_of(path)
    assert f"Stopped after step {step}, which is saved. Continue with --resume" in out
    assert not (tmp_path / "run" / "model").exists()
    assert main([*argv, "--output_dir", str(tmp_path / "run"), "--resume", "--max_steps", str(step + 2)]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    steps = [record["step"] for record in RunFolder(tmp_path / "run").read_metrics()]
    assert steps == list(range(1, step + 3))


def test_a_second_signal_ends_the_command_at_once(argv: list[str], tmp_path: Path) -> None:
    process = start(argv, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("SIGINT: finishing"):
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 130)
    path, rejected = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert rejected == []
    assert path is None or checkpoint.fault(path) is None
