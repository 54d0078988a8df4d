"""One process against two: norms, rewards, advantages and losses under DDP and FSDP2, on CPUs over gloo.

    python benchmarks/parallel.py --out docs/results/parallel.md        about 5 minutes on 2 cores

Norms: small models of several families, each sharded in several ways by `torch.distributed.fsdp.fully_shard`, against
the same model whole. The communication of the reward pass is counted operation by operation; memory is measured by
parallel_memory.py, whose table comes last. Runs: one optimizer step of VigorTrainer on the lab's base model, in one
process and in two; under HSDP in four, two replicas of two parts. accelerate shards on accelerators only
(accelerate/state.py: its list of kinds that FSDP may have leaves CPUs out), so these processes tell it that they have
one; sharding, hooks and communication are the real ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import parallel_memory
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

PROMPTS = ("Q:3+4\nA:", "Q:12+7\nA:", "Q:5*3\nA:")
GROUP = 8
SIZE = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": None}  # fmt: skip

# Models ---------------------------------------------------------------------------------------------------------------


def _built(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def qwen2(*, tied: bool = True, lora: bool = False, dora: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def make() -> nn.Module:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZE, tie_word_embeddings=tied))
        if lora or dora:
            config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "down_proj"], use_dora=dora)
            return get_peft_model(model, config)
        return model

    return _built(make)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    return _built(lambda: GPT2LMHeadModel(config))


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2)
    return _built(lambda: MixtralForCausalLM(config))


MODELS: dict[str, Callable[[], Any]] = {
    "Qwen2, tied": qwen2,
    "Qwen2, untied": partial(qwen2, tied=False),
    "GPT-2": gpt2,
    "Mixtral": mixtral,
    "LoRA": partial(qwen2, lora=True),
    "DoRA": partial(qwen2, dora=True),
}


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of different lengths, another number of them in each process, two of them the same; left-padded prompts."""
    rows = [([5, 9, 3], [7, 8, 30, 2, 1]), ([4], [0, 6, 1, 0, 11, 12, 36]), ([21, 22, 23, 24, 25], [17]),
            ([5, 9], [7, 8, 9, 10, 11, 12]), ([5, 9], [7, 8, 9, 10, 11, 12])]  # fmt: skip
    rows = rows if rank == 0 else rows[1:3]
    ids = torch.zeros((len(rows), 12), dtype=torch.int64)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for b, (prompt, answer) in enumerate(rows):
        first, last = 5 - len(prompt), 5 + len(answer)
        ids[b, first:last] = torch.tensor(prompt + answer)
        attention[b, first:last] = 1
        completion[b, 5:last] = 1
    return ids, attention, completion


# Norms ----------------------------------------------------------------------------------------------------------------


class Communication(TorchDispatchMode):
    """Counts collectives by name, with the numbers that each sends."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0].strip("_")
            sent = args[0][0] if isinstance(args[0], list) else args[0]
            self.calls[name] += 1
            self.largest[name] = max(self.largest[name], sent.numel())
        return func(*args, **(kwargs or {}))

    @property
    def gradients(self) -> int:
        """Calls that could carry a gradient: sums over processes, of more than a counter."""
        sums = [name for name in self.calls if "reduce" in name]
        return sum(self.calls[name] for name in sums if self.largest[name] > 1)


def shard(model: nn.Module, *, units: str = "layers", **options: Any) -> nn.Module:
    """fully_shard on each decoder layer and the root; "tail": embedding and head apart, as accelerate does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if sizes := options.pop("replicas_and_parts", None):
        options["mesh"] = init_device_mesh("cpu", sizes, mesh_dim_names=("dp_replicate", "dp_shard"))
    for module in model.modules():
        if type(module).__name__.endswith(("DecoderLayer", "GPT2Block")):
            fully_shard(module, **options)
    if units == "tail":
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        norm = next(m for name, m in model.named_modules() if name.endswith(("model.norm", "ln_f")))
        tail = [norm, embedding, head] if embedding.weight is head.weight else [norm, head]
        if len(tail) == 2:
            fully_shard(embedding, **options)
        fully_shard(tail, **{**options, "reshard_after_forward": False})
    fully_shard(model, **options)
    return model


def ways() -> dict[str, dict[str, Any]]:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {
        "DDP": {},
        "FSDP2": {},
        "FSDP2, units as in accelerate": {"units": "tail"},
        "FSDP2, resharded after forward": {"units": "tail", "reshard_after_forward": True},
        "FSDP2, not resharded": {"reshard_after_forward": False},
        "FSDP2, CPU offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "FSDP2, checkpointing": {"units": "tail", "checkpointing": True},
        "HSDP, 2 replicas": {"units": "tail", "replicas_and_parts": (2, 1)},
        "HSDP, 2 parts": {"units": "tail", "replicas_and_parts": (1, 2)},
        "FSDP2, bf16 policy": {"units": "tail", "mp_policy": bf16},
    }


