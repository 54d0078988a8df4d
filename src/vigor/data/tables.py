"""Rows out of what is Arrow already: parquet files and hub data sets. Extra columns keep their types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigor.data.rows import DataError, GoodRow, RowChecker, RowError
from vigor.data.store import BATCH_ROWS, ArrowFile, prompt_type

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Batches = tuple["pa.Schema", Iterator["pa.RecordBatch"]]


def read_parquet(path: Path) -> Batches:
    """Schema and batches of a parquet file; raises DataError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error

    def batches() -> Iterator[pa.RecordBatch]:
        with file:
            try:
                yield from file.iter_batches(batch_size=BATCH_ROWS)
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"{path}: the parquet file is damaged ({error})") from error

    return file.schema_arrow, batches()


def read_hub(source: str, split: str) -> Batches:
    """Schema and batches of the hub data set ``name`` or ``name:config``; raises DataError where it cannot be had."""
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the hub data set {name!r} (config {config or 'default'!r}, split {split!r}) could not be loaded: "
            f"{type(error).__name__}: {error}. Without a network, give a file (.jsonl, .json, .csv, .parquet) or a "
            "lab: task; a private data set needs `hf auth login`"
        ) from error
    table = dataset.with_format("arrow")
    batches = (batch for part in table.iter(batch_size=BATCH_ROWS) for batch in part.combine_chunks().to_batches())
    return dataset.features.arrow_schema, batches


def copy_tables(
    source: str,
    read: Batches,
    checker: RowChecker,
    folder: Path,
    reject: Callable[[int, str], None],
    limit: int | None,
) -> tuple[Dataset | None, int]:
    """The good rows, at most ``limit`` of them, as a data set (None if there are none), and the number of rows read.

    ``reject(line, reason)`` is told every bad row. Raises DataError for a missing column, or one of a type that a
    data set cannot hold.
    """
    schema, batches = read
    try:
        checker.settle_columns(schema.names)
    except RowError as error:
        raise DataError(f"{source}: {error}: name the right one with --prompt_column and --answer_column") from error
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise DataError(f"{source}: the column name {repeated[0]!r} appears twice: rename one of them")
    extras = [field for field in schema if field.name not in checker.taken_columns]
    extra_fields = [_storable(source, field) for field in extras]
    used = [name for name in schema.names if name in (checker.prompt_column, checker.answer_name)]

    file: ArrowFile | None = None
    n_read = n_good = 0
    for batch in batches:
        good: list[GoodRow] = []
        indices: list[int] = []
        bad_extras = _undecodable(batch, [field.name for field in extras])
        for index, cells in enumerate(zip(*(_cells(batch.column(name)) for name in used), strict=True)):
            n_read += 1
            row = dict(zip(used, cells, strict=True))
            try:
                for column, value in [*row.items(), *bad_extras.get(index, {}).items()]:
                    if isinstance(value, UnicodeDecodeError):
                        raise RowError(f"column '{column}' has invalid UTF-8 at byte {value.start}")
                good.append(checker.check(row))
                indices.append(index)
            except RowError as error:
                reject(n_read, str(error))
            if limit is not None and n_good + len(good) == limit:
                break
        n_good += len(good)
        if good:
            if file is None:
                file = ArrowFile(folder / "prompts.arrow", _schema(checker, extra_fields))
            _append(file, batch.take(indices), good, [field.name for field in extras])
        if n_good == limit:
            break
    if file is None:
        return None, n_read
    file.close()
    return file.dataset(), n_read


def _schema(checker: RowChecker, extra_fields: list[pa.Field]) -> pa.Schema:
    import pyarrow as pa

    fields = [pa.field("prompt", prompt_type(bool(checker.conversational)))]
    fields += [pa.field("answer", pa.string())] * checker.found_answers
    return pa.schema(fields + extra_fields)


def _append(file: ArrowFile, batch: pa.RecordBatch, good: list[GoodRow], extras: list[str]) -> None:
    columns: list[Any] = [[row.prompt for row in good]]
    if "answer" in file.schema.names:
        columns.append([row.answer for row in good])
    file.append(columns + [batch.column(name) for name in extras])


def _storable(source: str, field: pa.Field) -> pa.Field:
    """The field with a type that `datasets` can hold."""
    import pyarrow as pa
    from datasets import Features

    if pa.types.is_dictionary(field.type):
        field = pa.field(field.name, field.type.value_type)
    elif pa.types.is_string_view(field.type):
        field = pa.field(field.name, pa.string())
    try:
        Features.from_arrow_schema(pa.schema([field]))
    except ValueError as error:
        raise DataError(
            f"{source}: column '{field.name}' has the type {field.type}, which a data set cannot hold: remove it"
        ) from error
    return pa.field(field.name, field.type)


def _cells(column: pa.Array) -> list[Any]:
    """The values as Python objects, a UnicodeDecodeError in the place of text that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_cell(value) for value in column]


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


def _undecodable(batch: pa.RecordBatch, columns: list[str]) -> dict[int, dict[str, UnicodeDecodeError]]:
    """Row index -> column -> error, for extra columns whose text is not UTF-8; they would fail much later."""
    import pyarrow as pa

    found: dict[int, dict[str, UnicodeDecodeError]] = {}
    for name in columns:
        try:
            batch.column(name).validate(full=True)
        except pa.ArrowInvalid:
            for index, value in enumerate(_cells(batch.column(name))):
                if isinstance(value, UnicodeDecodeError):
                    found.setdefault(index, {})[name] = value
    return found
