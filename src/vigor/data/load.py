"""`load_prompts`: one name in, one checked data set out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigor.data.encode import encode_prompt
from vigor.data.files import read_rows
from vigor.data.rows import KEPT_BAD_ROWS, BadRow, DataError, Prompt, RowChecker, RowError, describe_bad_rows
from vigor.data.store import RowStore, new_folder
from vigor.data.tables import copy_tables, read_hub, read_parquet

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
LAB_PREFIX = "lab:"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class PromptData:
    """Checked prompts.

    ``dataset`` has the column ``prompt`` (text, or a list of role/content messages), ``answer`` (text or None) where
    the source has an answer column, and the source's other columns. ``n_rows`` is its length. ``bad_rows`` holds the
    first 1,000 rows that were skipped, ``n_bad_rows`` counts them all.
    """

    dataset: Dataset
    source: str
    n_rows: int
    bad_rows: tuple[BadRow, ...]
    n_bad_rows: int


def load_prompts(
    source: str,
    *,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str | None = None,
    split: str = "train",
    limit: int | None = None,
    skip_bad_rows: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_prompt_length: int | None = None,
    seed: int = 0,
    lab_size: int = 4096,
) -> PromptData:
    """Read prompts, check every row, and keep them in an Arrow file on disk (memory does not grow with the source).

    ``source`` is a file (.jsonl, .ndjson, .json, .csv, each also with .gz, or .parquet), a lab task (``lab:math``), or
    a hub data set (``name`` or ``name:config``). The prompt column is the first of prompt, problem, question and
    messages unless named, the answer column is ``answer`` if there is one. ``system_prompt`` turns plain text into
    [system, user] conversations and goes before conversations that have no system turn. ``split`` applies to lab tasks
    and hub data sets, ``seed`` and ``lab_size`` (rows made) to lab tasks. ``limit`` keeps the first good rows and
    reads no further. With a ``tokenizer``, prompts that it cannot encode are bad rows, and with ``max_prompt_length``
    (tokens, template included) those that are longer. With ``skip_bad_rows`` bad rows are left out and counted;
    without it one is enough to stop.

    Raises DataError, with the bad rows by line and a remedy, where the source cannot be used as asked; ValueError for
    ``max_prompt_length`` without a tokenizer.
    """
    if max_prompt_length is not None and tokenizer is None:
        raise ValueError(f"max_prompt_length={max_prompt_length} counts tokens: pass the tokenizer too")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} leaves no prompt: give at least 1, or None for all rows")
    if system_prompt is not None and not system_prompt.strip():
        raise DataError("the system prompt is blank: leave --system_prompt out for none")
    kind, path = _resolve(source)
    if path is not None and split != "train":
        raise DataError(f"split={split!r}: the file {source} has no splits. Name the file that holds that split")

    checker = RowChecker(prompt_column, answer_column, system_prompt, _token_counter(tokenizer), max_prompt_length)
    bad: list[BadRow] = []
    n_bad = 0

    def reject(line: int, reason: str) -> None:
        nonlocal n_bad
        n_bad += 1
        if n_bad <= KEPT_BAD_ROWS:
            bad.append(BadRow(source, line, reason))

    folder = new_folder()
    if kind == "parquet" or kind == "hub":
        read = read_parquet(path) if path is not None else read_hub(source, split)
        dataset, n_read = copy_tables(source, read, checker, folder, reject, limit)
    else:
        rows = read_rows(path, kind) if path is not None else _lab_rows(source, split, limit or lab_size, seed)
        dataset, n_read = _copy_rows(rows, checker, RowStore(folder), reject, limit)

    if n_read == 0:
        raise DataError(f"{source}: no rows: the {'file' if path is not None else 'data set'} is empty")
    if dataset is None or (n_bad and not skip_bad_rows):
        raise DataError(describe_bad_rows(bad, n_bad, n_read, _remedy(bad, all_bad=dataset is None)))
    return PromptData(dataset, source, len(dataset), tuple(bad), n_bad)


def _copy_rows(
    rows: Iterable[tuple[int, dict[str, Any] | RowError]],
    checker: RowChecker,
    store: RowStore,
    reject: Callable[[int, str], None],
    limit: int | None,
) -> tuple[Dataset | None, int]:
    n_read = n_good = 0
    for line, row in rows:
        n_read += 1
        try:
            if isinstance(row, RowError):
                raise row
            store.add(checker.check(row))
            n_good += 1
        except RowError as error:
            reject(line, str(error))
        if n_good == limit:
            break
    return (store.finish(checker.found_answers) if n_good else None), n_read


def _resolve(source: str) -> tuple[str, Path | None]:
    """What ``source`` is (a kind of file, "lab" or "hub"), and its path where it is a file."""
    if source.startswith(LAB_PREFIX):
        return "lab", None
    path = Path(source).expanduser()
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    kind = KINDS.get(suffix.lower())
    formats = ", ".join(KINDS)
    if path.is_dir():
        raise DataError(f"{source} is a directory: name one file in it ({formats})")
    if path.exists() and not path.is_file():
        raise DataError(f"{source} is a pipe or a device: name a regular file ({formats})")
    if path.is_file():
        if kind is None or (kind == "parquet" and path.suffix == ".gz"):
            raise DataError(f"{source}: the format of '{path.name}' is not known: use {formats}, or .gz of a text one")
        return kind, path
    if kind is not None or source.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(source):
        raise DataError(
            f"no such file: {source} (looked in {Path.cwd()}). Prompts are a file ({formats}), a lab task "
            f"({LAB_PREFIX}math) or a hub data set (name or name:config)"
        )
    return "hub", None


def _lab_rows(task: str, split: str, n: int, seed: int) -> Iterable[tuple[int, dict[str, Any]]]:
    from vigor.lab.tasks import make_rows

    try:
        rows = make_rows(task, split, n, seed=seed)
    except ValueError as error:
        raise DataError(str(error)) from error
    return enumerate((dict(row) for row in rows), start=1)


def _token_counter(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Prompt], int] | None:
    if tokenizer is None:
        return None
    from jinja2 import TemplateError

    def count(prompt: Prompt) -> int:
        try:
            return len(encode_prompt(tokenizer, prompt))
        except TemplateError as error:
            raise RowError(f"the chat template refuses the prompt: {error}") from error

    return count


def _remedy(bad: list[BadRow], *, all_bad: bool) -> str:
    reasons = " ".join(row.reason for row in bad)
    remedies = []
    if "is missing" in reasons or "none of the columns" in reasons:
        remedies.append("name the columns with --prompt_column and --answer_column")
    if "max_prompt_length" in reasons:
        remedies.append("raise --max_prompt_length")
    if not all_bad:
        remedies.append("leave the bad rows out with --skip_bad_rows")
    remedies.append("repair the rows")
    return f"Remedy: {', or '.join(remedies)}."
