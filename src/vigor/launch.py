"""Several processes from one command: `vigor train --accelerate_config fsdp2 --num_processes 8 …`.

Configurations and their names are TRL's (`trl/accelerate_configs/*.yaml`), processes are accelerate's. Each runs
`python -m vigor train …`, as under `accelerate launch -m vigor train …` or `torchrun -m vigor train …`. Ours are the
checks before: everything that a run would refuse is refused once, in one process, before any other starts.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vigor.reading import ReadError, read_json, read_settings

FLAGS = (
    "accelerate_config", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
    "gpu_ids", "mixed_precision", "rdzv_backend", "rdzv_conf", "num_cpu_threads_per_process", "max_restarts",
)  # fmt: skip
"""What `vigor train` hands to accelerate, each with a value; anything else stands in a configuration file."""
_STARTS = ("accelerate_config", "num_processes", "num_machines")
_SPLITS = {"tp_size": "tensor parallelism", "cp_size": "context parallelism", "sp_size": "sequence parallelism"}
_DEEPSPEED_SPLITS = {
    ("tensor_parallel", "autotp_size"): "tensor parallelism",
    ("expert_parallel", "autoep_size"): "expert parallelism",
    ("sequence_parallel_size",): "sequence parallelism",
}
_SIZES = ("dp_replicate_size", "dp_shard_size", *_SPLITS)
_PREFIX = "parallelism_config_"


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
    precision: str = "no"
    """What accelerate has the model compute in: "no" (float32), "bf16", "fp16" or "fp8"."""


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
    kind = settings.get("distributed_type", "NO")
    if processes > 1 and (kind == "NO" or (kind == "MULTI_CPU" and not settings.get("mpirun_config"))):
        raise ValueError(
            f"--accelerate_config {name} has distributed_type {kind}, with which accelerate starts one process and not "
            f"{processes}. Use multi_gpu; on CPUs a file with distributed_type: MULTI_GPU and use_cpu: true."
        )
    if machines > 1:
        _check_machines({**settings, **given}, machines, named="machine_rank" in given or name not in config_names())
    given_sizes = settings.get("parallelism_config") or {}
    sizes = {size: _count(_PREFIX + size, given_sizes.get(_PREFIX + size, 1)) for size in _SIZES}
    check_sizes(sizes, processes, shards=kind == "FSDP", megatron=kind == "MEGATRON_LM", where=str(path))
    stage = 0
    if kind == "DEEPSPEED":
        stage = _zero_stage(settings.get("deepspeed_config") or {})
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"--accelerate_config {name} needs DeepSpeed, which is not installed: pip install "
                "'vigor-rl[deepspeed]'. FSDP2 shards as much and needs nothing more: --accelerate_config fsdp2."
            )
    flags = ["--config_file", str(path), *(part for key, value in given.items() for part in (f"--{key}", value))]
    precision = str(given.get("mixed_precision", settings.get("mixed_precision", "no")))
    return Launch(path, processes, machines, stage, kind == "FSDP", flags, rest, precision)


def _check_machines(asked: Mapping[str, Any], machines: int, *, named: bool) -> None:
    """Refuses what would leave machines waiting for each other; `named`: somebody has said which of them this is."""
    missing = []
    if not asked.get("main_process_ip"):
        missing.append("--main_process_ip, the address of the first one")
    if not named and asked.get("rdzv_backend", "static") == "static":
        missing.append(f"--machine_rank, 0 to {machines - 1} (else each takes itself for the first)")
    if missing:
        raise ValueError(f"--num_machines {machines}: give each machine {'; '.join(missing)}.")
    if str(rank := asked.get("machine_rank", 0)) not in map(str, range(machines)):
        raise ValueError(f"--machine_rank {rank}: with --num_machines {machines} it is one of 0 to {machines - 1}.")


def check_sizes(sizes: Mapping[str, int], processes: int, *, shards: bool, megatron: bool, where: str) -> None:
    """Refuses layers or rows in parts, and meshes that are not those of the processes, before a model is loaded.

    Args:
        sizes: of accelerate's `ParallelismConfig`, by the names of its fields.
        processes: of the run.
        shards: whether FSDP is on.
        megatron: whether Megatron-LM is.
        where: what asks for it.

    Raises:
        ValueError: tensor, context or sequence parallelism, Megatron-LM, or sizes whose product is not `processes`.
    """
    split = [f"{how} ({name} = {sizes[name]})" for name, how in _SPLITS.items() if sizes[name] > 1]
    if megatron:
        split.append("Megatron-LM")
    if split:
        raise ValueError(
            f"{where} asks for {', '.join(split)}, which leaves each process a part of the layers or rows: a gradient "
            "norm is made of sums over them, and each process samples completions of its own. Let FSDP2 shard instead "
            "(--accelerate_config fsdp2), on several nodes with dp_replicate_size too."
        )
    replicas, parts = sizes["dp_replicate_size"], sizes["dp_shard_size"]
    if replicas * parts > 1 and (replicas * parts != processes or (shards and parts == 1)):
        raise ValueError(
            f"{where} asks for dp_replicate_size {replicas} × dp_shard_size {parts} = {replicas * parts} processes, "
            f"and {processes} are started. Make the product {processes}, with FSDP a dp_shard_size of at least 2."
        )


def check_deepspeed(config: Mapping[str, Any], where: str) -> None:
    """Refuses a DeepSpeed configuration that leaves layers or rows in parts, before a model is loaded.

    Args:
        config: as DeepSpeed reads it.
        where: what holds it.

    Raises:
        ValueError: tensor, expert or sequence parallelism.
    """
    for path, how in _DEEPSPEED_SPLITS.items():
        size: Any = config
        for key in path:
            size = size.get(key) if isinstance(size, Mapping) else None
        if isinstance(size, int) and size > 1:
            raise ValueError(
                f"{where} asks DeepSpeed for {how} ({'.'.join(path)} = {size}), which leaves each process a part of "
                "the layers or rows: a gradient norm is made of sums over them, and each process samples completions "
                "of its own. Take it out, and let ZeRO-3 (zero_optimization.stage 3) shard instead."
            )


def _zero_stage(asked: Mapping[str, Any]) -> int:
    """The stage that accelerate's `deepspeed_config` asks for, or the file of DeepSpeed's that it names.

    Raises:
        ValueError: that file cannot be read, or asks for what `check_deepspeed` refuses.
    """
    stage = asked.get("zero_stage", 2)
    if asked.get("deepspeed_config_file", "none") == "none":
        return int(stage)
    path = Path(asked["deepspeed_config_file"])
    try:
        config = read_json(path, {"zero_optimization": {"stage?": (int, str)}})
    except (OSError, ReadError) as error:
        raise ValueError(f"deepspeed_config_file: {error}") from error
    check_deepspeed(config, str(path))
    written = config["zero_optimization"].get("stage", 0)
    return int(stage if written == "auto" else written)


def asked_sizes(config: Any) -> dict[str, int]:
    """Sizes of a `ParallelismConfig`; without one, those of the environment, as accelerate reads it."""
    if config is not None:
        return {size: getattr(config, size) for size in _SIZES}
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return dict.fromkeys(_SIZES, 1)
    return {size: int(os.environ.get((_PREFIX + size).upper(), "1")) for size in _SIZES}


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
