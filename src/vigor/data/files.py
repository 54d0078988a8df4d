"""Rows out of jsonl, json and csv files, one at a time, so that memory does not grow with the file.

Each reader yields ``(line, row)`` with the physical line on which the row starts (from 1), or a `RowError` in the
row's place. What makes the rest of a file unreadable raises DataError.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from vigor.data.rows import DataError, FloatText, RowError

RawRow = tuple[int, dict[str, Any] | RowError]

MAX_ROW_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")


def read_rows(path: Path, kind: str) -> Iterator[RawRow]:
    """The rows of a file of ``kind`` jsonl, json or csv, through gzip where its name ends in .gz."""
    reader = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv}[kind]
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            yield from reader(path, cast("IO[bytes]", stream))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged ({error}): compress it again") from error


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | RowError]]:
    """Physical lines with their numbers, without a byte order mark; one over the size limit comes as a RowError."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            while not line.endswith(b"\n") and (line := stream.readline(_CHUNK_BYTES)):
                pass
            yield number, RowError(f"the line is longer than {MAX_ROW_BYTES >> 20} MiB")
            continue
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _read_jsonl(path: Path, stream: IO[bytes]) -> Iterator[RawRow]:
    for number, line in _lines(stream):
        if isinstance(line, RowError):
            yield number, line
        elif line.strip():
            yield number, _parse_object(line)


def _parse_object(line: bytes) -> dict[str, Any] | RowError:
    try:
        value = json.loads(line.rstrip(b"\r\n").decode("utf-8"), parse_float=FloatText)
    except UnicodeDecodeError as error:
        return RowError(_invalid_utf8(error, error.start))
    except json.JSONDecodeError as error:
        return RowError(f"invalid JSON: {error.msg} at character {error.pos}")
    except (ValueError, RecursionError) as error:
        return RowError(f"invalid JSON: {error}")
    return value if isinstance(value, dict) else RowError(_not_an_object(value))


def _invalid_utf8(error: UnicodeDecodeError, offset: int, whole: str = "the line") -> str:
    return f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset} of {whole}"


def _not_an_object(value: Any) -> str:
    shown = json.dumps(value)
    return f"expected a JSON object, found {shown if len(shown) <= 40 else shown[:40] + '…'}"


def _read_csv(path: Path, stream: IO[bytes]) -> Iterator[RawRow]:
    decoder = _CsvLines(path, stream)
    with _csv_field_limit(MAX_ROW_BYTES):
        reader = csv.reader(decoder, strict=True)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:1: the header is not valid CSV ({error})") from error
        if header is None:
            return
        if decoder.problem is not None:
            raise DataError(f"{path}:1: the header has {decoder.problem}")
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(f"{path}:1: the column name {repeated[0]!r} appears twice: rename one of them")
        while True:
            start, decoder.problem = decoder.number + 1, None
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield start, RowError(f"invalid CSV: {error}")
                continue
            if decoder.problem is not None:
                yield start, RowError(decoder.problem)
            elif len(fields) == len(header):
                yield start, dict(zip(header, fields, strict=True))
            elif fields:
                yield start, RowError(f"the row has {len(fields)} fields, the header has {len(header)}")


