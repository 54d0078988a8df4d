"""Several processes from one command: `vigor train --accelerate_config fsdp2 --num_processes 8 …`.

Configurations and their names are TRL's (`trl/accelerate_configs/*.yaml`), processes are accelerate's. Each runs
`python -m vigor train …`, as under `accelerate launch -m vigor train …` or `torchrun -m vigor train …`. Ours are the
checks before: everything that a run would refuse is refused once, in one process, before any other starts.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vigor.reading import ReadError, read_settings

FLAGS = (
    "accelerate_config", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
    "gpu_ids", "mixed_precision", "rdzv_backend", "rdzv_conf", "num_cpu_threads_per_process", "max_restarts",
)  # fmt: skip
"""What `vigor train` hands to accelerate, each with a value; anything else stands in a configuration file."""
_STARTS = ("accelerate_config", "num_processes", "num_machines")


@dataclass(frozen=True)
class Launch:
    """Processes to start, and what each of them runs."""

    config: Path
    processes: int
    """On all machines."""
    machines: int
    zero_stage: int
    """Of DeepSpeed; 0 without."""
    shards: bool
    """Whether FSDP is to shard the parameters."""
    flags: list[str]
    """For accelerate."""
    argv: list[str]
    """For `vigor train` in each process."""


def wants_launch(argv: Sequence[str]) -> bool:
    """Whether these arguments of `vigor train` ask for processes to be started."""
    return any(arg.split("=")[0] in {f"--{name}" for name in _STARTS} for arg in argv)


def read_launch(argv: Sequence[str]) -> Launch:
    """Takes the flags of a launch out of the arguments, and checks them.

    Raises:
        ValueError: a flag without a value or with a senseless one, an unknown configuration, DeepSpeed asked for and
            not installed, or this process is one of several already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"--accelerate_config and --num_processes start processes, but this is one of {os.environ['WORLD_SIZE']} "
            "already. Leave them out under accelerate launch or torchrun."
        )
    given, rest = _split(argv)
    name = given.pop("accelerate_config", "multi_gpu")
    path = config_path(name)
    settings = _settings(path)
    processes = _count("num_processes", given.get("num_processes", settings.get("num_processes", 1)))
    machines = _count("num_machines", given.get("num_machines", settings.get("num_machines", 1)))
    if processes % machines:
        raise ValueError(f"--num_processes {processes} counts those of all --num_machines {machines}: {processes} / "
                         f"{machines} is no whole number.")  # fmt: skip
    stage = 0
    if settings.get("distributed_type") == "DEEPSPEED":
        stage = int((settings.get("deepspeed_config") or {}).get("zero_stage", 2))
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"--accelerate_config {name} needs DeepSpeed, which is not installed: pip install "
                "'vigor-rl[deepspeed]'. FSDP2 shards as much and needs nothing more: --accelerate_config fsdp2."
            )
    flags = ["--config_file", str(path), *(part for key, value in given.items() for part in (f"--{key}", value))]
    return Launch(path, processes, machines, stage, settings.get("distributed_type") == "FSDP", flags, rest)


def config_names() -> list[str]:
    """The configurations that TRL brings, by name."""
    return sorted(path.stem for path in _trl_configs().glob("*.yaml"))


def config_path(name: str) -> Path:
    """The file of a configuration: one of TRL's by name, or the user's.

    Raises:
        ValueError: neither.
    """
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        return Path(resolve_accelerate_config_argument(["--accelerate_config", name])[1])
    except ValueError as error:
        raise ValueError(
            f"--accelerate_config {name}: no such file, and none of TRL's configurations: {', '.join(config_names())}."
        ) from error


def launch(argv: Sequence[str], check: Callable[[Launch], int]) -> int:
    """Checks the run as one of so many processes, starts them, and waits.

    Args:
        argv: of `vigor train`.
        check: what one process of the run would say before it loads the model, as an exit status; called in a process
            of its own, so that this one stays free of the run's libraries and of the accelerators.

    Returns the exit status: as of `vigor train`; of several processes that fail, the first one's.

    Raises:
        ValueError: see `read_launch`.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    asked = read_launch(argv)
    checked = multiprocessing.get_context("spawn").Process(target=_check, args=(check, asked))
    checked.start()
    checked.join()
    if checked.exitcode or "--dry_run" in asked.argv:
        return checked.exitcode or 0
    # TRL's own launcher starts scripts of its folder only; these two functions are all that it does.
    args = launch_command_parser().parse_args([*asked.flags, "--module", "vigor", "train", *asked.argv])
    try:
        launch_command(args)
    except ChildFailedError as error:
        code = min(error.failures.values(), key=lambda failure: failure.timestamp).exitcode
        return code if code > 0 else 128 - code
    return 0


def _check(check: Callable[[Launch], int], asked: Launch) -> None:
    raise SystemExit(check(asked))


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    given: dict[str, str] = {}
    rest: list[str] = []
    waiting: str | None = None
    for arg in argv:
        flag, equals, value = arg.partition("=")
        if waiting is not None:
            given[waiting], waiting = arg, None
        elif flag.startswith("--") and flag[2:].replace("-", "_") in FLAGS:
            waiting = flag[2:].replace("-", "_")
            if equals:
                given[waiting], waiting = value, None
        else:
            rest.append(arg)
    if waiting is not None:
        raise ValueError(f"--{waiting} needs a value.")
    return given, rest


def _settings(path: Path) -> dict[str, Any]:
    try:
        return read_settings(path)
    except (OSError, ReadError) as error:
        raise ValueError(f"--accelerate_config {path}, such as `accelerate config` writes: {error}") from error


def _count(name: str, value: Any) -> int:
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise ValueError(f"--{name} {value}: must be a whole number of at least 1.")
    return count


def _trl_configs() -> Path:
    import trl

    assert trl.__file__ is not None
    return Path(trl.__file__).parent / "accelerate_configs"
