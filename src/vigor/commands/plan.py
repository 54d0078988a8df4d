"""`vigor plan`: what a run needs and takes on given GPUs, and the cheapest set-up that fits. Reads no weights."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigor.terminal import printable, refuse

if TYPE_CHECKING:
    from vigor.planner.gpus import Machine
    from vigor.planner.memory import Work
    from vigor.planner.model import Model
    from vigor.planner.times import Rates

_SETTINGS = {
    "model_name_or_path?": str, "dtype?": str, "max_completion_length?": int, "max_prompt_length?": int,
    "num_generations?": int, "per_device_train_batch_size?": int, "gradient_accumulation_steps?": int,
    "beta?": (int, float), "num_iterations?": int, "loss_type?": str, "fused?": str,
    "vllm_importance_sampling_correction?": bool,
}  # fmt: skip
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SAMPLERS = ("transformers", "colocate", "server")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vigor plan`."""
    parser.description = (__doc__ or "").strip()
    add = parser.add_argument
    add("--model", metavar="NAME|FOLDER", help="of which config.json is read (default: the recipe's)")
    add("--gpus", type=int, required=True, metavar="N", help="GPUs of all machines")
    add("--gpu", metavar="KIND", help="a known GPU, such as H100 or A100-80GB (an unknown name lists them)")
    add("--gpu_memory", type=float, metavar="GIB", help="of one GPU; without --gpu the slowest known GPU of that size")
    add("--gpu_tflops", type=float, help="of one GPU in bfloat16, dense (default: the data sheet's)")
    add("--gpu_bandwidth", type=float, help="GB/s of its memory (default: the data sheet's)")
    add("--gpu_link", type=float, help="GB/s to its neighbours, one direction (default: the data sheet's)")
    add("--machine_gpus", type=int, default=8, help="GPUs of one machine (default: 8)")
    add("--machine_link", type=float, help="GB/s a GPU between machines, one direction (default: 25)")
    add("--config", metavar="RECIPE", help="recipe or YAML file whose settings hold where no flag is given")
    add("--max_completion_length", type=int, help="tokens (default: 1024)")
    add("--mean_completion_length", type=float, help="tokens on average, for the time (default: half of the most)")
    add("--prompt_length", type=int, help="tokens (default: the recipe's max_prompt_length, or 512)")
    add("--num_generations", type=int, help="completions of a prompt (default: 8)")
    add("--prompts_per_step", type=int, help="on all GPUs (default: as the recipe does on so many, or 16)")
    add("--dtype", choices=tuple(_DTYPES), help="of the weights as loaded (default: the recipe's, or float32)")
    add("--beta", type=float, help="weight of the KL term, which takes a reference model (default: 0)")
    add("--num_iterations", type=int, help="updates on the same completions (default: 1)")
    add("--peft", choices=("if_needed", "never", "always"), default="if_needed", help="LoRA adapters (default: where "
        "training all parameters does not fit)")  # fmt: skip
    add("--lora_r", type=int, default=16, help="rank of the adapters, on all linear layers (default: 16)")
    add("--samplers", nargs="+", choices=_SAMPLERS, default=list(_SAMPLERS), help="ways of sampling to try: "
        "transformers, vLLM beside the training, vLLM on GPUs of its own (default: all)")  # fmt: skip
    add("--measured", type=Path, metavar="FILE", help="results of benchmarks/gradnorm.py on such a GPU, for the rates")
    add("--run", type=Path, metavar="RUN", help="finished run folder on such GPUs, for the rates")
    add("--json", type=Path, metavar="FILE", help="write the numbers there as well")


def plan(args: argparse.Namespace) -> int:
    """Runs `vigor plan`; returns the exit status (0 done, 1 nothing fits, 2 refused with a message)."""
    try:
        return run(args)
    except (OSError, ValueError) as error:
        return refuse("plan", error)


