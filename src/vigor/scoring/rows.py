"""Completions in: one a row or several, from jsonl, json, csv or parquet, each row checked and named by its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigor.data import DataError, encode_prompt
from vigor.data.files import read_rows
from vigor.data.load import KINDS
from vigor.data.rows import BadRow, Prompt, RowChecker, RowError, describe_bad_rows
from vigor.data.tables import read_parquet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONE, SEVERAL = "completion", "completions"
"""The columns with a row's completion, or with a list of them."""
TRUNCATED = "truncated"
"""A column that says of a completion that it hit the token budget: it gets no EOS."""


@dataclass(frozen=True)
class Sample:
    """A row: a prompt, its completions, and the row's other columns."""

    prompt: Prompt
    completions: tuple[str, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    """`answer` among them, where the row has one."""
    line: int = 0
    """Where it stands in its file, from 1; 0 where it came from none."""
    truncated: bool = False
    several: bool = False
    """Whether the row had a list of completions."""


def read_samples(
    source: str,
    *,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    reject: Callable[[int, str], None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[Sample]:
    """The rows of a file, one at a time.

    Args:
        source: a .jsonl, .ndjson, .json, .csv (each also .gz) or .parquet file.
        prompt_column, answer_column: as in `vigor.data.load_prompts`.
        reject: called with (line, reason) for each row that cannot be used; without it such a row raises.
        tokenizer: also refuses what this tokenizer cannot encode, or what is longer than its model's context.

    Raises:
        DataError: no such file, an unknown format, a damaged file, or, without `reject`, a row that cannot be used.
    """
    path = Path(source)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    kind = KINDS.get(suffix.lower())
    if not path.is_file():
        raise DataError(f"no such file: {source} (looked in {Path.cwd()}).")
    if kind is None:
        raise DataError(f"{source}: the format is not known: use {', '.join(KINDS)}.")
    checker = RowChecker(prompt_column, answer_column, None, None, None)
    for line, row in _parquet_rows(path) if kind == "parquet" else read_rows(path, kind):
        try:
            if isinstance(row, RowError):
                raise row
            sample = _sample(line, row, checker)
            if tokenizer is not None:
                _check_tokens(sample, tokenizer)
            yield sample
        except RowError as error:
            if reject is None:
                raise DataError(f"{source}:{line}: {error}") from error
            reject(line, str(error))


def check_file(
    source: str, tokenizer: PreTrainedTokenizerBase | None, *, skip_bad_rows: bool, **columns: Any
) -> Census:
    """Reads the whole file once, row by row, and says what is in it.

    Raises:
        DataError: a row cannot be used and `skip_bad_rows` is not set, or no row can; names the rows by line.
    """
    bad: list[BadRow] = []
    census = Census()

    def reject(line: int, reason: str) -> None:
        bad.append(BadRow(source, line, reason))

    for sample in read_samples(source, reject=reject, tokenizer=tokenizer, **columns):
        census.add(sample)
    if bad and (not skip_bad_rows or not census.rows):
        remedy = "Remedy: repair the rows" + (", or leave them out with --skip_bad_rows." if census.rows else ".")
        raise DataError(describe_bad_rows(bad, len(bad), census.rows + len(bad), remedy))
    if not census.completions:
        raise DataError(f"{source}: no completions: the file is empty.")
    census.bad_rows = len(bad)
    return census


@dataclass
class Census:
    """What a file of completions holds."""

    rows: int = 0
    completions: int = 0
    bad_rows: int = 0
    columns: set[str] | None = None
    """The columns that every row has."""

    def add(self, sample: Sample) -> None:
        """Counts one row."""
        self.rows += 1
        self.completions += len(sample.completions)
        self.columns = set(sample.columns) if self.columns is None else self.columns & set(sample.columns)


def _sample(line: int, row: dict[str, Any], checker: RowChecker) -> Sample:
    checker.conversational = None  # a file may mix texts and conversations: no data set is made of it
    good = checker.check({key: value for key, value in row.items() if key not in (ONE, SEVERAL, TRUNCATED)})
    if (ONE in row) == (SEVERAL in row):
        raise RowError(
            f"a row needs either the column {ONE!r} or {SEVERAL!r}, this one has "
            f"{'both' if ONE in row else 'neither'} (columns: {', '.join(row)})"
        )
    several = SEVERAL in row
    written = row[SEVERAL] if several else [row[ONE]]
    if not isinstance(written, list) or not written:
        raise RowError(f"column {SEVERAL!r} must be a list with at least one text")
    texts = tuple(_text(value, SEVERAL if several else ONE) for value in written)
    truncated = row.get(TRUNCATED)
    if truncated is not None and (several or not isinstance(truncated, bool)):
        raise RowError(f"column {TRUNCATED!r} must be true or false, beside one {ONE!r}")
    columns = {key: value for key, value in good.extras.items() if key not in (ONE, SEVERAL)}
    if good.answer is not None:
        columns["answer"] = good.answer
    return Sample(good.prompt, texts, columns, line, bool(truncated), several)


def _text(value: Any, column: str) -> str:
    """A completion as text; of a conversation the content of its only message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise RowError(f"column {column!r} holds {type(value).__name__}, expected text or one message of the assistant")
    if bad := [c for c in value if "\ud800" <= c <= "\udfff"]:
        raise RowError(f"column {column!r} has half a surrogate pair (U+{ord(bad[0]):04X})")
    return value


def _check_tokens(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> None:
    from jinja2 import TemplateError

    try:
        prompt = len(encode_prompt(tokenizer, sample.prompt))
    except TemplateError as error:
        raise RowError(f"the chat template refuses the prompt: {error}") from error
    if not prompt:
        raise RowError("the prompt has no tokens, so that nothing predicts the completion's first one")
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in sample.completions)
    if prompt + longest + 1 > tokenizer.model_max_length:
        raise RowError(
            f"prompt and completion have {prompt} + {longest} tokens and an EOS, the model's context is "
            f"{tokenizer.model_max_length}"
        )


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    line = 0
    for batch in read_parquet(path)[1]:
        for index in range(batch.num_rows):
            line += 1
            try:
                yield line, batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield line, RowError(f"invalid UTF-8 at byte {error.start}")
