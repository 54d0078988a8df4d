"""The task files and lm-evaluation-harness: its own scorers agree, and the hub's rows give the local documents."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import nltk
import pytest
from helpers_eval import PROBLEMS, evaluate_with, tiny_model, write_problems

from vigor.evaluation import data, scoring
from vigor.evaluation.suites import BENCHMARKS, TASK_FOLDER, EvalError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)


def test_the_instruction_scores_are_the_harness_s_own(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results

    texts = {
        "ifeval/1000": "these words were written in plain english",
        "ifeval/1001": "*only\nthree words*",
    }
    content = evaluate_with(lambda name, doc: texts[doc["id"]], ["ifeval"], tmp_path, monkeypatch, problems)
    own = [process_results(row, [texts[row["id"]]]) for row in PROBLEMS["ifeval"]]
    measures = content["tasks"]["ifeval"]["measures"]
    for ours, theirs in (("strict", "strict"), ("flexible", "loose")):
        prompts = [found[f"prompt_level_{theirs}_acc"] for found in own]
        assert measures["accuracy"][ours]["value"] == sum(prompts) / 2 == 0.5
        instructions = agg_inst_level_acc([found[f"inst_level_{theirs}_acc"] for found in own])
        assert measures["instructions"][ours]["value"] == pytest.approx(instructions) == pytest.approx(2 / 3)


def test_instruction_scores_do_not_change_from_call_to_call() -> None:
    import random

    # The harness counts a letter drawn at random where "#" is asked for.
    row = {
        **PROBLEMS["ifeval"][0],
        "instruction_id_list": ["keywords:letter_frequency"],
        "kwargs": [{"let_relation": "at least", "letter": "#", "let_frequency": 1}],
    }
    doc = data.document(data.SOURCES["ifeval"], row)
    texts = ["abcdefghijklm", "nopqrstuvwxyz"]
    before = random.getstate()
    verdicts = set()
    for _ in range(12):
        random.seed()
        verdicts.add(
            tuple(sample["correct"]["strict"] for (sample,) in scoring.ifeval([[t] for t in texts], [doc] * 2))
        )
    assert len(verdicts) == 1 and len(verdicts.pop()) == 2
    random.setstate(before)
    scoring.ifeval([["a"]], [doc])
    assert random.getstate() == before


def test_letters_are_found_as_the_harness_finds_them() -> None:
    import lm_eval
    from lm_eval.filters import build_filter_ensemble
    from lm_eval.tasks._yaml_loader import load_yaml

    template = Path(lm_eval.__file__).parent / "tasks/mmlu_pro/_default_template_yaml"
    (settings,) = load_yaml(template, resolve_func=False)["filter_list"]
    steps = [[step["function"], {k: v for k, v in step.items() if k != "function"}] for step in settings["filter"]]
    texts = ["the answer is (B)", "answer is B. No: the answer is (C)", "Answer: (B)", r"\boxed{B}", "B", "answer is K"]

    class Request:
        def __init__(self, text: str) -> None:
            self.resps, self.doc, self.filtered_resps = [text], {}, {}  # type: ignore[var-annotated]

    requests = [Request(text) for text in texts]
    build_filter_ensemble("theirs", steps).apply(requests)
    doc = data.document(data.SOURCES["mmlu_pro"], PROBLEMS["mmlu_pro"][0] | {"options": list("abcd")})
    ours = scoring.mmlu_pro([[text] for text in texts], [doc] * len(texts))
    for request, (sample,) in zip(requests, ours, strict=True):
        assert (sample["answers"]["strict"] or "[invalid]") == request.filtered_resps["theirs"]
    assert [sample["answers"]["flexible"] for (sample,) in ours] == ["B", "B", "B", "B", "B", None]


def test_the_question_of_mmlu_pro_is_the_harness_s() -> None:
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.tasks.mmlu_pro.utils import doc_to_text

    row = PROBLEMS["mmlu_pro"][1]
    own = load_yaml(Path(lm_eval.__file__).parent / "tasks/mmlu_pro/mmlu_pro_math.yaml", resolve_func=False)
    asked = data.document(data.SOURCES["mmlu_pro"], row)["prompt"]
    assert asked == own["description"] + doc_to_text({"question": row["prompt"], "options": row["options"]})


def hub_form(name: str, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A local row as the hub has it."""
    pick: Callable[..., dict[str, Any]] = lambda *keys: {key: row[key] for key in keys}  # noqa: E731
    tail = row["id"].rpartition("/")[2]
    if name == "gsm8k":
        return {"question": row["problem"], "answer": f"3 * 400 = <<3*400>>\n#### {int(row['answer']):,}"}
    if name == "math500":
        return pick("problem", "answer", "level", "subject", "solution", "unique_id")
    if name == "amc":
        return {"id": int(tail), "problem": row["problem"], "answer": float(row["answer"]), "url": "u"}
    if name == "aime24":
        return {"id": int(tail), "problem": row["problem"], "answer": row["answer"], "solution": "s", "url": "u"}
    if name == "aime25":
        return {"question": row["problem"], "answer": row["answer"]}
    if name == "humaneval":
        return {"task_id": row["id"], "canonical_solution": row["answer"], **pick("prompt", "entry_point", "test")}
    if name == "mbpp":
        return {"code": row["answer"], "source_file": "f", **pick("prompt", "task_id", "test_list", "test_imports")}
    if name == "livecodebench":
        private = json.dumps(row["private_test_cases"])
        packed = base64.b64encode(zlib.compress(pickle.dumps(private))).decode()
        return {
            "question_id": tail,
            "question_content": row["prompt"],
            "metadata": json.dumps(row["metadata"]),
            "public_test_cases": json.dumps(row["public_test_cases"]),
            "private_test_cases": packed if number else private,
            **pick("starter_code", "platform", "contest_id", "difficulty"),
        }
    if name == "cruxeval":
        return {"id": tail, **pick("code", "input", "output")}
    if name == "mmlu_pro":
        return {
            "question_id": int(tail),
            "question": row["prompt"],
            "category": row["subject"],
            **pick("answer", "options"),
        }
    names = {"relation", "num_words", "num_bullets"}
    filled = [{key: given.get(key) for key in names} for given in row["kwargs"]]
    return {**pick("key", "prompt", "instruction_id_list"), "kwargs": filled}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_hub_gives_the_same_documents(name: str, problems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = data.SOURCES[name]
    asked: list[Any] = []

    def load_dataset(path: str, configuration: str | None = None, **given: Any) -> Any:
        asked.append((path, configuration, given))
        part = "/i/" if configuration == "AIME2025-I" else "/ii/" if configuration == "AIME2025-II" else "/"
        rows = [row for row in PROBLEMS[name] if part in row["id"]]
        return datasets.Dataset.from_list([hub_form(name, number, row) for number, row in enumerate(rows)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    remote, local = data.documents(name), data.documents(name, str(problems))
    for ours, theirs in zip(remote, local, strict=True):
        for field in ("id", "prompt", "gold"):
            assert ours[field] == theirs[field]
        mine, other = json.loads(ours["row"]), json.loads(theirs["row"])
        shared = (mine.keys() & other.keys()) - {"solution"}
        assert {key: mine[key] for key in shared} == {key: other[key] for key in shared}
        read_by_scorers = {
            "options",
            "kwargs",
            "instruction_id_list",
            "test",
            "test_list",
            "private_test_cases",
            "code",
        }
        assert read_by_scorers & other.keys() <= shared
    for path, _, given in asked:
        assert source.hub in (
            path,
            *[file.split("@")[0].removeprefix("hf://datasets/") for file in given.get("data_files", ())],
        )
        assert given["split"] == source.split


def test_a_hub_out_of_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **given: Any) -> Any:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(EvalError, match=r"gsm8k: openai/gsm8k cannot be loaded .*gsm8k_test.jsonl with --data_dir"):
        data.documents("gsm8k")


def test_private_tests_may_hold_no_code() -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return print, ("boom",)

    from vigor.evaluation import hub_rows

    packed = base64.b64encode(zlib.compress(pickle.dumps(Bomb()))).decode()
    with pytest.raises(pickle.UnpicklingError, match="not data"):
        hub_rows._private_tests(packed)


def test_the_task_files_work_with_the_harness_itself(model: str, problems: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata={"data_dir": str(problems)})
    assert sorted(manager.all_tasks) == sorted(benchmark.task for benchmark in BENCHMARKS.values())
    found = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": model, "device": "cpu"},
        tasks=["vigor_gsm8k", "vigor_lab_math"],
        limit=1,
        gen_kwargs="max_gen_toks=2",
        task_manager=manager,
    )
    assert found["results"]["vigor_gsm8k"]["flexible,scored"] == 0.0
    assert len(found["samples"]["vigor_lab_math"][0]["strict"]) == 4
