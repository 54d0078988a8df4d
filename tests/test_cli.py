"""The command: help without torch, settings from files and flags, refusals, runs that resume and repeat."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_trainer import CHAT_TEMPLATE, lab_tokenizer, save_tiny, tiny_config, write_jsonl
from safetensors.torch import load_file
from trl import ModelConfig

from vigor import VigorConfig, recipes
from vigor.cli import main
from vigor.commands.arguments import TrainArguments
from vigor.commands.job import read_config

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("undrawn")]

RECIPES = [
    "lab", "lab-misaligned", "math-qwen2.5-0.5b", "math-qwen2.5-1.5b", "math-qwen2.5-3b", "math-qwen2.5-7b",
    "math-qwen2.5-7b-64gpus",
    "paper-qwen2.5-3b-code", "paper-qwen2.5-3b-math", "paper-qwen2.5-7b-math",
]  # fmt: skip
QUESTIONS = [{"prompt": f"Q:{a}+{b}\nA:", "answer": str(a + b)} for a in range(3, 7) for b in (4, 15)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def settings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    prompts = write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", QUESTIONS)
    return {
        "model_name_or_path": str(model),
        "prompts": str(prompts),
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "max_steps": 2,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "learning_rate": "1e-3",
        "lr_scheduler_type": "constant",
    }


def write_config(folder: Path, settings: dict[str, Any], **changes: Any) -> str:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}), "utf-8")
    return str(path)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def tree(*folders: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders
        for path in [folder, *folder.rglob("*")]
    }


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout


# Light commands


@pytest.mark.parametrize(
    "command",
    [["--help"], ["--version"], ["recipes"], ["methods"], ["methods", "vigor"], ["plan", "--help"], []],
)
def test_light_commands_do_not_import_torch(command: list[str]) -> None:
    out = python(f"""
        import sys
        from vigor.cli import main
        try:
            main({command!r})
        except SystemExit:
            pass
        heavy = {{"torch", "transformers", "trl", "datasets", "pandas", "matplotlib"}}
        print("heavy:", sorted(heavy & set(sys.modules)))
    """)
    assert out.strip().endswith("heavy: []")


def test_help_names_the_commands_and_ways_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for word in ("train", "methods", "recipes", "--config lab", "--prompts my.jsonl", "--dry_run"):
        assert word in out


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: vigor" in capsys.readouterr().out


def test_an_unknown_command_or_argument_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["trian"], ["recipes", "--all"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
    assert "unrecognised arguments: --all" in capsys.readouterr().err


def test_train_help_shows_our_flags_with_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(TrainArguments):
        assert f"--{field.name}" in out
    for flag in ("--truncated {score,worst,mask}", "--num_generations", "--model_name_or_path", "--learning_rate"):
        assert flag in out


def test_methods_lists_every_reward(capsys: pytest.CaptureFixture[str]) -> None:
    from vigor.rewards import METHODS

    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert len(METHODS) >= 5
    for name, method in METHODS.items():
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert method.paper in line
        assert method.needs in line


def test_methods_shows_the_page_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "vigor"]) == 0
    out = capsys.readouterr().out
    assert "arXiv 2605.09920" in out
    assert "Departures from the paper" in out
    assert main(["methods", "viggor"]) == 2
    assert "no reward 'viggor'; the rewards are: vigor" in capsys.readouterr().err


# Recipes


def test_every_recipe_is_there_with_a_line_on_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.names() == sorted(RECIPES)
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert "lab-paper" in recipes.comparisons()
    for name in (*RECIPES, *recipes.comparisons()):
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert len(line.removeprefix(name).strip()) > 20


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_only_settings_that_exist(name: str) -> None:
    recipe = yaml.safe_load(recipes.resolve(name).read_text("utf-8"))
    recipe.pop("env", None)
    known = {field.name for kind in (TrainArguments, VigorConfig, ModelConfig) for field in dataclasses.fields(kind)}
    assert not set(recipe) - known
    assert recipe["run_name"] == name


@pytest.mark.filterwarnings("ignore:Sampling is restricted")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_plans_with_a_local_model_and_prompts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a config.json and a tokenizer: a plan reads no weights."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = tmp_path / "model"
    tiny_config(max_position_embeddings=8192).save_pretrained(model)
    lab_tokenizer(CHAT_TEMPLATE).save_pretrained(model)
    rows = [{"problem": "1+2", "description": "1+2", "solution": "3", "prompt": "1+2"} for _ in range(120)]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    recipe = yaml.safe_load(recipes.resolve(name).read_text("utf-8"))
    argv = ["--model_name_or_path", str(model), "--prompts", str(prompts), "--output_dir", str(tmp_path / "run")]
    assert main(["train", "--config", name, *argv, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert f"at most {recipe['max_completion_length']} tokens each" in out
    assert f"lr {float(recipe['learning_rate']):g}" in out
    assert "memory        about" in out
    assert recipe["reward_funcs"][0].split("(")[0] in out
    assert not (tmp_path / "run").exists()


# Settings


def test_flags_override_the_file_and_the_file_the_defaults(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, settings, max_steps=7, temperature=0.8)
    for config in (["--config", path], [f"--config={path}"]):
        argv = [*config, "--output_dir", str(tmp_path / "run"), "--max_steps", "5", "--dry_run"]
        assert main(["train", *argv]) == 0
        out = capsys.readouterr().out
        assert "steps         5 optimizer steps" in out
        assert "temperature 0.8" in out


def test_the_environment_is_set_before_torch_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("env:\n  OMP_NUM_THREADS: 1\n  VIGOR_TEST: yes-it-is\nmax_steps: 1\n")
    out = python(
        f"""
        import os, sys
        from vigor.commands.job import read_config
        argv, config = read_config(["--config", {str(path)!r}, "--seed", "4"])
        assert "torch" not in sys.modules, "torch came first"
        import torch
        print(torch.get_num_threads(), os.environ["VIGOR_TEST"], argv, config)
        """,
        OMP_NUM_THREADS="2",
    )
    assert out.strip() == (
        "1 yes-it-is ['--seed', '4'] {'env': {'OMP_NUM_THREADS': 1, 'VIGOR_TEST': 'yes-it-is'}, 'max_steps': 1}"
    )


def test_a_reward_and_a_weight_may_be_written_without_a_list(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, settings, reward_funcs="self_certainty", reward_weights=2.0)
    assert main(["train", "--config", path, "--output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    assert "rewards       self_certainty × 2, accuracy × 0 (watched only)" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_touches_nothing(
    settings: dict[str, Any], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = write_config(tmp_path, settings)
    home = tmp_path / "here"
    home.mkdir()
    monkeypatch.chdir(home)
    places = (tmp_path, model, Path(settings["prompts"]).parent)
    before = tree(*places)
    assert main(["train", "--config", path, "--dry_run"]) == 0
    assert tree(*places) == before
    out = capsys.readouterr().out
    assert f"model         {model}" in out
    assert "prompts       8; the longest has 6 tokens" in out
    assert "8 completions = 2 prompts × 4" in out
    assert "at most 128 generated in 16 completions" in out
    assert "most of it" in out
    assert "not made: this is a dry run" in out


def test_a_run_without_a_name_gets_a_folder_of_its_own(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, settings, run_name="mine", max_steps=1)
    assert main(["train", "--config", path]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine-2")
    assert (folder / "report.html").is_file()
    assert str(folder.relative_to(tmp_path)) in capsys.readouterr().out


def test_a_watched_accuracy_can_be_left_out(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, settings)
    argv = ["train", "--config", path, "--output_dir", str(tmp_path / "run"), "--dry_run"]
    assert main(argv) == 0
    assert "vigor × 1, accuracy × 0 (watched only)" in capsys.readouterr().out
    assert main([*argv, "--no_watch_accuracy"]) == 0
    assert "accuracy ×" not in capsys.readouterr().out


# Refusals: exit status 1, a message on stderr, and nothing written


@pytest.mark.parametrize(
    ("changes", "argv", "message"),
    [
        ({"max_stepz": 3, "sed": 1}, [], r"unknown settings max_stepz, sed"),
        ({"prompts": None}, [], r"name the prompts and the model: --prompts FILE"),
        ({"model_name_or_path": None}, [], r"name the prompts and the model"),
        ({}, ["--prompts", "nowhere.jsonl"], r"no such file: nowhere.jsonl"),
        ({}, ["--reward_funcs", "vigour"], r"unknown reward 'vigour'; the rewards are: vigor"),
        ({}, ["--reward_funcs", "no_such.module"], r"--reward_funcs no_such.module: cannot import it"),
        ({}, ["--reward_weights", "1", "2"], r"--reward_weights has 2 numbers for 1 rewards (vigor)"),
        ({}, ["--reward_weights", "0"], r"every weight is 0, so nothing would be trained"),
        ({}, ["--reward_funcs", "accuracy(column=truth)"], r"reads the column 'truth', but the prompts have"),
        ({}, ["--num_generations", "3"], r"8 / 3 = 2.67 prompts"),
        ({}, ["--temperature", "0"], r"temperature=0.0: must be positive"),
        ({}, ["--max_prompt_length", "3"], r"max_prompt_length"),
        ({}, ["--max_completion_length", "600"], r"leaves no room for a prompt in the model's context of 512"),
        ({}, ["--model_name_or_path", "/no/such/model"], r"/no/such/model"),
        ({}, ["--resume"], r"checkpoints holds no checkpoint"),
        ({}, ["--answer_column", "truth"], r"column 'truth' is missing"),
    ],
)
def test_a_senseless_setting_is_refused_before_anything_is_written(
    settings: dict[str, Any], changes: dict[str, Any], argv: list[str], message: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write_config(tmp_path, settings, **changes)
    run = tmp_path / "run"
    assert main(["train", "--config", path, "--output_dir", str(run), *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vigor train: ")
    assert message in err
    assert not run.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_steps: [1,\n", "is not YAML"),
        ("- a\n- b\n", "must hold a mapping of settings"),
        ("env: 3\n", "env is a number, expected an object"),
        ("max_steps: \xff\n", "settings.yaml"),
    ],
)
def test_a_broken_config_is_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content.encode("latin-1"))
    assert main(["train", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_config_that_is_not_there_is_refused_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "labb"]) == 2
    err = capsys.readouterr().err
    assert "--config labb: neither a file nor a recipe" in err
    assert all(name in err for name in RECIPES)
    assert main(["train", "--config"]) == 2
    assert "--config needs the name of a recipe" in capsys.readouterr().err


def test_a_flag_that_does_not_exist_is_wrong_usage(settings: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path, settings)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", path, "--max_stepz", "3"])
    assert stopped.value.code == 2


def test_several_processes_need_a_named_folder(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--config", write_config(tmp_path, settings)]) == 2
    assert "name the run folder with --output_dir" in capsys.readouterr().err


def test_bad_rows_stop_the_run_or_are_left_out_and_counted(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [*QUESTIONS, {"prompt": " "}]) + "{broken\n")
    path = write_config(tmp_path, settings, prompts=str(prompts), max_steps=1)
    argv = ["train", "--config", path, "--output_dir", str(tmp_path / "run")]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "line 9" in err.replace(":9", "line 9")
    assert "--skip_bad_rows" in err
    assert not (tmp_path / "run").exists()
    assert main([*argv, "--skip_bad_rows", "--dry_run"]) == 0
    assert "(2 bad rows left out)" in capsys.readouterr().out
    assert main([*argv, "--skip_bad_rows"]) == 0
    assert f"2 bad rows left out of {prompts}" in capsys.readouterr().out


def test_conversations_need_a_chat_template_even_where_prompts_have_no_limit(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer without model_max_length (Llama's, for one) sets no budget; its prompts are checked all the same."""
    model = save_tiny(tmp_path / "model")
    about = model / "tokenizer_config.json"
    tokenizer = json.loads(about.read_text("utf-8"))
    del tokenizer["model_max_length"]
    about.write_text(json.dumps(tokenizer), "utf-8")
    path = write_config(tmp_path, settings, model_name_or_path=str(model), system_prompt="maybe")
    assert main(["train", "--config", path, "--output_dir", str(tmp_path / "run")]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("column", ["completions", "image"])
def test_columns_that_trl_takes_for_its_own_are_refused_before_the_model_loads(
    column: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL passes columns on as keywords beside `completions`, and takes `image` for a picture."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{**row, column: "x"} for row in QUESTIONS])
    path = write_config(tmp_path, settings, prompts=str(prompts))
    assert main(["train", "--config", path, "--output_dir", str(tmp_path / "run")]) == 2
    assert f"'{column}'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_fewer_prompts_than_one_generation_takes_are_refused_with_the_numbers(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, settings, per_device_train_batch_size=64)
    assert main(["train", "--config", path, "--output_dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "8 prompts" in err
    assert "64 completions / 4 = 16 prompts" in err
    assert not (tmp_path / "run").exists()


# Runs


def test_a_folder_in_use_is_refused_with_the_remedy(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, settings)
    used = tmp_path / "used"
    used.mkdir()
    (used / "note.txt").write_text("mine")
    before = tree(used)
    assert main(["train", "--config", path, "--output_dir", str(used)]) == 2
    err = capsys.readouterr().err
    assert "used is not empty" in err
    assert "--resume" in err
    assert tree(used) == before


def test_the_users_own_reward_function_is_found_by_its_path(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "house_rewards.py").write_text(
        "def brevity(completions, **_):\n    return [-float(len(text)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = write_config(tmp_path, settings, max_steps=1)
    argv = ["--reward_funcs", "vigor", "house_rewards.brevity", "--reward_weights", "1", "0.5"]
    assert main(["train", "--config", path, "--output_dir", "run", *argv]) == 0
    (record,) = lines(tmp_path / "run")
    assert record["rewards/brevity/mean"] < 0
    assert record["rewards/accuracy/mean"] == 0


@pytest.fixture(scope="module")
def straight(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one go, with a checkpoint after every second."""
    folder = tmp_path_factory.mktemp("straight")
    path = write_config(folder, settings, max_steps=4, save_strategy="steps", save_steps=2, seed=5)
    assert main(["train", "--config", path, "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def resumed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after three steps and resumed from the checkpoint of the second."""
    folder = tmp_path_factory.mktemp("resumed")
    path = write_config(folder, settings, max_steps=3, save_strategy="steps", save_steps=2, seed=5)
    argv = ["train", "--config", path, "--output_dir", str(folder / "run")]
    assert main(argv) == 0
    third = folder / "run" / "checkpoints" / "checkpoint-3"
    for file in sorted(third.rglob("*"), reverse=True):
        file.unlink()
    third.rmdir()
    assert main([*argv, "--max_steps", "4", "--resume"]) == 0
    return folder / "run"


def test_a_resumed_run_appends_its_metrics_and_ends_at_the_same_step(resumed: Path) -> None:
    assert [record["step"] for record in lines(resumed)] == [1, 2, 3, 3, 4]
    state = json.loads((resumed / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text("utf-8"))
    assert state["global_step"] == 4


def test_resuming_a_finished_run_is_refused_and_trains_no_step_more(
    resumed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(resumed, run)
    before = tree(run)
    argv = ["--config", str(run / "config.yaml"), "--output_dir", str(run), "--resume", "--max_steps", "4"]
    assert main(["train", *argv]) == 2
    assert "4 of 4" in capsys.readouterr().err
    assert tree(run) == before


def test_a_resumed_run_ends_with_the_weights_of_one_in_one_go(straight: Path, resumed: Path) -> None:
    assert equal(saved_weights(straight), saved_weights(resumed))


def test_config_yaml_repeats_the_run(straight: Path, tmp_path: Path) -> None:
    argv = ["train", "--config", str(straight / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main(argv) == 0
    assert equal(saved_weights(straight), saved_weights(tmp_path / "again"))
    assert [record["loss"] for record in lines(straight)] == [record["loss"] for record in lines(tmp_path / "again")]


def test_another_seed_makes_another_run(straight: Path, tmp_path: Path) -> None:
    argv = ["train", "--config", str(straight / "config.yaml"), "--output_dir", str(tmp_path / "other"), "--seed", "6"]
    assert main(argv) == 0
    assert not equal(saved_weights(straight), saved_weights(tmp_path / "other"))


def test_config_yaml_of_a_resumed_run_repeats_it_from_the_start(resumed: Path, tmp_path: Path) -> None:
    argv = ["train", "--config", str(resumed / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main(argv) == 0
    assert [record["step"] for record in lines(tmp_path / "again")] == [1, 2, 3, 4]


def test_config_yaml_keeps_the_environment_of_the_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIGOR_TEST_SETTING", "before")
    path = write_config(tmp_path, settings, max_steps=1, env={"VIGOR_TEST_SETTING": "during"})
    assert main(["train", "--config", path, "--output_dir", str(tmp_path / "run")]) == 0
    monkeypatch.setenv("VIGOR_TEST_SETTING", "after")
    read_config(["--config", str(tmp_path / "run" / "config.yaml")])
    assert os.environ["VIGOR_TEST_SETTING"] == "during"


def test_the_metrics_after_the_last_log_are_written_too(settings: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path, settings, max_steps=3, logging_steps=2)
    assert main(["train", "--config", path, "--output_dir", str(tmp_path / "run")]) == 0
    assert [record["step"] for record in lines(tmp_path / "run") if "scores/vigor" in record] == [2, 3]


def test_an_adapter_is_trained_and_saved_for_the_auto_classes(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    flags = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    argv = ["train", "--config", write_config(tmp_path, settings), "--output_dir", str(tmp_path / "run"), *flags]
    assert main([*argv, "--dry_run"]) == 0
    assert f"{2 * ((32 * 2 + 2 * 32) + (32 * 2 + 2 * 16))} trainable" in capsys.readouterr().out
    assert main(argv) == 0
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    adapters = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert adapters
    assert any(p.abs().max() > 0 for p in adapters), "a fresh adapter has B = 0: nothing was trained or saved"


def test_the_lab_is_scored_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = [
        "--max_steps", "2", "--per_device_train_batch_size", "16", "--lab_eval_prompts", "6", "--lab_eval_samples", "2"
    ]  # fmt: skip
    assert main(["train", "--config", "lab", "--output_dir", str(tmp_path / "run"), *argv]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    assert set(results["before"]) == set(results["after"]) == {"lab:math", "lab:math-hard", "lab:code"}
    for when in results.values():
        for score in when.values():
            assert 0 <= score["sampled_interval"][0] <= score["sampled"] <= score["sampled_interval"][1] <= 1
    out = " ".join(capsys.readouterr().out.split())
    for text in ("6 test prompts a task, 2 samples each, 95 % intervals", "lab:code", "greedy", "sampled", "change"):
        assert text in out
    assert "lab:math-hard" in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert lines(tmp_path / "run")[-1]["rewards/accuracy/mean"] >= 0


@pytest.mark.parametrize("command", ["methods", "methods vigor", "methods --markdown", "recipes"])
def test_a_reader_that_has_seen_enough_ends_it_quietly(command: str) -> None:
    """As in `vigor methods vigor | head -1`, whose reader may close before the first byte."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        arguments = [sys.executable, "-m", "vigor", *command.split()]
        done = subprocess.run(arguments, stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