def norm_error(make: Callable[[], Any], way: str, options: dict[str, Any], rank: int) -> tuple[float, float, Any]:
    """Largest relative errors of the batched method and of the loop, and the communication of the former."""
    from vigor.gradnorm import sequence_grad_norms

    rows = batch(rank)
    wanted = sequence_grad_norms(make(), *rows, method="loop")
    model, options = make(), dict(options)
    if options.pop("checkpointing", False):
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    whole = nn.parallel.DistributedDataParallel(model) if way == "DDP" else shard(model, **options)
    with Communication() as seen:
        found = sequence_grad_norms(whole, *rows, method="batched", micro_batch=2)
    loop = sequence_grad_norms(whole, *rows, method="loop")
    assert all(p.grad is None for p in whole.parameters())
    return float((found / wanted - 1).abs().max()), float((loop / wanted - 1).abs().max()), seen


def norms(rank: int, chosen: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """One row of the table for each (way, model)."""
    from torch.distributed import ReduceOp, all_reduce

    rows = []
    for way, name in chosen:
        error, loop, seen = norm_error(MODELS[name], way, ways()[way], rank)
        worst = torch.tensor([error, loop])
        all_reduce(worst, ReduceOp.MAX)
        rows.append({"way": way, "model": name, "error": float(worst[0]), "loop": float(worst[1]),
                     "gathers": seen.calls["allgather_base"], "gradients": seen.gradients})  # fmt: skip
    return rows


# Runs -----------------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora": True},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "KL, beta=0.1": {"beta": 0.1},
}

HSDP = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}  # fmt: skip


@contextmanager
def sharding(on: bool, **changes: str) -> Iterator[None]:
    """Makes accelerate shard with FSDP2 although the processes have CPUs only; `changes` are of its environment."""
    if not on:
        yield
        return
    from accelerate import DistributedType, PartialState

    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", **changes}  # fmt: skip
    os.environ.update(settings)
    before = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init
    try:
        yield
    finally:
        PartialState.__init__ = before
        for name in settings:
            del os.environ[name]


