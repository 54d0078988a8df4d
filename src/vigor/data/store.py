"""Checked rows into an Arrow file on disk, which `datasets.Dataset` maps into memory: a batch at a time in RAM.

The type of an extra column is known only when its last row has been seen. Rows therefore go to a first file with their
extra columns as JSON text, and `finish` writes the second, typed one.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigor.data.rows import GoodRow, Prompt, RowError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BATCH_ROWS = 1024
BATCH_BYTES = 32 * 2**20
_INT64 = 2**63


def new_folder() -> Path:
    """A private folder under the temporary directory (``TMPDIR``), removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="vigor-data-"))
    owner = os.getpid()

    def remove() -> None:
        # A forked worker that runs exit handlers must not take the files from its parent.
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def prompt_type(conversational: bool) -> pa.DataType:
    import pyarrow as pa

    if not conversational:
        return pa.string()
    return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class ArrowFile:
    """An Arrow stream file in the making: append batches of one schema, then map it."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        import pyarrow as pa

        self.path = path
        self.schema = schema
        self._writer = pa.ipc.new_stream(str(path), schema)

    def append(self, columns: Sequence[pa.Array | list[Any]]) -> None:
        import pyarrow as pa

        arrays = [
            pa.array(column, type=field.type) if isinstance(column, list) else column.cast(field.type)
            for column, field in zip(columns, self.schema, strict=True)
        ]
        self._writer.write_batch(pa.record_batch(arrays, schema=self.schema))

    def close(self) -> None:
        self._writer.close()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The batches of the closed file. No memory map: its pages would count as this process's memory."""
        import pyarrow as pa

        with pa.OSFile(str(self.path)) as source:
            yield from pa.ipc.open_stream(source)

    def dataset(self) -> Dataset:
        """The closed file as a data set: nothing is read until a row is asked for."""
        from datasets import Dataset

        return Dataset.from_file(str(self.path))


class RowStore:
    """Collects `GoodRow` values of unknown extra columns."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kinds: dict[str, str | None] = {}
        self._prompts: list[Prompt] = []
        self._answers: list[str | None] = []
        self._extras: list[str] = []
        self._bytes = 0
        self._file: ArrowFile | None = None

    def add(self, row: GoodRow) -> None:
        """Append one row. Raises RowError where an extra column holds text that UTF-8 cannot."""
        extras = json.dumps(row.extras, ensure_ascii=False, default=str)
        try:
            self._bytes += len(extras.encode()) + len(row.prompt if isinstance(row.prompt, str) else str(row.prompt))
        except UnicodeEncodeError as error:
            raise RowError(f"a column besides the prompt has half a surrogate pair: {error.reason}") from error
        for column, value in row.extras.items():
            self._kinds[column] = _merge(self._kinds.get(column), _kind(value))
        self._prompts.append(row.prompt)
        self._answers.append(row.answer)
        self._extras.append(extras)
        if len(self._prompts) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self._flush()

    def finish(self, with_answers: bool) -> Dataset:
        """The data set of all rows added (at least one), in their order."""
        import pyarrow as pa

        self._flush()
        spool = self._file
        assert spool is not None, "finish() needs at least one row"
        spool.close()
        kinds = {column: kind or "string" for column, kind in self._kinds.items()}
        fields = [spool.schema.field("prompt")] + [spool.schema.field("answer")] * with_answers
        schema = pa.schema(fields + [pa.field(column, _arrow_type(kind)) for column, kind in kinds.items()])
        final = ArrowFile(self._folder / "prompts.arrow", schema)
        for batch in spool.batches():
            rows = [json.loads(extras) for extras in batch.column("extras").to_pylist()] if kinds else []
            columns = [[_cast(row.get(column), kind) for row in rows] for column, kind in kinds.items()]
            final.append([batch.column("prompt")] + [batch.column("answer")] * with_answers + columns)
        final.close()
        spool.path.unlink()
        return final.dataset()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._prompts:
            return
        if self._file is None:
            prompts = prompt_type(conversational=not isinstance(self._prompts[0], str))
            schema = pa.schema([("prompt", prompts), ("answer", pa.string()), ("extras", pa.string())])
            self._file = ArrowFile(self._folder / "spool.arrow", schema)
        self._file.append([self._prompts, self._answers, self._extras])
        self._prompts, self._answers, self._extras, self._bytes = [], [], [], 0


def _kind(value: Any) -> str | None:
    """One of string, bool, int64, double; a list of one of them as ``list:int64``; ``json`` for everything else."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -_INT64 <= value < _INT64 else "json"
    if isinstance(value, float):
        return "double"
    if isinstance(value, str):
        return "string"
    if isinstance(value, list):
        inner: str | None = None
        for item in value:
            inner = _merge(inner, _kind(item))
        nested = inner == "json" or (inner or "").startswith("list:")
        return "json" if nested else f"list:{inner or ''}"
    return "json"


def _merge(a: str | None, b: str | None) -> str | None:
    """The kind that holds values of both kinds."""
    if a is None or a == b:
        return b
    if b is None:
        return a
    if {a, b} == {"int64", "double"}:
        return "double"
    if a.startswith("list:") and b.startswith("list:"):
        inner = _merge(a[5:] or None, b[5:] or None)
        return "json" if inner == "json" else f"list:{inner}"
    return "json"


def _arrow_type(kind: str) -> pa.DataType:
    import pyarrow as pa

    if kind.startswith("list:"):
        return pa.list_(_arrow_type(kind[5:] or "string"))
    types: Mapping[str, pa.DataType] = {"bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64()}
    return types.get(kind, pa.string())


def _cast(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "json":
        return json.dumps(value, ensure_ascii=False)
    if kind == "double":
        return float(value)
    if kind == "list:double":
        return [None if item is None else float(item) for item in value]
    return value
