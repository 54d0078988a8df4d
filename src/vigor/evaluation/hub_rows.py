"""Rows of the hub's data sets in the fields of the local files: (row, number in the split, configuration) -> row."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from typing import Any

Row = dict[str, Any]


def gsm8k(row: Row, number: int, configuration: str | None) -> Row:
    """The answer is what follows ``####``, without thousands separators."""
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return {"id": f"gsm8k/test/{number}", "problem": row["question"], "answer": answer, "solution": row["answer"]}


def math500(row: Row, number: int, configuration: str | None) -> Row:
    fields = {key: row[key] for key in ("problem", "answer", "level", "subject", "solution", "unique_id")}
    return {"id": f"math500/{row['unique_id']}", **fields}


def amc(row: Row, number: int, configuration: str | None) -> Row:
    """Answers are numbers there: 142.0."""
    return {"id": f"amc83/{row['id']}", "problem": row["problem"], "answer": _integer(row["answer"])}


def aime24(row: Row, number: int, configuration: str | None) -> Row:
    return {"id": f"aime24/{row['id']}", "problem": row["problem"], "answer": _integer(row["answer"])}


def aime25(row: Row, number: int, configuration: str | None) -> Row:
    part = (configuration or "").rpartition("-")[2].lower()
    return {"id": f"aime25/{part}/{number + 1}", "problem": row["question"], "answer": _integer(row["answer"])}


def humaneval(row: Row, number: int, configuration: str | None) -> Row:
    fields = {key: row[key] for key in ("prompt", "entry_point", "test")}
    return {"id": row["task_id"], **fields, "answer": row["canonical_solution"]}


def mbpp(row: Row, number: int, configuration: str | None) -> Row:
    fields = {key: row[key] for key in ("prompt", "task_id", "test_list", "test_imports")}
    return {"id": f"mbpp/{row['task_id']}", **fields, "answer": row["code"], "split": "test"}


def livecodebench(row: Row, number: int, configuration: str | None) -> Row:
    """With the private tests, which the hub holds as JSON or as a compressed pickle of JSON."""
    fields = {key: row[key] for key in ("starter_code", "platform", "contest_id", "difficulty")}
    return {
        "id": f"lcb/{row['question_id']}",
        "prompt": row["question_content"],
        "answer": None,
        **fields,
        "metadata": json.loads(row["metadata"]),
        "public_test_cases": json.loads(row["public_test_cases"]),
        "private_test_cases": _private_tests(row["private_test_cases"]),
    }


def cruxeval(row: Row, number: int, configuration: str | None) -> Row:
    fields = {key: row[key] for key in ("code", "input", "output")}
    return {"id": f"cruxeval/{row['id']}", "answer": row["output"], **fields}


def mmlu_pro(row: Row, number: int, configuration: str | None) -> Row:
    return {
        "id": f"mmlu_pro/{row['question_id']}",
        "prompt": row["question"],
        "answer": row["answer"],
        "options": row["options"],
        "subject": row["category"],
    }


def ifeval(row: Row, number: int, configuration: str | None) -> Row:
    """Arrow gives every instruction every argument, None where it has none; these are left out."""
    arguments = [{key: value for key, value in given.items() if value is not None} for given in row["kwargs"]]
    fields = {key: row[key] for key in ("prompt", "key", "instruction_id_list")}
    return {"id": f"ifeval/{row['key']}", "answer": None, **fields, "kwargs": arguments}


def _integer(value: Any) -> str:
    text = str(value).strip()
    return str(int(float(text))) if text.replace(".", "", 1).lstrip("-").isdigit() else text


class _TextOnly(pickle.Unpickler):
    """Loads text, numbers and containers; a pickle that names a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"private tests hold {module}.{name}, which is not data")


def _private_tests(text: str) -> list[dict[str, str]]:
    try:
        tests: list[dict[str, str]] = json.loads(text)
    except json.JSONDecodeError:
        content = zlib.decompress(base64.b64decode(text))
        tests = json.loads(_TextOnly(io.BytesIO(content)).load())
    return tests