def run(args: argparse.Namespace) -> int:
    """Reads the settings, tries every set-up and prints the plan; 1 if none fits.

    Raises:
        ValueError, OSError: something cannot be read or makes no sense; the message says what, where and the remedy.
    """
    recipe = _recipe(args.config)
    _check_numbers(args)
    machine = _machine(args)
    work = _work(args, recipe)
    name = args.model or recipe.get("model_name_or_path")
    if name is None:
        raise ValueError("name the model with --model, or a recipe that does with --config.")

    from vigor.commands.job import quiet_third_parties
    from vigor.planner.search import all_plans, setups
    from vigor.planner.text import as_json, report, server_command, train_flags, work_line
    from vigor.planner.times import ASSUMED

    quiet_third_parties()
    full = None if args.peft == "always" else _model(name)
    adapters = None if args.peft == "never" else _model(name, args.lora_r)
    rates = _rates(args, machine, ASSUMED)
    dtype = args.dtype or recipe.get("dtype", "float32")
    model: Model | None = None
    for model in filter(None, (full, adapters)):
        if plans := all_plans(model, work, machine, rates, args.samplers):
            break
    assert model is not None
    tried = len(list(setups(model, work, machine, args.samplers)))
    gpu = machine.gpu
    shown = model if plans else full or model
    trained = f", {shown.trainable:,} of them trained (LoRA, rank {shown.rank})" if shown.rank else ""
    mean = "given" if args.mean_completion_length else "assumed: half of that"
    print(printable(f"model         {name}: {shown.parameters:,} parameters{trained}"))
    print(
        f"GPUs          {machine.gpus} × {gpu.name}: {gpu.memory:g} GiB, {gpu.tflops:g} TFLOP/s, {gpu.bandwidth:g} GB/s"
    )
    print(work_line(work, mean))
    if not plans:
        _explain(shown, adapters if full else None, work, machine, rates, args)
        return 1
    chosen = plans[0]
    flags = train_flags(chosen, machine, dtype)
    if model is adapters and full is not None:
        print("tuning        LoRA adapters: training all parameters does not fit (--peft never shows what it lacks)")
    print(
        "\n".join(
            report(chosen, _others(chosen, model, work, machine, rates, args), (len(plans), tried), machine, rates)
        )
    )
    if command := server_command(chosen):
        print(printable(f"\nserver: {command}"))
    named = ["--config", args.config] if args.config else ["--prompts", "…"]
    print(printable(f"\nvigor train {shlex.join(named)} {shlex.join(flags)} --output_dir …"))
    if args.json:
        args.json.write_text(json.dumps(as_json(chosen, flags, machine, rates), indent=1) + "\n", "utf-8")
    return 0


def _others(
    chosen: Any, model: Model, work: Work, machine: Machine, rates: Rates, args: argparse.Namespace
) -> list[Any]:
    """The best set-up of each other way to shard and to sample; of those that do not fit, the one that lacks least."""
    from vigor.planner.search import evaluate, fits, setups

    kinds: dict[tuple[str, str], list[Any]] = {}
    for setup in setups(model, work, machine, args.samplers):
        if (setup.sharding, setup.sampler) != (chosen.setup.sharding, chosen.setup.sampler):
            kinds.setdefault((setup.sharding, setup.sampler), []).append(evaluate(model, work, setup, machine, rates))
    others = []
    for plans in kinds.values():
        if fitting := [each for each in plans if fits(each, machine)]:
            others.append(min(fitting, key=lambda each: each.times.step))
        else:
            others.append(min(plans, key=lambda each: each.memory.cautious))
    return sorted(others, key=lambda each: (each.needed > machine.gpu.memory, each.times.step))


def _explain(
    model: Model, adapters: Model | None, work: Work, machine: Machine, rates: Rates, args: argparse.Namespace
) -> None:
    from vigor.planner.search import least_needed, remedies
    from vigor.planner.text import described

    least = least_needed(model, work, machine, rates, args.samplers)
    if least is None:
        total = work.prompts * work.generations
        print(
            f"nothing fits  {total} completions cannot be shared by {machine.gpus} GPUs in whole rows, sampling as "
            "asked: change --prompts_per_step, --gpus or --samplers."
        )
        return
    print(
        f"nothing fits  the leanest set-up needs {least.needed:.1f} GiB of {machine.gpu.memory:g} a GPU, most of it "
        f"{least.memory.dominant}\n              ({described(least.setup)})"
    )
    found = remedies(model, work, machine, rates, args.samplers, adapters=adapters)
    print(
        "it would with " + (f"{found[0]}" if found else "nothing that was tried: more GPUs, larger ones, LoRA, shorter")
    )
    for each in found[1:]:
        print(f"or with       {each}")


