"""What an evaluation leaves: results.json, results.md, problems/TASK.parquet, and the table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from vigor.evaluation.metrics import Measure, measures
from vigor.evaluation.suites import Benchmark, EvalError

EXTRACTIONS = ("strict", "flexible")

Row = dict[str, Any]


def rows_of(samples: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows of the parquet file from the harness's logged samples."""
    rows = []
    for logged in samples:
        group = logged["filtered_resps"][0]
        row: Row = {
            "id": logged["doc"]["id"],
            "prompt": logged["arguments"][0][0],
            "gold": logged["doc"]["gold"],
            "samples": [sample["text"] for sample in group],
        }
        for key in EXTRACTIONS:
            for field in ("answers", "correct", "votes", "parts"):
                if key in group[0].get(field, ()):
                    row[f"{field}_{key}"] = [sample[field][key] for sample in group]
        rows.append(row)
    return rows


def measures_of(rows: Sequence[Row]) -> dict[str, dict[str, Measure]]:
    """{measure: {extraction: Measure}}."""
    found: dict[str, dict[str, Measure]] = {}
    for key in EXTRACTIONS:
        if f"correct_{key}" in rows[0]:
            votes = [row[f"votes_{key}"] for row in rows] if f"votes_{key}" in rows[0] else None
            parts = [list(chain(*row[f"parts_{key}"])) for row in rows] if f"parts_{key}" in rows[0] else None
            for name, measure in measures([row[f"correct_{key}"] for row in rows], votes, parts).items():
                found.setdefault(name, {})[key] = measure
    return found


def write_problems(folder: Path, benchmark: Benchmark, rows: Sequence[Row]) -> None:
    """problems/TASK.parquet: a row a problem, without the labels of votes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = problems_file(folder, benchmark.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [{key: value for key, value in row.items() if not key.startswith("votes_")} for row in rows]
    pq.write_table(pa.Table.from_pylist(kept), path)


def read_problems(folder: Path, task: str) -> list[Row]:
    """The rows of a task. Raises EvalError where the file is not there."""
    import pyarrow.parquet as pq

    path = problems_file(folder, task)
    if not path.is_file():
        raise EvalError(f"{path} is not there, though results.json of that folder names the task {task}.")
    rows: list[Row] = pq.read_table(path).to_pylist()
    return rows


def problems_file(folder: Path, task: str) -> Path:
    """Where the problems of a task are written."""
    return folder / "problems" / f"{task.replace(':', '_')}.parquet"


def read(folder: Path) -> dict[str, Any]:
    """results.json of a folder. Raises EvalError where there is none."""
    path = folder / "results.json"
    if not path.is_file():
        raise EvalError(f"{folder} holds no results.json: give folders that `vigor eval` has written.")
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """results.json and results.md, each replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("results.json", json.dumps(content, indent=2) + "\n"), ("results.md", markdown(content))):
        temporary = folder / f".{name}"
        temporary.write_text(text, "utf-8")
        temporary.replace(folder / name)


def table(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: a line a measure, extractions side by side, in percent with the interval."""
    lines: list[tuple[str, ...]] = [("task", "problems", "decoding", "measure", *EXTRACTIONS)]
    for name, task in content["tasks"].items():
        head = (name, f"{task['problems']:,}", decoding(task["generation"], task["samples"]))
        for measure, found in task["measures"].items():
            lines.append((*head, measure, *(_cell(found[key]) if key in found else "–" for key in EXTRACTIONS)))
            head = ("", "", "")
    return lines


def markdown(content: Mapping[str, Any]) -> str:
    """The table with what one must know to read it."""
    model, settings = content["model"], content["settings"]
    head, *rows = table(content)
    lines = [
        f"# {model['name']}",
        "",
        f"vigor {content['versions']['vigor']}, lm-evaluation-harness {content['versions']['lm_eval']}, "
        f"{settings['backend']}, {settings['dtype']}, seed {settings['seed']}, "
        f"chat template: {'yes' if settings['chat_template'] else 'no'}, prompt: {settings['prompt']}, "
        f"{content['date']}. Model content: {model['key']}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * 4 + "---:|" * len(EXTRACTIONS),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "In percent, with 95 % intervals. Strict: the answer in the form that was asked for; flexible: the last thing "
        "that could be the answer (IFEval: the loose checks).",
        "",
    ]
    lines += [
        f"- {name}: {task['source']}; {task['note']}" if task["note"] else f"- {name}: {task['source']}"
        for name, task in content["tasks"].items()
    ]
    return "\n".join(lines) + "\n"


def decoding(generation: Mapping[str, Any], samples: int) -> str:
    """Such as "greedy" and "8 samples, T 0.6"."""
    if not generation.get("do_sample"):
        return "greedy"
    return f"{samples} sample{'s' * (samples > 1)}, T {generation['temperature']:g}"


def _cell(measure: Mapping[str, Any]) -> str:
    return f"{100 * measure['value']:.1f} [{100 * measure['low']:.1f}, {100 * measure['high']:.1f}]"