class _CsvLines:
    """Decoded physical lines for `csv.reader`. ``problem`` is what was wrong with the lines of the row at hand."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.number = 0
        self.problem: str | None = None
        self._lines = _lines(stream)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if isinstance(line, RowError):
            self.problem = self.problem or str(line)
            return "\n"
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.problem = self.problem or _invalid_utf8(error, error.start, f"line {self.number}")
            return line.decode("utf-8", errors="replace")


@contextmanager
def _csv_field_limit(limit: int) -> Iterator[None]:
    # The limit belongs to the whole process: it is put back for everybody else.
    before = csv.field_size_limit(limit)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_json(path: Path, stream: IO[bytes]) -> Iterator[RawRow]:
    """The elements of a top-level array, or of the one array inside a top-level object."""
    text = _JsonText(path, stream)
    opening = text.peek()
    if opening == "[":
        yield from _read_array(text)
    elif opening == "{":
        yield from _read_wrapped_array(text)
    elif opening:
        raise text.error("expected an array of objects, or an object that holds one array")
    if text.peek():
        raise text.error("text after the end of the JSON value")


def _read_wrapped_array(text: _JsonText) -> Iterator[RawRow]:
    text.take("{")
    arrays: list[str] = []
    closed = text.peek() == "}"
    while not closed:
        key = text.value()
        if not isinstance(key, str):
            raise text.error("invalid JSON: the key of an object must be text")
        text.take(":")
        if text.peek() == "[":
            arrays.append(key)
            if len(arrays) > 1:
                raise text.error(
                    f"the object holds several arrays ('{arrays[0]}', '{arrays[1]}'): keep the one with the prompts"
                )
            yield from _read_array(text)
        else:
            text.value()
        closed = text.take(",}") == "}"
    if not arrays:
        raise text.error("the object holds no array of rows; for one object a line use the suffix .jsonl")


def _read_array(text: _JsonText) -> Iterator[RawRow]:
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    closed = False
    while not closed:
        text.peek()
        line, value = text.line, text.value()
        yield line, value if isinstance(value, dict) else RowError(_not_an_object(value))
        closed = text.take(",]") == "]"


class _JsonText:
    """A window that moves over a JSON file: values are parsed out of it one by one.

    A JSON error leaves no way to find the next row, so every problem here is a DataError, not a RowError.
    """

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.line = 1
        self._path = path
        self._stream = stream
        self._decoder = json.JSONDecoder(parse_float=FloatText)
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._position = 0
        self._bytes_read = 0
        self._ended = False

    def error(self, problem: str) -> DataError:
        return DataError(
            f"{self._path}:{self.line}: {problem}. The rows of a .json file cannot be told apart after an error: "
            "repair the file, or convert it to .jsonl (one object a line), where --skip_bad_rows works"
        )

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            end = _SPACE.match(self._text, self._position).end()  # type: ignore[union-attr]  # matches always
            self._move(end)
            if end < len(self._text):
                return self._text[end]
            if not self._read(_CHUNK_BYTES):
                return ""

    def take(self, expected: str) -> str:
        """The next character, which must be one of ``expected``."""
        found = self.peek()
        if not found or found not in expected:
            wanted = " or ".join(f"'{character}'" for character in expected)
            raise self.error(f"invalid JSON: expected {wanted}, found {repr(found) if found else 'the end'}")
        self._move(self._position + 1)
        return found

    def value(self) -> Any:
        """The next JSON value."""
        self.peek()
        size = _CHUNK_BYTES
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                complete, problem = self._ended or len(self._text) - self._position > MAX_ROW_BYTES, error.msg
            except (ValueError, RecursionError) as error:
                raise self.error(f"invalid JSON: {error}") from error
            else:
                # A number at the window's edge may go on behind it.
                if end < len(self._text) or self._ended or not self._read(_CHUNK_BYTES):
                    self._move(end)
                    return value
                continue
            if complete:
                raise self.error(f"invalid JSON: {problem}")
            self._read(size)
            size *= 2

    def _move(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def _read(self, size: int) -> bool:
        """Add to the window; False at the end of the file."""
        data = self._stream.read(size)
        if not self._bytes_read:
            self._bytes_read = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
            data = data.removeprefix(codecs.BOM_UTF8)
        self._bytes_read += len(data)
        try:
            new = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # The decoder's bytes begin with what the last call left over, and end where the reading stands.
            offset = self._bytes_read - len(error.object) + error.start
            self.line += self._text.count("\n", self._position) + error.object.count(b"\n", 0, error.start)
            raise self.error(_invalid_utf8(error, offset, "the file")) from error
        self._text = self._text[self._position :] + new
        self._position = 0
        self._ended = not data
        return bool(data)
