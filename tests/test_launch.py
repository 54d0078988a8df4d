"""`vigor train --accelerate_config … --num_processes N`: what is refused before anything starts, and a run of two."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
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
            "--main_process_ip=node0",
            "--bf16",
            "False",
        ]
    )
    assert asked.argv == ["--config", "lab", "--bf16", "False"]
    ours = ["--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "node0"]
    assert asked.flags == ["--config_file", str(mine), *ours]
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
        (["--num_processes", "4", "--num_machines", "2"], r"--main_process_ip.*; --machine_rank, 0 to 1"),
        (["--num_processes=4", "--num_machines=2", "--machine_rank=2", "--main_process_ip=a"], r"rank 2: .* of 0 to 1"),
        (["--accelerate_config", "single_gpu", "--num_processes", "2"], "starts one process and not 2"),
    ],
)
def test_senseless_launches_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_launch(argv)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp_size": 2, "dp_shard_size": 2}, r"tensor parallelism \(tp_size = 2\).*Let FSDP2 shard instead"),
        ({"cp_size": 4}, r"context parallelism \(cp_size = 4\)"),
        ({"sp_size": 4}, r"sequence parallelism \(sp_size = 4\)"),
        ({"dp_replicate_size": 2, "dp_shard_size": 4}, r"2 × dp_shard_size 4 = 8 processes, and 4 are started"),
        ({"dp_replicate_size": 4}, r"with FSDP a dp_shard_size of at least 2"),
        ({"tp_size": "two"}, r"parallelism_config_tp_size two: must be a whole number"),
    ],
)
def test_layers_and_rows_in_parts_are_refused(sizes: dict[str, object], message: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    asked = "".join(f"  parallelism_config_{name}: {size}\n" for name, size in sizes.items())
    mine.write_text(f"distributed_type: FSDP\nnum_processes: 4\nparallelism_config:\n{asked}")
    with pytest.raises(ValueError, match=message):
        read_launch(["--accelerate_config", str(mine)])


def test_replicas_of_shards_and_megatron(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    sizes = "parallelism_config:\n  parallelism_config_dp_replicate_size: 2\n  parallelism_config_dp_shard_size: 2\n"
    mine.write_text("distributed_type: FSDP\nnum_processes: 4\n" + sizes)
    assert read_launch(["--accelerate_config", str(mine)]).shards
    mine.write_text("distributed_type: MEGATRON_LM\nnum_processes: 4\n")
    with pytest.raises(ValueError, match=r"asks for Megatron-LM"):
        read_launch(["--accelerate_config", str(mine)])


def test_machines_without_a_common_folder_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    machines = ["--num_processes=4", "--num_machines=2", "--machine_rank=0", "--main_process_ip=node0"]
    assert train([*machines, "--config", "lab"]) == 2
    assert "--output_dir one folder that all of them see" in capsys.readouterr().err


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
        (2, {"reward_funcs": "head_grad_norm"}, 3, False, "ZeRO-3 must not"),
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


def test_a_resume_by_another_number_of_processes_is_refused_before_any_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    assert train(flags(tmp_path, **changes)) == 0
    monkeypatch.setattr(VigorConfig, "planned_processes", None)
    again = [*flags(tmp_path, **changes, max_steps=2), "--resume"]
    assert preflight(Launch(tmp_path / "c.yaml", 2, 1, 0, False, [], again)) == 2
    assert re.search(r"written by 1 processes, this run has\s+2", capsys.readouterr().err)
    assert preflight(Launch(tmp_path / "c.yaml", 1, 1, 0, False, [], again)) == 0


# Commands that run ----------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "parallel.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


def replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in text, f"{old!r} is no more in the example of docs/parallel.md"
        text = text.replace(old, new)
    return text


def cpus(tmp_path: Path) -> Path:
    """What accelerate starts two processes without a GPU by."""
    config = tmp_path / "cpus.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: 'no'\nuse_cpu: true\n")
    return config


def two_have_run(tmp_path: Path, script: str, before: str = "") -> None:
    """Runs a shell script with this Python's commands first in the path; one run of two processes must come of it."""
    path = f"{before}{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["TMPDIR"] = str(tmp_path)  # torchrun leaves a folder there
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "environment.json").read_text("utf-8"))
    assert record["processes"] == 2
    assert done.stdout.count("step 1/1") == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_two_processes_run_from_one_command(tmp_path: Path) -> None:
    two_have_run(tmp_path, shlex.join(["vigor", "train", "--accelerate_config", str(cpus(tmp_path)), *flags(tmp_path)]))


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["accelerate launch", "torchrun"])
def test_the_documented_launchers_start_two_processes(tmp_path: Path, starter: str) -> None:
    line = next(line for block in BLOCKS for line in block.splitlines() if line.startswith(starter))
    changes = {"--config … --output_dir runs/a": shlex.join(flags(tmp_path))}
    if starter == "torchrun":
        changes["--nproc_per_node 8"] = f"--nproc_per_node 2 --master_port {free_port()}"
    else:
        changes["mine.yaml"] = f"{cpus(tmp_path)} --main_process_port {free_port()}"
    two_have_run(tmp_path, replaced(line, changes))


@pytest.mark.slow
def test_the_slurm_example_runs_on_two_machines(tmp_path: Path) -> None:
    """Two launchers on this machine, each taking itself for one of two: srun and scontrol are stood in for."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(
        '#!/bin/bash\n[ "$*" = "show hostnames here,there" ] && printf "127.0.0.1\\nthere\\n"'
    )
    (tools / "srun").write_text(
        '#!/bin/bash\nSLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & second=$!\nwait $first && wait $second'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    changes = {
        "fsdp2 --num_processes 16": f"{cpus(tmp_path)} --num_processes 2",
        "--main_process_port 29500": f"--main_process_port {free_port()}",
        "--config my.yaml --output_dir /shared/runs/a": " ".join(flags(tmp_path)),
    }
    example = replaced(next(block for block in BLOCKS if "srun" in block), changes)
    two_have_run(tmp_path, f"export SLURM_JOB_NODELIST=here,there\n{example}", f"{tools}:")
