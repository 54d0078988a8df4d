"""The benchmarks' problems, from local jsonl files or from the hub: one shape of document for both.

A local row has the fields that docs/eval.md lists; a row of the hub is brought into the same fields, and the document
is made from them. A document has ``id``, ``prompt`` (what the model reads), ``gold`` (text, "" where there is none) and
``row`` (the fields as JSON, which the scorers read).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vigor.evaluation import hub_rows, questions
from vigor.evaluation.suites import EvalError

Row = dict[str, Any]
Document = dict[str, str]

VARIABLE = "VIGOR_DATA_DIR"
LAB_PROBLEMS = 300


@dataclass(frozen=True)
class Source:
    """Where a benchmark's problems lie."""

    file: str
    """Below the data folder."""
    hub: str
    """Data set on the hub."""
    split: str
    normal: Callable[[Row, int, str | None], Row]
    """(row of the hub, its number in the split, configuration) -> the fields of a local row."""
    question: Callable[[Row], str]
    configurations: tuple[str | None, ...] = (None,)
    files: tuple[str, ...] = ()
    """jsonl files of the hub's data set; none: its split is loaded."""
    revision: str = "main"
    keep: Callable[[Row], bool] = lambda row: True


SOURCES: dict[str, Source] = {
    "gsm8k": Source("gsm8k_test.jsonl", "openai/gsm8k", "test", hub_rows.gsm8k, questions.plain, ("main",)),
    "math500": Source("math500.jsonl", "HuggingFaceH4/MATH-500", "test", hub_rows.math500, questions.plain),
    "amc": Source("amc83.jsonl", "AI-MO/aimo-validation-amc", "train", hub_rows.amc, questions.plain),
    "aime24": Source("aime24.jsonl", "HuggingFaceH4/aime_2024", "train", hub_rows.aime24, questions.plain),
    "aime25": Source(
        "aime25.jsonl",
        "opencompass/AIME2025",
        "test",
        hub_rows.aime25,
        questions.plain,
        ("AIME2025-I", "AIME2025-II"),
    ),
    "humaneval": Source("humaneval.jsonl", "openai/openai_humaneval", "test", hub_rows.humaneval, questions.humaneval),
    "mbpp": Source(
        "mbpp_sanitized.jsonl",
        "google-research-datasets/mbpp",
        "test",
        hub_rows.mbpp,
        questions.mbpp,
        ("sanitized",),
        keep=lambda row: bool(row["split"] == "test"),
    ),
    "livecodebench": Source(
        "livecodebench_public.jsonl",
        "livecodebench/code_generation_lite",
        "train",
        hub_rows.livecodebench,
        questions.livecodebench,
        files=("test5.jsonl", "test6.jsonl"),
    ),
    "cruxeval": Source("cruxeval.jsonl", "cruxeval-org/cruxeval", "test", hub_rows.cruxeval, questions.cruxeval),
    "mmlu_pro": Source("mmlu_pro.jsonl", "TIGER-Lab/MMLU-Pro", "test", hub_rows.mmlu_pro, questions.mmlu_pro),
    "ifeval": Source("ifeval.jsonl", "google/IFEval", "train", hub_rows.ifeval, questions.ifeval),
}


def load(name: str, data_dir: str | None = None, **metadata: Any) -> dict[str, Any]:
    """{"test": documents as a `datasets.Dataset`}: what a task file's ``custom_dataset`` returns.

    ``data_dir``: folder with the local files; None: $VIGOR_DATA_DIR, and the hub where that is unset. ``metadata`` is
    what the harness passes besides. Raises EvalError for a file that is missing or a row that lacks a field.
    """
    from datasets import Dataset

    return {"test": Dataset.from_list(documents(name, data_dir))}


def documents(name: str, data_dir: str | None = None) -> list[dict[str, str]]:
    """The documents of a benchmark, in the data set's order; raises as `load` does."""
    if name.startswith("lab:"):
        from vigor.lab.tasks import make_rows

        rows = make_rows(name, "test", LAB_PROBLEMS)
        return [
            {"id": f"{name}/{i}", "prompt": row["prompt"], "gold": row["answer"], "row": json.dumps(row)}
            for i, row in enumerate(rows)
        ]
    source = SOURCES[name]
    folder = data_dir or os.environ.get(VARIABLE)
    rows = _local(name, source, Path(folder)) if folder else _remote(name, source)
    try:
        return [document(source, row) for row in rows if source.keep(row)]
    except KeyError as error:
        where = f"{folder}/{source.file}" if folder else source.hub
        raise EvalError(f"{name}: a row of {where} has no field {error}; docs/eval.md lists the fields.") from error


def document(source: Source, row: Row) -> Document:
    """The document of a row with the local fields."""
    gold = row["answer"] if row["answer"] is not None else ""
    return {"id": row["id"], "prompt": source.question(row), "gold": gold, "row": json.dumps(row, ensure_ascii=False)}


def origin(name: str, data_dir: str | None = None) -> str:
    """Where `load` takes a benchmark from: a file, a data set of the hub, or the lab."""
    if name.startswith("lab:"):
        return f"{name}, split test"
    source, folder = SOURCES[name], data_dir or os.environ.get(VARIABLE)
    return str(Path(folder) / source.file) if folder else f"hub: {source.hub}@{source.revision}, {source.split}"


def digest(docs: Iterable[Mapping[str, str]]) -> str:
    """SHA-256 of documents: two runs with the same one met the same problems."""
    text = json.dumps([[doc["id"], doc["prompt"], doc["gold"], doc["row"]] for doc in docs])
    return hashlib.sha256(text.encode()).hexdigest()


def _local(name: str, source: Source, folder: Path) -> list[Row]:
    path = folder / source.file
    if not path.is_file():
        raise EvalError(
            f"{name}: {path} is not there. Put the file into --data_dir (or ${VARIABLE}), or name neither, and "
            f"{source.hub} is loaded from the hub. docs/eval.md lists files and fields."
        )
    rows = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise EvalError(f"{name}: line {number} of {path} is no JSON: {error}") from error
    return rows


def _remote(name: str, source: Source) -> list[Row]:
    rows = []
    for configuration in source.configurations:
        try:
            found = _hub_rows(source, configuration)
        except Exception as error:  # the hub's client raises errors of several libraries
            raise EvalError(
                f"{name}: {source.hub} cannot be loaded from the hub ({type(error).__name__}: "
                f"{str(error).strip()[:300]}). Name a folder that holds {source.file} with --data_dir or ${VARIABLE}, "
                "or bring the network back."
            ) from error
        rows += [source.normal(row, number, configuration) for number, row in enumerate(found)]
    return rows


def _hub_rows(source: Source, configuration: str | None) -> Any:
    from datasets import load_dataset

    if source.files:
        files = [f"hf://datasets/{source.hub}@{source.revision}/{file}" for file in source.files]
        return load_dataset("json", data_files=files, split=source.split)
    return load_dataset(source.hub, configuration, split=source.split, revision=source.revision)