def completions(folder: Path) -> None:
    """Three groups sampled from the lab's base, for all runs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vigor.lab.world import model_path

    model = AutoModelForCausalLM.from_pretrained(model_path("lab"))
    tokenizer = AutoTokenizer.from_pretrained(model_path("lab"))
    torch.manual_seed(0)
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]] * GROUP)
        for row in model.generate(ids, max_new_tokens=48, do_sample=True, top_k=0)[:, ids.shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            rows.append(row[:end])
    (folder / "completions.json").write_text(json.dumps(rows))


def step(folder: Path, name: str, variant: str) -> dict[str, list[float]]:
    """One optimizer step on the given completions: what TRL and our trainer logged of it."""
    import pandas as pd
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vigor.config import VigorConfig
    from vigor.lab.world import model_path
    from vigor.trainer import VigorTrainer

    settings = dict(VARIANTS[variant])
    lora = (
        LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False) if settings.pop("lora", False) else None
    )
    given = json.loads((folder / "completions.json").read_text())
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = VigorConfig(
        str(folder / name), use_cpu=True, max_steps=1, num_generations=GROUP, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=len(given) // processes, max_completion_length=48, learning_rate=1e-3,
        shuffle_dataset=False, **{"beta": 0.0, "gradient_checkpointing": False, **settings})  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_path("lab"))
    trainer = VigorTrainer(
        model,
        ["vigor", "self_certainty"],
        args,
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
        processing_class=AutoTokenizer.from_pretrained(model_path("lab")),
        peft_config=lora,
    )

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        first = trainer.accelerator.process_index * len(prompt_ids)
        return given[first : first + len(prompt_ids)], None

    trainer._generate_single_turn = generate
    trainer.train()
    log = trainer.state.log_history[0]
    found = {"loss": [log["loss"]], "gradient": [log["grad_norm"]], "mode": [trainer._fusion.rung.mode]}
    if trainer.accelerator.is_main_process:
        table = pd.read_parquet(folder / name / "completions" / "completions_00001.parquet")
        names = {"score": "vigor/score", "certainty": "self_certainty", "reward": "vigor", "advantage": "advantage"}
        found |= {key: table[column].tolist() for key, column in names.items()}
    return found


def differences(one: dict[str, Any], two: dict[str, Any]) -> dict[str, float]:
    """Largest differences: relative of scores, statistics and the gradient norm, absolute of the others."""
    found = {}
    for name in ("score", "certainty", "reward", "advantage", "loss", "gradient"):
        a, b = torch.tensor(one[name]), torch.tensor(two[name])
        scale = a.abs() if name in ("score", "certainty", "gradient") else torch.ones_like(a)
        found[name] = float(((a - b).abs() / scale).max())
    return found


# Two processes --------------------------------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """What each of the processes runs: the cases of cases.json."""
    import torch.distributed as dist

    from vigor.commands.train import leave_process_group

    torch.set_num_threads(1)
    cases = json.loads((folder / "cases.json").read_text())
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {"runs": {}}
    for way, variant in cases["runs"]:
        with sharding(way != "DDP", **(HSDP if way == "HSDP" else {})):
            results["runs"][f"{way}/{variant}"] = step(folder, f"{way}-{variant}", variant)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    results["norms"] = norms(rank, cases["norms"])
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    leave_process_group() if cases["runs"] else dist.destroy_process_group()


def measure(folder: Path, norm_cases: list[tuple[str, str]], run_cases: list[tuple[str, str]]) -> dict[str, Any]:
    """Runs the cases in two processes (HSDP's in four) and their counterparts in this one; differences by case."""
    if run_cases:
        completions(folder)
    results: dict[str, Any] = {"norms": [], "runs": {}}
    for processes, way_of in ((2, ("DDP", "FSDP2")), (4, ("HSDP",))):
        cases = {"norms": norm_cases if processes == 2 else [], "runs": [c for c in run_cases if c[0] in way_of]}
        if any(cases.values()):
            started = _started(folder, cases, processes)
            results = {"norms": results["norms"] + started["norms"], "runs": {**results["runs"], **started["runs"]}}
    alone = {variant: step(folder, f"alone-{variant}", variant) for variant in dict.fromkeys(v for _, v in run_cases)}
    runs = [
        {"way": way, "variant": variant, "mode": results["runs"][f"{way}/{variant}"]["mode"][0],
         **differences(alone[variant], results["runs"][f"{way}/{variant}"])}
        for way, variant in run_cases
    ]  # fmt: skip
    if {"full", "bf16"} <= alone.keys():
        yardstick = differences(alone["full"], alone["bf16"])
        runs.append({"way": "one process", "variant": "bf16 against float32", "mode": "keep", **yardstick})
    return {"norms": results["norms"], "runs": runs}


def _started(folder: Path, cases: dict[str, Any], processes: int) -> Any:
    """What so many processes found."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command += [__file__, "--work", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads((folder / "results.json").read_text())


def table(found: dict[str, Any]) -> str:
    """Two tables in Markdown."""
    lines = ["| sharding | model | batched | loop | all-gathers | gradient collectives |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['way']} | {r['model']} | {r['error']:.0e} | {r['loop']:.0e} | {r['gathers']} | {r['gradients']} |"
        for r in found["norms"]
    ]
    lines += ["", "| run | variant | update | scores | self-certainty | rewards | advantages | loss | gradient norm |",
              "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    names = ("score", "certainty", "reward", "advantage", "loss", "gradient")
    lines += [
        f"| {r['way']} | {r['variant']} | {r['mode']} | " + " | ".join(f"{r[name]:.0e}" for name in names) + " |"
        for r in found["runs"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    torch.set_num_threads(1)
    norm_cases = [(way, name) for way in ways() for name in MODELS]
    run_cases = [(way, variant) for way in ("DDP", "FSDP2") for variant in VARIANTS] + [
        ("HSDP", "full"),
        ("HSDP", "LoRA"),
    ]
    with TemporaryDirectory() as folder:
        text = table(measure(Path(folder), norm_cases, run_cases))
    text += (
        "\nMB that a pass adds to the shards at rest, two processes, float32, 4 rows of 16 tokens: training is a "
        "forward and a backward pass, which leaves the gradients' shards; the loop is what the self-check runs for a "
        "row.\n\n"
    )
    text += parallel_memory.table(parallel_memory.measure())
    head = (
        "<!-- made by benchmarks/parallel.py -->\n"
        f"Largest differences between two processes (gloo, CPU) and one, {date.today()}, torch {torch.__version__}, "
        "float32 but where bf16 is named. Norms: relative errors of the batched method and of the loop under sharding, "
        "against the loop on the whole model; collectives of one call with its self-check. Runs: one step on the lab's "
        "base model (HSDP: four processes); relative for scores, self-certainty and the gradient norm, absolute "
        "for the others.\n\n"
    )
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(head + text)


if __name__ == "__main__":
    main()
