"""`vigor eval` end to end, offline: suites, caches, refusals, data, the harness's own scorers, comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nltk
import pytest
from helpers_eval import PROBLEMS, evaluate_with, right, tiny_model, write_problems, wrong

from vigor.cli import main
from vigor.evaluation import data, results
from vigor.evaluation import model as evaluated
from vigor.evaluation.cache import Generations
from vigor.evaluation.suites import BENCHMARKS, SUITES, TRAINING_PROMPT


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may write to the user's cache or ask the network for punkt_tab."""
    monkeypatch.setenv("VIGOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)


def run(*arguments: object) -> int:
    return main(["eval", *map(str, arguments)])


@pytest.mark.usefixtures("bubblewrap")
@pytest.mark.parametrize("suite", [suite for suite in SUITES if suite != "lab"])
def test_a_tiny_model_on_each_suite(suite: str, model: str, problems: Path, tmp_path: Path) -> None:
    flags = ["--suite", suite, "--data_dir", problems, "--output_dir", tmp_path, "--max_new_tokens", 4]
    assert run(model, *flags, "--limit", 1) == 0
    content = results.read(tmp_path)
    assert tuple(content["tasks"]) == SUITES[suite]
    for name, task in content["tasks"].items():
        (row,) = results.read_problems(tmp_path, name)
        assert task["problems"] == 1 and len(row["samples"]) == task["samples"] == (8 if name[:3] in "amc aime" else 1)
        assert task["generation"]["max_gen_toks"] == 4
        assert row["prompt"].startswith(TRAINING_PROMPT) == (BENCHMARKS[name].family == "math")
    assert (tmp_path / "results.md").read_text("utf-8").count("greedy") == sum(
        not task["generation"]["do_sample"] for task in content["tasks"].values()
    )


def test_the_lab(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--limit", 2, "--max_new_tokens", 40, "--output_dir", tmp_path]
    assert run("lab", *flags) == 0
    assert "24 texts generated, 0 from" in capsys.readouterr().out
    content = results.read(tmp_path)
    assert tuple(content["tasks"]) == SUITES["lab"]
    assert set(content["tasks"]["lab:math"]["measures"]) == {"avg@4", "pass@2", "pass@4", "majority@4"}


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Counts what the real back-end generates, by call; interrupts it after so many calls."""
    calls: list[int] = []
    load = evaluated.load

    def counting(*args: Any, **kwargs: Any) -> Any:
        lm = load(*args, **kwargs)
        generate = lm.generate_until

        def generate_until(requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(len(requests))
            return generate(requests, disable_tqdm=disable_tqdm)

        lm.generate_until = generate_until
        return lm

    monkeypatch.setattr(evaluated, "load", counting)
    return calls


def test_the_same_command_again_generates_nothing(
    model: str, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    flags = ["--tasks", "gsm8k", "amc", "--data_dir", problems, "--max_new_tokens", 3]

    def texts(folder: str, *more: object, of: str = model) -> tuple[int, list[Any]]:
        before = sum(calls)
        assert run(of, *flags, "--output_dir", tmp_path / folder, *more) == 0
        rows = [row["samples"] for name in ("gsm8k", "amc") for row in results.read_problems(tmp_path / folder, name)]
        return sum(calls) - before, rows

    made, first = texts("a")
    assert made == 2 + 16 and len(set(first[2])) > 1
    assert texts("b") == (0, first)
    assert texts("c", "--batch_size", 2) == (0, first)
    made, other = texts("d", "--seed", 1)  # greedy texts know no seed
    assert made == 16 and other[:2] == first[:2] and other[2:] != first[2:]
    assert texts("e", "--prompt", "none")[0] == 18
    assert texts("f", "--max_new_tokens", 2)[0] == 18
    assert texts("g", "--samples", 1, "--temperature", 0.5)[0] == 4
    assert texts("h", of=tiny_model(tmp_path / "other", seed=1))[0] == 18  # other weights, same configuration
    assert texts("i", of=tiny_model(tmp_path / "same"))[0] == 0  # same content elsewhere


def test_an_interrupted_evaluation_goes_on_and_draws_the_same(
    model: str, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [model, "--tasks", "amc", "--data_dir", problems, "--max_new_tokens", 3, "--batch_size", 1]
    assert run(*flags, "--output_dir", tmp_path / "whole", "--cache_dir", tmp_path / "one") == 0
    with monkeypatch.context() as patch:
        calls = counted(patch, stop_after=1)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--output_dir", tmp_path / "cut", "--cache_dir", tmp_path / "two")
        assert calls == [8]
    calls = counted(monkeypatch)
    assert run(*flags, "--output_dir", tmp_path / "cut", "--cache_dir", tmp_path / "two") == 0
    assert calls == [8]
    assert results.read_problems(tmp_path / "cut", "amc") == results.read_problems(tmp_path / "whole", "amc")


def test_a_run_folder_and_an_adapter_are_models(model: str, problems: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    run_folder = tiny_model(tmp_path / "run" / "model").removesuffix("/model")
    whole, inner = evaluated.identify(model), evaluated.identify(run_folder)
    assert inner.path == f"{run_folder}/model" and inner.key == whole.key and inner.max_length == 2**17
    base = AutoModelForCausalLM.from_pretrained(model)
    lora = get_peft_model(base, LoraConfig(r=2, lora_alpha=999, target_modules=["down_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    found = evaluated.identify(str(tmp_path / "adapter"))
    assert found.path == model and found.adapter == str(tmp_path / "adapter") and found.key.startswith(f"{whole.key}+")
    flags = ["--tasks", "gsm8k", "--data_dir", problems, "--max_new_tokens", 6]
    texts = []
    for name in (model, found.adapter):
        assert run(name, *flags, "--output_dir", tmp_path / "out") == 0
        texts.append([row["samples"] for row in results.read_problems(tmp_path / "out", "gsm8k")])
    assert texts[0] != texts[1]


def test_sampling_defaults_of_the_weights_are_not_used(model: str, tmp_path: Path) -> None:
    folder = Path(tiny_model(tmp_path / "eager"))
    settings = {"eos_token_id": 1, "pad_token_id": 0, "repetition_penalty": 5.0, "max_new_tokens": 1, "top_k": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    loaded = evaluated.load(
        evaluated.identify(str(folder)), "hf", batch_size="2", dtype="auto", device="cpu", more={}, seed=0
    )
    kept = loaded.model.generation_config
    assert (kept.eos_token_id, kept.pad_token_id) == (1, 0)
    assert kept.repetition_penalty in (None, 1.0) and kept.max_new_tokens is None


def test_a_store_of_generations_keeps_all_or_nothing(tmp_path: Path) -> None:
    store = Generations(tmp_path / "deep" / "g.sqlite")
    store.put({"a": "1", "b": "2"})
    with pytest.raises(Exception, match="NOT NULL"):
        store.put({"c": "3", "d": None})  # type: ignore[dict-item]
    assert store.get(["a", "b", "c", "d"]) == {"a": "1", "b": "2"}
    store.close()
    again = Generations(tmp_path / "deep" / "g.sqlite")
    assert again.get(["b"]) == {"b": "2"}
    again.close()


def test_a_chat_template_is_used_where_there_is_one(problems: Path, tmp_path: Path) -> None:
    chat = tiny_model(tmp_path / "chat", chat=True)
    flags = ["--tasks", "gsm8k", "--data_dir", problems, "--max_new_tokens", 2, "--limit", 1]
    question = PROBLEMS["gsm8k"][0]["problem"]
    for more, expected in (
        ([], f"<system>{TRAINING_PROMPT}<user>{question}<assistant>"),
        (["--prompt", "none"], f"<user>{question}<assistant>"),
        (["--prompt", "Be short."], f"<system>Be short.<user>{question}<assistant>"),
        (["--no-chat_template"], f"{TRAINING_PROMPT}\n\n{question}"),
    ):
        assert run(chat, *flags, "--output_dir", tmp_path / "out", *more) == 0
        assert [row["prompt"] for row in results.read_problems(tmp_path / "out", "gsm8k")] == [expected]


REFUSALS: list[tuple[list[str], str]] = [
    (["MODEL", "--suite", "nope"], "choose one of paper, math, code, general, lab"),
    (["MODEL", "--tasks", "gsm8k", "gsm9k"], "--tasks gsm9k: there is no such task"),
    (["MODEL", "--tasks", "gsm8k", "--data_dir", "EMPTY"], "gsm8k_test.jsonl is not there"),
    (["MODEL", "--tasks", "gsm8k", "--limit", "0"], "--limit 0"),
    (["MODEL", "--tasks", "gsm8k", "--batch_size", "many"], "--batch_size many"),
    (["MODEL", "--tasks", "gsm8k", "--samples", "4"], "decoded greedily: --samples 4 needs --temperature"),
    (["MODEL", "--tasks", "gsm8k", "--samples", "4", "--temperature", "0"], "all the same text"),
    (["MODEL", "--tasks", "gsm8k", "--backend", "vllm"], "pip install 'vigor-rl[vllm]'"),
    (["MODEL", "--tasks", "gsm8k", "--chat_template"], "has none"),
    (["MODEL", "--tasks", "gsm8k", "--model_args", "four"], "give KEY=VALUE"),
    (["MODEL", "--tasks", "gsm8k", "--max_new_tokens", "200000"], "do not fit into the model's context of 131,072"),
    (["MODEL", "--tasks", "humaneval", "--code_timeout", "0"], "--code_timeout 0"),
    (["MODEL", "--tasks", "humaneval", "--unsafe_local_exec", "--sandbox_url", "http://x"], "exclude each other"),
    (["MODEL", "--tasks", "humaneval", "--sandbox_url", "localhost"], "give the server's address"),
    (["MODEL", "--tasks", "humaneval", "--sandbox_url", "http://127.0.0.1:9"], "did not answer"),
    (["no/such/model", "--tasks", "gsm8k"], "no model with a tokenizer can be loaded"),
    ([], "name a MODEL"),
    (["--compare", "EMPTY", "EMPTY"], "holds no results.json"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=[message for _, message in REFUSALS])
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    arguments: list[str],
    message: str,
    model: str,
    problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluated, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    monkeypatch.setenv(data.VARIABLE, str(problems))
    monkeypatch.chdir(tmp_path)
    named = {"MODEL": model, "EMPTY": str(tmp_path)}
    assert run(*[named.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "vigor eval: " in error and message in error
    assert len(error[error.index("vigor eval: ") :].splitlines()) <= 40


def test_code_needs_a_sandbox(
    model: str, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluated, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(model, "--tasks", "gsm8k", "mbpp", "--data_dir", problems, "--output_dir", tmp_path / "out") == 2
    assert "bubblewrap" in capsys.readouterr().err


def test_unsafe_execution_spells_out_the_risk(problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(RuntimeWarning, match="YOUR rights"):
        content = evaluate_with(right, ["mbpp"], tmp_path, monkeypatch, problems, "--unsafe_local_exec")
    assert content["tasks"]["mbpp"]["measures"]["accuracy"]["strict"]["value"] == 1.0


def test_without_the_extra_one_line_names_it(
    model: str, problems: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(model, "--tasks", "gsm8k", "--data_dir", problems) == 2
    assert capsys.readouterr().err == (
        "vigor eval: lm-evaluation-harness is not installed: pip install 'vigor-rl[eval]'\n"
    )


def test_sentences_need_punkt_only_where_a_problem_counts_them(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    counting = {**PROBLEMS["ifeval"][1], "instruction_id_list": ["length_constraints:number_sentences"]}
    folder = write_problems(tmp_path / "data", {"ifeval": [PROBLEMS["ifeval"][0], counting]})
    flags = [model, "--tasks", "ifeval", "--data_dir", folder, "--max_new_tokens", 2, "--output_dir", tmp_path / "out"]
    assert run(*flags) == 2
    assert "1 of 2 problems" in capsys.readouterr().err
    assert run(*flags, "--limit", 1) == 0


def test_two_folders_are_compared_problem_by_problem(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(name: str, doc: Any) -> str:
        return (right if doc["id"].endswith("0") else wrong)(name, doc)

    names = ["gsm8k", "amc"]
    for answer in (half, right):
        evaluate_with(answer, names, tmp_path / answer.__name__, monkeypatch, problems)
    folders = [tmp_path / "half" / "out", tmp_path / "right" / "out"]
    capsys.readouterr()
    assert run("--compare", *folders, "--output_dir", tmp_path / "both") == 0
    out = capsys.readouterr().out
    assert "+50.0" in out and "McNemar, exact" in out and "paired bootstrap" in out
    text = (tmp_path / "both" / "compare.md").read_text("utf-8")
    assert "| gsm8k | 2 | strict | 50.0 | 100.0 | +50.0 |" in text
    evaluate_with(right, ["gsm8k"], tmp_path / "short", monkeypatch, problems, "--limit", "1")
    assert run("--compare", folders[0], tmp_path / "short" / "out") == 2
    assert "gsm8k: the two folders hold other problems" in capsys.readouterr().err
