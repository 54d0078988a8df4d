"""`vigor plan`: the arithmetic of set-ups, the search, its flags, and what it says where nothing fits."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers_trainer import lab_tokenizer, tiny_config, write_jsonl
from peft import LoraConfig
from transformers import Gemma2Config, GPT2Config, MambaConfig, MixtralConfig
from trl import ModelConfig

from vigor import VigorConfig, launch
from vigor.cli import main
from vigor.commands.arguments import TrainArguments
from vigor.flops import MODELS, adapter_cost, cost
from vigor.planner.gpus import GIB, GPUS, Machine, closest
from vigor.planner.memory import Setup, Work, memory_of, norm_tokens
from vigor.planner.model import Model, read_model
from vigor.planner.search import all_plans, best_plan, evaluate, fits, least_needed, remedies, setups
from vigor.planner.times import ASSUMED, Times, times_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

WORK = Work(16, 8, 512, 1024, 512.0, weight_bytes=2)


@pytest.fixture(scope="module")
def large() -> Model:
    return read_model("Qwen/Qwen2.5-7B")


@pytest.fixture(scope="module")
def small() -> Model:
    return read_model("Qwen/Qwen2.5-0.5B")


@pytest.fixture(scope="module")
def adapters() -> Model:
    return read_model("Qwen/Qwen2.5-7B", peft_config=LoraConfig(r=16, target_modules="all-linear"))


def test_known_models_are_counted_without_network_or_weights(large: Model, small: Model) -> None:
    assert (small.parameters, large.parameters) == (494_032_768, 7_615_616_512)
    h, i, kv = 3584, 18_944, 512
    assert large.layer == 2 * h * h + h + 2 * (h * kv + kv) + 3 * h * i + 2 * h
    assert large.outer == 2 * 152_064 * h + h
    assert large.shape == MODELS["Qwen2.5-7B"]


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2),
        Gemma2Config(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=16),
        MixtralConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2),
    ],
    ids=["gpt2", "gemma2", "mixtral"],
)  # fmt: skip
def test_other_families_are_planned_too(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    model = read_model(str(tmp_path))
    assert model.parameters == model.layer * 2 + model.outer
    assert model.shape.intermediate == {"gpt2": 128, "gemma2": 48, "mixtral": 2 * 48}[config.model_type]
    plan = best_plan(model, WORK, Machine(GPUS["L4"], 2), ASSUMED)
    assert plan is not None and min(plan.memory.resident.values()) > 0 and plan.times.step > 0


def test_what_is_no_decoder_with_attention_is_refused(tmp_path: Path) -> None:
    MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mamba: its config has no num_attention_heads"):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("sharding", "bytes_a_parameter"),
    [
        ("ddp", {"weights": 2, "gradients": 2, "optimizer (AdamW)": 4, "communication buffers": 2}),
        ("zero1", {"weights": 2, "gradients": 2, "optimizer (AdamW, float32 weights)": 12 / 4}),
        ("zero2", {"weights": 2, "gradients": 2 / 4, "optimizer (AdamW, float32 weights)": 12 / 4}),
        ("zero3", {"weights": 2 / 4, "gradients": 2 / 4, "optimizer (AdamW, float32 weights)": 12 / 4}),
        ("fsdp2", {"weights": 4 / 4, "gradients": 4 / 4, "optimizer (AdamW)": 8 / 4}),
    ],
)
def test_what_stays_is_bytes_times_parameters(large: Model, sharding: str, bytes_a_parameter: dict[str, float]) -> None:
    memory = memory_of(large, WORK, Setup(4, 1, 1, True, sharding))
    for name, size in bytes_a_parameter.items():
        assert memory.resident[name] == pytest.approx(size * large.parameters, rel=1e-9)


def test_gradients_of_several_micro_batches_wait_whole_under_fsdp2(large: Model) -> None:
    one, several = (memory_of(large, WORK, Setup(4, 1, n, True, "fsdp2")).resident for n in (1, 8))
    assert several.keys() - one.keys() == {"gradients before their reduction"}
    assert several["gradients before their reduction"] == 2 * large.parameters


def test_zero3_holds_gathered_weights_and_a_bucket_but_no_whole_gradients(large: Model, small: Model) -> None:
    one, several = (memory_of(large, WORK, Setup(4, 1, n, True, "zero3")).resident for n in (1, 8))
    assert one == several
    assert one["communication buffers"] == 2 * 500_000_000
    medium = read_model("Qwen/Qwen2.5-3B")
    for model, numbers in (
        (small, small.parameters),
        (medium, 1_000_000_000 + medium.layer),  # DeepSpeed's bound, in training
        (large, large.layer + large.outer),  # the norms' pass
    ):
        assert memory_of(model, WORK, Setup(4, 1, 1, True, "zero3")).resident["gathered weights"] == 2 * numbers


def test_zero3_moves_more_than_fsdp2_and_gathers_once_to_sample(large: Model) -> None:
    machine = Machine(dataclasses.replace(GPUS["H100"], link=2000), 8)

    def times(sharding: str, sampler: str = "server") -> Times:
        return times_of(large, WORK, Setup(8, 1, 16, True, sharding, sampler), machine, ASSUMED)

    push = times("fsdp2").communication  # on such links computing hides all else
    assert push == pytest.approx(2 * large.parameters / (machine.link(8) * ASSUMED.links))
    weights = 2 * large.parameters * 7 / 8 / (machine.link(8) * ASSUMED.links)
    rows = norm_tokens(large, WORK, Setup(8, 1, 16, True), device="cuda") // WORK.length
    rounds = math.ceil(16 / rows)
    assert times("zero3").communication == pytest.approx(push + 2 * rounds * weights)
    sampled = [times(sharding, "transformers").generation for sharding in ("fsdp2", "zero3")]
    assert sampled[0] - sampled[1] == pytest.approx((WORK.completion_length - 1) * push)


def test_adapters_train_their_own_parameters_in_float32(adapters: Model, large: Model) -> None:
    s, r = large.shape, 16
    narrow = s.kv_heads * s.head_dim
    pairs = 2 * (s.hidden + s.hidden) + 2 * (s.hidden + narrow) + 3 * (s.hidden + s.intermediate)
    assert adapters.trainable == s.layers * r * pairs
    resident = memory_of(adapters, WORK, Setup(1, 1, 1, True)).resident
    assert resident["optimizer (AdamW)"] == 8 * adapters.trainable
    assert resident["weights"] == 2 * large.parameters + 4 * adapters.trainable
    c, full = adapter_cost(s, 1024, r), cost(s, 1024)
    assert full.forward < c.forward < 1.05 * full.forward
    assert c.norms == c.plain < full.plain


def test_vllm_beside_the_training_takes_its_share_unless_asleep(small: Model) -> None:
    awake = Setup(1, 1, 1, True, sampler="colocate", share=0.3)
    total = 80 * GIB
    memory = memory_of(small, WORK, awake, gpu_memory=total)
    asleep = memory_of(small, WORK, dataclasses.replace(awake, sleep=True), gpu_memory=total)
    assert memory.resident["vLLM"] == int(0.3 * total) and "vLLM" not in asleep.resident
    assert asleep.phases["generation (vLLM)"] == int(0.3 * total)
    assert asleep.cautious < memory.cautious


def test_every_set_up_does_the_work_once_on_all_gpus(large: Model) -> None:
    machine = Machine(GPUS["H100"], 8)
    work = dataclasses.replace(WORK, prompts=21)  # 168 completions: 8 GPUs train, or 7, 6 or 4 beside a server
    found = list(setups(large, work, machine))
    assert len(found) == len(set(found)) > 100
    for setup in found:
        assert setup.processes * setup.rows * setup.accumulation == 168
        assert setup.processes + setup.servers == 8
        assert large.shape.heads % setup.tensor_parallel == 0, "vLLM splits heads evenly: 28 not over 8 GPUs"
    assert {setup.servers for setup in found} == {0, 1, 2, 4}
    whole = setups(large, dataclasses.replace(WORK, prompts=56), Machine(GPUS["H100"], 64), ["server"])
    assert {setup.processes for setup in whole} == {56}, "of 8 machines, one is the server's"
    assert list(setups(large, WORK, Machine(GPUS["H100"], 7), ["transformers"])) == []


def test_the_best_fits_and_nothing_that_fits_is_clearly_faster(large: Model) -> None:
    machine = Machine(GPUS["A100-80GB"], 8)
    plans = all_plans(large, WORK, machine, ASSUMED, ["transformers", "colocate", "server"])
    best = plans[0]
    assert best.memory.cautious <= machine.usable and best.needed <= 80
    assert all(best.times.step <= 1.03 * other.times.step * (1 + 1e-9) for other in plans)
    assert best.setup.sharding != "ddp", "whole copies of 7B with AdamW do not fit into 80 GiB"
    assert all(plan.setup.sharding != "ddp" for plan in plans)


def test_a_small_model_needs_no_sharding(small: Model) -> None:
    best = best_plan(small, WORK, Machine(GPUS["H100"], 4), ASSUMED, ["colocate"])
    assert best is not None and best.setup.sharding == "ddp" and best.setup.tensor_parallel == 1


def test_zero3_is_taken_where_it_wins_and_fsdp2_where_both_do(
    large: Model, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    medium = read_model("Qwen/Qwen2.5-1.5B")
    for model, gpu, gpus, mean, equal in ((large, "H100", 8, 1536, False), (medium, "A100-40GB", 2, 3072, True)):
        work = Work(64, 8, 512, 3072, mean)
        plans = all_plans(model, work, Machine(GPUS[gpu], gpus), ASSUMED, ["colocate"])
        zero3 = min(plan.times.step for plan in plans if plan.setup.sharding == "zero3")
        assert plans[0].setup.sharding == "fsdp2"
        assert (zero3 <= 1.03 * min(plan.times.step for plan in plans)) is equal
    argv = ("--model", "Qwen/Qwen2.5-7B", "--gpus", "8", "--gpu", "A100-40GB", "--samplers", "colocate")
    status, out, _ = run(capsys, *argv, "--prompts_per_step", "64", "--max_completion_length", "3072")
    assert status == 0 and "--accelerate_config zero3" in out
    assert "why ZeRO-3    FSDP2, which needs no DeepSpeed, needs at least " in out


def test_more_of_anything_takes_longer(large: Model) -> None:
    machine, setup = Machine(GPUS["H100"], 8), Setup(8, 1, 16, False, "zero2", "colocate", 0.4)

    def step(work: Work = WORK, setup: Setup = setup, machine: Machine = machine) -> float:
        return times_of(large, work, setup, machine, ASSUMED).step

    replace = dataclasses.replace
    assert step(replace(WORK, completion_length=2048, mean_length=1024)) > 1.5 * step()
    assert step(replace(WORK, beta=0.1)) > step()
    assert step(replace(WORK, iterations=2)) > step()
    assert step(setup=replace(setup, checkpointing=True)) > step()
    assert step(machine=replace(machine, gpu=GPUS["A100-80GB"])) > step()
    assert step(setup=replace(setup, sampler="transformers")) > step()


def test_phases_are_operations_over_rates(large: Model) -> None:
    machine = Machine(GPUS["H100"], 1)
    times = times_of(large, WORK, Setup(1, 2, 64, True), machine, ASSUMED)
    c = cost(large.shape, 1024)
    assert times.reward == pytest.approx(128 * (c.norms + c.forward) / (989e12 * ASSUMED.norms))
    assert times.update == pytest.approx(128 * (c.plain + c.forward) / (989e12 * ASSUMED.training))
    assert times.reference == 0 and times.communication == 0
    kept = times_of(large, WORK, Setup(1, 2, 64, False), machine, ASSUMED, rung="keep")
    assert kept.update == pytest.approx(128 * (c.keep - c.norms) / (989e12 * ASSUMED.training))


def test_what_would_make_it_fit_does(large: Model, adapters: Model) -> None:
    machine = Machine(GPUS["L4"], 2)
    assert best_plan(large, WORK, machine, ASSUMED) is None
    least = least_needed(large, WORK, machine, ASSUMED)
    assert least is not None and least.needed > 24 and not fits(least, machine)
    told = remedies(large, WORK, machine, ASSUMED, adapters=adapters)
    assert told[0].startswith("LoRA adapters of rank 16")
    gpus = next(int(each.split()[0]) for each in told if each.endswith("GPUs of this kind"))
    for count, enough in ((gpus, True), (gpus // 2, False)):
        assert (best_plan(large, WORK, dataclasses.replace(machine, gpus=count), ASSUMED) is not None) is enough
    memory = next(float(each.split()[2]) for each in told if each.startswith("GPUs of"))
    larger = dataclasses.replace(machine, gpu=dataclasses.replace(machine.gpu, memory=memory))
    assert best_plan(large, WORK, larger, ASSUMED) is not None


def test_a_fused_update_is_planned_where_the_trainer_would_take_it(small: Model) -> None:
    machine = Machine(GPUS["H200"], 1)
    free = Setup(1, 4, 1, False)
    work = dataclasses.replace(WORK, prompts=1, generations=4)
    assert evaluate(small, work, free, machine, ASSUMED).rung.mode == "keep"
    assert evaluate(small, dataclasses.replace(work, beta=0.1), free, machine, ASSUMED).rung.mode == "retain"
    vllm = dataclasses.replace(free, sampler="colocate", share=0.2)
    assert evaluate(small, work, vllm, machine, ASSUMED).rung.mode == "retain"
    zero = dataclasses.replace(free, processes=2, rows=2, sharding="zero2")
    assert evaluate(small, work, zero, Machine(GPUS["H200"], 2), ASSUMED).rung.mode == "off"


def test_a_gpu_of_unknown_kind_is_taken_for_the_slowest_of_its_size() -> None:
    assert [closest(size).name for size in (24, 80, 100, 1000)] == ["L4", "A100-80GB", "H200", "MI300X"]


# The command


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(["plan", *argv])
    out, err = capsys.readouterr()
    return status, out, err


def settings_known() -> set[str]:
    kinds: Any = (TrainArguments, VigorConfig, ModelConfig)
    return {field.name for kind in kinds for field in dataclasses.fields(kind)} | set(launch.FLAGS)


@pytest.mark.parametrize(
    "argv",
    [
        ("--gpus", "8", "--gpu", "A100-80GB", "--config", "math-qwen2.5-7b"),
        ("--gpus", "8", "--gpu", "H100", "--model", "Qwen/Qwen2.5-7B", "--samplers", "server"),
        ("--gpus", "1", "--gpu_memory", "48", "--model", "Qwen/Qwen2.5-7B", "--dtype", "bfloat16"),
    ],
    ids=["recipe", "server", "one"],
)
def test_it_prints_flags_that_exist_and_says_how_sure_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: tuple[str, ...]
) -> None:
    status, out, _ = run(capsys, *argv, "--json", str(tmp_path / "plan.json"))
    assert status == 0
    for word in ("counted:", "estimated:", "assumed:", "set-up ", "memory ", "time "):
        assert word in out
    (line,) = [line for line in out.splitlines() if line.startswith("vigor train ")]
    flags = {part[2:] for part in shlex.split(line) if part.startswith("--")}
    assert flags - {"config", "prompts"} <= settings_known()
    written = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    assert written["setup"]["processes"] + written["setup"]["servers"] == int(argv[1])
    assert written["seconds"]["step"] > 0 and written["gib_needed"] <= written["gpu"]["memory"]
    assert ("vllm serve" in out) == (written["server"] is not None) == ("server" in argv)
    if argv[1] == "1":
        assert "LoRA adapters: training all parameters does not fit" in out and "--use_peft True" in line


def test_its_flags_are_taken_by_the_command_that_they_are_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny_config(max_position_embeddings=8192).save_pretrained(tmp_path / "model")
    lab_tokenizer().save_pretrained(tmp_path / "model")
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Q:{i}\nA:"} for i in range(40)])
    argv = ("--model", str(tmp_path / "model"), "--gpus", "1", "--gpu", "L4", "--max_completion_length", "64")
    status, out, _ = run(capsys, *argv, "--samplers", "transformers", "--prompt_length", "16")
    assert status == 0
    (line,) = [line for line in out.splitlines() if line.startswith("vigor train ")]
    flags = shlex.split(line)[2:-2]
    flags[flags.index("--prompts") + 1] = str(prompts)
    flags[flags.index("--bf16") + 1] = "False"  # no GPU here
    assert main(["train", *flags, "--use_cpu", "--output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    planned = capsys.readouterr().out
    assert "128 completions = 16 prompts × 8, at most 64 tokens each" in planned


def test_nothing_fits_is_status_1_with_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--model", "Qwen/Qwen2.5-7B", "--gpus", "1", "--gpu", "L4", "--peft", "never")
    status, out, _ = run(capsys, *argv)
    assert status == 1
    assert "nothing fits  the leanest set-up needs " in out and "of 24 a GPU, most of it " in out
    assert "it would with " in out and "GPUs of this kind" in out
    assert "vigor train" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--gpus", "8"), "say which GPU"),
        (("--gpus", "0", "--gpu", "H100"), "--gpus 0"),
        (("--gpus", "8", "--gpu_memory", "nan"), "--gpu_memory nan"),
        (("--gpus", "8", "--gpu", "H1000"), "the known ones are RTX-3090, "),
        (("--gpus", "8", "--gpu", "H100"), "name the model with --model"),
        (("--gpus", "8", "--gpu", "H100", "--config", "no-such"), "neither a file nor a recipe"),
        (("--gpus", "8", "--gpu", "H100", "--model", "m", "--mean_completion_length", "5000"), "is more than the most"),
        (("--gpus", "8", "--gpu", "H100", "--model", "/no/such/folder"), "its config.json cannot be read"),
        (
            ("--gpus", "8", "--gpu", "H100", "--model", "Qwen/Qwen2.5-0.5B", "--run", "/no/run"),
            "config.yaml is missing",
        ),
        (
            ("--gpus", "8", "--gpu", "H100", "--model", "Qwen/Qwen2.5-0.5B", "--measured", "/no.json"),
            "/no.json is missing",
        ),
    ],
)
def test_bad_input_is_refused_in_one_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, _, err = run(capsys, *argv)
    assert status == 2 and message in err
    assert len(err.splitlines()) <= 40 and "Traceback" not in err


# Measured rates


def test_a_benchmark_on_a_gpu_gives_the_rates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shape, rows, T = MODELS["Qwen2.5-0.5B"], 8, 1024
    text = f"1024x151936x{rows}x{T}"
    from vigor.flops import benchmark_shape

    c = cost(dataclasses.replace(benchmark_shape(text, 24)[0], activation_bytes=2), T)
    seconds = {"train": {"seconds": rows * c.plain / 300e12}, "batched": {"seconds": rows * c.norms / 200e12}}
    settings = {"device": "cuda", "dtype": "bfloat16", "density": 1.0, "lora": 0, "checkpointing": False, "layers": 24}
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({**settings, "shapes": {text: seconds}}), "utf-8")
    argv = ("--model", "Qwen/Qwen2.5-0.5B", "--gpus", "1", "--gpu", "H100", "--json", str(tmp_path / "plan.json"))
    assert run(capsys, *argv, "--measured", str(path))[0] == 0
    rates = json.loads((tmp_path / "plan.json").read_text("utf-8"))["rates"]
    assert rates["training"] == pytest.approx(300 / 989) and rates["norms"] == pytest.approx(200 / 989)
    assert shape.layers == 24 and str(path) in rates["source"]
    path.write_text(json.dumps({**settings, "device": "cpu", "shapes": {text: seconds}}), "utf-8")
    status, _, err = run(capsys, *argv, "--measured", str(path))
    assert status == 2 and "was measured on 'cpu'" in err


def test_a_finished_run_gives_the_rates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2, "gradient_checkpointing": False, "num_iterations": 1}  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(settings), "utf-8")
    environment = {"command": "", "date": "", "python": "", "platform": "", "cpu_count": 1, "torch_threads": 1,
                   "gpus": [], "processes": 2, "packages": {}, "commit": None}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment), "utf-8")
    rows, T, reached, token = 8, 640, 123e12, 0.05
    c = cost(MODELS["Qwen2.5-0.5B"], T)
    seconds = rows * (c.norms + c.plain) / reached
    lines = [
        {"step": step, "time/step": 9.0, "time/generation": 200 * token, "time/reward": 0.4 * seconds,
         "time/update": 0.6 * seconds, "completions/mean_length": 128.0, "completions/max_length": 200.0,
         "num_tokens": step * rows * 2 * T}
        for step in range(1, 5)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    argv = ("--model", "Qwen/Qwen2.5-0.5B", "--gpus", "1", "--gpu", "H100", "--json", str(tmp_path / "plan.json"))
    assert run(capsys, *argv, "--run", str(folder))[0] == 0
    rates = json.loads((tmp_path / "plan.json").read_text("utf-8"))["rates"]
    assert rates["training"] == pytest.approx(reached / 989e12) == rates["norms"]
    assert rates["token"] == pytest.approx(token / 24)
    (folder / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n", "utf-8")
    status, _, err = run(capsys, *argv, "--run", str(folder))
    assert status == 2 and "give a run of at least 3" in err