def _recipe(name: str | None) -> dict[str, Any]:
    from vigor import recipes
    from vigor.reading import check, read_settings

    if name is None:
        return {}
    path = recipes.resolve(name)
    settings = read_settings(path)
    known = {key.removesuffix("?") for key in _SETTINGS}
    chosen = {key: value for key, value in settings.items() if key in known and value is not None}
    check(chosen, _SETTINGS, str(path))
    return chosen


def _check_numbers(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            least = 0 if name == "beta" else 1 if isinstance(value, int) else math.ulp(0.0)
            if not (value >= least and math.isfinite(value)):
                raise ValueError(f"--{name} {value}: give a {'whole ' * isinstance(value, int)}number above 0.")


def _machine(args: argparse.Namespace) -> Machine:
    from vigor.planner.gpus import GPUS, Machine, closest

    if args.gpu is None and args.gpu_memory is None:
        raise ValueError("say which GPU: --gpu, such as H100, or --gpu_memory in GiB.")
    if args.gpu is not None and args.gpu not in GPUS:
        raise ValueError(
            f"--gpu {args.gpu}: the known ones are {', '.join(GPUS)}. Any other: --gpu_memory, --gpu_tflops, "
            "--gpu_bandwidth."
        )
    gpu = GPUS[args.gpu] if args.gpu else closest(args.gpu_memory)
    given = {
        "memory": args.gpu_memory,
        "tflops": args.gpu_tflops,
        "bandwidth": args.gpu_bandwidth,
        "link": args.gpu_link,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    if args.gpu is None:
        changed["name"] = f"GPU taken for {'slow as ' if args.gpu_tflops is None else ''}{gpu.name}"
    machine = Machine(replace(gpu, **changed), args.gpus, args.machine_gpus)
    return machine if args.machine_link is None else replace(machine, between=args.machine_link)


def _work(args: argparse.Namespace, recipe: dict[str, Any]) -> Work:
    from vigor.planner.memory import Work

    most = args.max_completion_length or recipe.get("max_completion_length", 1024)
    mean = args.mean_completion_length or most / 2
    if mean > most:
        raise ValueError(f"--mean_completion_length {mean:g} is more than the most, --max_completion_length {most}.")
    generations = args.num_generations or recipe.get("num_generations", 8)
    prompts = args.prompts_per_step
    if prompts is None and "per_device_train_batch_size" in recipe:
        rows = recipe["per_device_train_batch_size"] * recipe.get("gradient_accumulation_steps", 1) * args.gpus
        prompts = max(1, rows // generations)
    dtype = args.dtype or recipe.get("dtype", "float32")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(_DTYPES)} with --dtype.")
    return Work(
        prompts=prompts or 16,
        generations=generations,
        prompt_length=args.prompt_length or recipe.get("max_prompt_length", 512),
        completion_length=most,
        mean_length=mean,
        weight_bytes=_DTYPES[dtype],
        beta=recipe.get("beta", 0.0) if args.beta is None else args.beta,
        iterations=args.num_iterations or recipe.get("num_iterations", 1),
        loss_type=recipe.get("loss_type", "dapo"),
        fused=recipe.get("fused", "auto"),
        correction=recipe.get("vllm_importance_sampling_correction", True),
    )


def _model(name: str, rank: int = 0) -> Model:
    from peft import LoraConfig

    from vigor.commands.job import model_path
    from vigor.planner.model import read_model

    adapter = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM") if rank else None
    try:
        return replace(read_model(model_path(name), peft_config=adapter), name=name)
    except OSError as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--model {name}: its config.json cannot be read ({first}).") from error


def _rates(args: argparse.Namespace, machine: Machine, assumed: Rates) -> Rates:
    from vigor.planner.measured import rates_of_benchmark, rates_of_run
    from vigor.runfolder import RunFolder

    if args.measured and args.run:
        raise ValueError("give --measured or --run, not both.")
    if args.measured:
        return rates_of_benchmark(args.measured, machine.gpu, assumed)
    if args.run:
        return rates_of_run(
            args.run, _model(str(RunFolder(args.run).read_config()["model_name_or_path"])), machine.gpu, assumed
        )
    return assumed
