"""`vigor train --accelerate_config … --num_processes N`: what is refused before anything starts, and a run of two."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_trainer import save_tiny, write_jsonl

from vigor.commands.train import preflight, train
from vigor.config import VigorConfig
from vigor.launch import Launch, config_names, config_path, read_launch, wants_launch


def test_trls_configurations_are_known_by_their_names() -> None:
    assert {"multi_gpu", "fsdp2", "zero2", "zero3"} <= set(config_names())
    assert all(config_path(name).is_file() for name in config_names())


def test_only_the_flags_of_a_launch_go_to_accelerate(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("distributed_type: MULTI_GPU\nnum_processes: 6\nuse_cpu: true\n")
    asked = read_launch(
        [
            "--config",
            "lab",
            f"--accelerate_config={mine}",
            "--num_machines",
            "2",
            "--machine-rank",
            "1",
            "--bf16",
            "False",
        ]
    )
    assert asked.argv == ["--config", "lab", "--bf16", "False"]
    assert asked.flags == ["--config_file", str(mine), "--num_machines", "2", "--machine_rank", "1"]
    assert (asked.processes, asked.machines, asked.zero_stage, asked.shards) == (6, 2, 0, False)
    assert read_launch(["--accelerate_config", "fsdp2", "--num_processes", "4"]).shards
    assert read_launch(["--num_processes", "3"]).config == config_path("multi_gpu")


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [(["--num_processes=2"], True), (["--accelerate_config", "fsdp2"], True), (["--config", "lab"], False)],
)
def test_processes_are_started_only_when_asked_for(argv: list[str], wanted: bool) -> None:
    assert wants_launch(argv) is wanted


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--accelerate_config", "fsdp3"], r"fsdp3: no such file.*fsdp1, fsdp2, multi_gpu"),
        (["--num_processes", "0"], "num_processes 0: must be a whole number of at least 1"),
        (["--num_processes", "two"], "num_processes two: must be a whole number"),
        (["--num_processes"], "--num_processes needs a value"),
        (["--num_processes", "3", "--num_machines", "2"], "3 / 2 is no whole number"),
    ],
)
def test_senseless_launches_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_launch(argv)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_is_asked_for_where_it_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ValueError, match=r"pip install 'vigor-rl\[deepspeed\]'"):
        read_launch(["--accelerate_config", name])


def test_a_process_among_several_starts_no_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train(["--num_processes", "2", "--output_dir", "run"]) == 2
    assert "this is one of 4 already" in capsys.readouterr().err


def flags(tmp_path: Path, **changes: object) -> list[str]:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Q:{a}+2\nA:", "answer": "1"} for a in range(8)])
    settings = {
        "prompts": prompts, "model_name_or_path": save_tiny(tmp_path / "model"), "output_dir": tmp_path / "run",
        "max_steps": 1, "num_generations": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "max_completion_length": 8, "save_strategy": "no", "gradient_checkpointing": False, "use_cpu": True, **changes,
    }  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("processes", "changes", "stage", "shards", "message"),
    [
        (3, {}, 0, False, "3 processes × 2 rows"),
        (2, {}, 3, False, "DeepSpeed ZeRO-3 partitions"),
        (2, {}, 0, True, "accelerators only"),
    ],
)
def test_the_run_is_checked_as_one_of_its_processes(
    processes: int,
    changes: dict[str, object],
    stage: int,
    shards: bool,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(VigorConfig, "planned_processes", None)  # which the check sets, elsewhere in its own process
    asked = Launch(tmp_path / "c.yaml", processes, 1, stage, shards, [], flags(tmp_path, **changes))
    assert preflight(asked) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "run").exists()


def test_two_processes_run_from_one_command(tmp_path: Path) -> None:
    config = tmp_path / "cpus.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: 'no'\nuse_cpu: true\n")
    command = [sys.executable, "-m", "vigor", "train", "--accelerate_config", str(config), *flags(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "environment.json").read_text("utf-8"))
    assert record["processes"] == 2
    assert done.stdout.count("step 1/1") == 1
