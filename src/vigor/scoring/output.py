"""Scores out: a file that a killed run leaves whole up to its last complete row, and that the next run continues."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vigor.data import DataError
from vigor.scoring.rows import ONE, Sample

PREFIX = "score/"
"""A signal's column is this and its name."""


@dataclass(frozen=True)
class PartFile:
    """`OUT.part`, one JSON object a completion, and `OUT.part.json`, what it is made of; both go when OUT is written.

    Raises:
        DataError: OUT exists; a part exists and `resume` is not set, or belongs to other settings.
    """

    out: Path
    settings: Mapping[str, Any]
    resume: bool

    def __post_init__(self) -> None:
        if self.out.suffix not in (".jsonl", ".parquet"):
            raise DataError(f"--out {self.out}: name a .jsonl or .parquet file.")
        if self.out.exists():
            raise DataError(f"--out {self.out} exists: remove it, or name another file.")
        if not self.out.parent.is_dir():
            raise DataError(f"--out {self.out}: there is no folder {self.out.parent}.")
        if not self.rows.exists():
            return
        if not self.resume:
            raise DataError(
                f"{self.rows} is the beginning of an unfinished run: continue it with --resume, or remove it."
            )
        before = json.loads(self.head.read_text("utf-8"))
        for key, value in self.settings.items():
            if before.get(key) != value:
                raise DataError(
                    f"--resume: {self.rows} was made with {key}={before.get(key)!r}, now it is {value!r}. Run it with "
                    "the settings that it had, or remove it."
                )

    @property
    def rows(self) -> Path:
        """One line a completion."""
        return self.out.with_name(self.out.name + ".part")

    @property
    def head(self) -> Path:
        """The settings that made the rows."""
        return self.out.with_name(self.out.name + ".part.json")

    def begin(self) -> int:
        """Makes the part, or cuts off its last line where that is incomplete; returns how many rows it holds."""
        if not self.rows.exists():
            self.head.write_text(json.dumps(dict(self.settings)), "utf-8")
            self.rows.touch()
            return 0
        whole = count = 0
        with self.rows.open("rb+") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                count += 1
            stream.truncate(whole)
        return count

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows; they are the file system's when this returns."""
        with self.rows.open("a", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

    def read(self) -> Iterator[dict[str, Any]]:
        """The rows, in order."""
        with self.rows.open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)

    def finish(self, best_of: str | None) -> int:
        """Writes OUT, all rows or the best one of each prompt, and removes the part; returns the number of rows."""
        rows = self.read() if best_of is None else best(self.read(), PREFIX + best_of)
        made = self.out.with_name(self.out.name + ".tmp")
        count = _write_parquet(rows, made) if self.out.suffix == ".parquet" else _write_jsonl(rows, made)
        os.replace(made, self.out)
        self.rows.unlink()
        self.head.unlink()
        return count


def rows_of(sample: Sample, scores: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The output rows of an input row, one a completion: its columns, where it stood, and the scores.

    NaN (no opinion) becomes null.
    """
    return [
        {
            "prompt": sample.prompt,
            ONE: text,
            **sample.columns,
            "line": sample.line,
            "index": index,
            **{PREFIX + name: None if math.isnan(value) else value for name, value in found.items()},
        }
        for index, (text, found) in enumerate(zip(sample.completions, scores, strict=True))
    ]


def best(rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[dict[str, Any]]:
    """Of neighbouring rows with the same prompt the one with the highest score, the first of equals.

    A completion without a score is chosen only where none has one. `of` says how many there were to choose from.
    """
    chosen: dict[str, Any] | None = None
    count = 0
    for row in rows:
        if chosen is not None and row["prompt"] != chosen["prompt"]:
            yield {**chosen, "of": count}
            chosen, count = None, 0
        count += 1
        score = row[column]
        if chosen is None or (score is not None and (chosen[column] is None or score > chosen[column])):
            chosen = dict(row)
    if chosen is not None:
        yield {**chosen, "of": count}


def _write_jsonl(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Rows as a table, by way of Arrow's own JSON reader, which finds one type for each column."""
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet

    lines = path.with_name(path.name + ".jsonl")
    count = _write_jsonl(rows, lines)
    try:
        table = pyarrow.json.read_json(lines)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path}: some column holds values of several types, which parquet cannot ({error}). Write .jsonl instead."
        ) from error
    finally:
        lines.unlink()
    pyarrow.parquet.write_table(table, path)
    return count
