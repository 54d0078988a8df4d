"""What a good row is: the checks that every prompt and answer passes, whatever file it came from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

PROMPT_COLUMNS = ("prompt", "problem", "question", "messages")
"""Looked for in this order where no prompt column is named."""
ANSWER_COLUMN = "answer"
ROLES = ("system", "user", "assistant", "tool")
SHOWN_BAD_ROWS = 20
KEPT_BAD_ROWS = 1000

Prompt = str | list[dict[str, str]]


class DataError(ValueError):
    """The prompts cannot be used. The message names the rows by file and line and ends with the remedy."""


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used.

    ``line`` counts from 1: the physical line on which the row starts in jsonl, json and csv files, the row's number
    in parquet files, hub data sets and lab tasks.
    """

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


class RowError(Exception):
    """Why the row at hand is bad; caught by the loader, which knows file and line."""


@dataclass(frozen=True)
class GoodRow:
    """A checked row. ``extras`` holds the file's other columns."""

    prompt: Prompt
    answer: str | None
    extras: dict[str, Any]


class FloatText(float):
    """A number of a JSON file that remembers how it was written, so that the answer 0.50 stays "0.50"."""

    text: str

    def __new__(cls, text: str) -> FloatText:
        number = super().__new__(cls, text)
        number.text = text
        return number


@dataclass
class RowChecker:
    """Turns raw rows into good ones. The first row settles what is left open: the column and the kind of prompt.

    ``count_tokens`` encodes each prompt, so that one that cannot be encoded is refused too; ``max_prompt_length`` is
    the budget in tokens, None for no limit.
    """

    prompt_column: str | None
    answer_column: str | None
    system_prompt: str | None
    count_tokens: Callable[[Prompt], int] | None
    max_prompt_length: int | None
    found_answers: bool = False
    conversational: bool | None = None

    def __post_init__(self) -> None:
        self._answer_is_required = self.answer_column is not None
        self.answer_name = self.answer_column or ANSWER_COLUMN

    @property
    def taken_columns(self) -> set[str]:
        """Columns of the file that do not come through as extras: used, or hidden by ``prompt`` and ``answer``."""
        return {"prompt", "answer", self.answer_name, self.prompt_column or "prompt"}

    def settle_columns(self, columns: Sequence[str]) -> None:
        """Choose the prompt column of a file whose header is known; raises RowError where a named column is not."""
        if self.prompt_column is None:
            self.prompt_column = _detect_prompt_column(columns)
        for column in (self.prompt_column, self.answer_name if self._answer_is_required else None):
            if column is not None and column not in columns:
                raise RowError(_missing(column, columns))

    def check(self, row: Mapping[str, Any]) -> GoodRow:
        """The row's prompt, answer and other columns; raises RowError with the reason where it is bad."""
        self.settle_columns(list(row))
        assert self.prompt_column is not None
        prompt = self._check_prompt(row[self.prompt_column])
        answer = None
        if self.answer_name in row:
            answer = check_answer(row[self.answer_name], self.answer_name)
            self.found_answers = True
        taken = self.taken_columns
        return GoodRow(prompt, answer, {key: value for key, value in row.items() if key not in taken})

    def _check_prompt(self, value: Any) -> Prompt:
        column = f"column '{self.prompt_column}'"
        prompt: Prompt
        if value is None:
            raise RowError(f"{column} is null")
        if isinstance(value, str):
            _check_text(value, column)
            prompt = value
            if self.system_prompt is not None:
                prompt = [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": value}]
        elif isinstance(value, list):
            prompt = check_conversation(value, column)
            if self.system_prompt is not None and prompt[0]["role"] != "system":
                prompt = [{"role": "system", "content": self.system_prompt}, *prompt]
        else:
            raise RowError(f"{column} is {_kind(value)}, expected text or a list of messages")

        conversational = not isinstance(prompt, str)
        if self.conversational is not None and conversational != self.conversational:
            kinds = ("plain text", "a conversation")
            raise RowError(
                f"{column} is {kinds[conversational]}, but the first good row is {kinds[not conversational]}: one "
                "file holds one kind"
            )
        if self.count_tokens is not None:
            length = self.count_tokens(prompt)
            if self.max_prompt_length is not None and length > self.max_prompt_length:
                raise RowError(f"the prompt has {length} tokens, max_prompt_length is {self.max_prompt_length}")
        self.conversational = conversational
        return prompt


def check_conversation(messages: Sequence[Any], column: str) -> list[dict[str, str]]:
    """The messages as plain role/content dictionaries; raises RowError for any structure a template cannot take."""
    if not messages:
        raise RowError(f"{column} is an empty list of messages")
    checked = []
    for number, message in enumerate(messages, start=1):
        where = f"{column}, message {number}"
        if not isinstance(message, dict):
            raise RowError(f"{where} is {_kind(message)}, expected an object with 'role' and 'content'")
        absent = [key for key in ("role", "content") if message.get(key) is None]
        if absent:
            raise RowError(f"{where} has no '{absent[0]}' (keys: {', '.join(map(str, message)) or 'none'})")
        unknown = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
        if unknown:
            raise RowError(f"{where} has the key '{unknown[0]}': only 'role' and 'content' are supported")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLES:
            raise RowError(f"{where} has the role {role!r}, expected one of {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise RowError(f"{where} is a system turn: it can only come first")
        if not isinstance(content, str):
            raise RowError(f"{where}: content is {_kind(content)}, expected text")
        _check_text(content, where)
        checked.append({"role": role, "content": content})
    if checked[-1]["role"] != "user":
        raise RowError(f"{column} ends with a turn of the {checked[-1]['role']}, expected one of the user")
    return checked


def check_answer(value: Any, column: str) -> str | None:
    """The reference answer as text; None for null, NaN and blank ones. A number keeps the text it was written as."""
    # Data frames write a missing number as NaN.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        raise RowError(f"column '{column}' is {_kind(value)}, expected text, a number or null")
    if isinstance(value, FloatText):
        return value.text
    if not isinstance(value, str):
        return str(value)
    if not value.strip():
        return None
    _check_characters(value, f"column '{column}'")
    return value


def describe_bad_rows(bad: Sequence[BadRow], n_bad: int, n_rows: int, remedy: str) -> str:
    """The message of a DataError: the first bad rows, how many more there are, and the remedy."""
    shown = bad[:SHOWN_BAD_ROWS]
    lines = [f"{n_bad} of {n_rows} rows cannot be used:", *(f"  {row}" for row in shown)]
    if n_bad > len(shown):
        lines.append(f"  and {n_bad - len(shown)} more")
    return "\n".join([*lines, remedy])


def _detect_prompt_column(columns: Sequence[str]) -> str:
    for column in PROMPT_COLUMNS:
        if column in columns:
            return column
    raise RowError(f"none of the columns {', '.join(PROMPT_COLUMNS)} is there ({_listed(columns)})")


def _missing(column: str, columns: Sequence[str]) -> str:
    return f"column '{column}' is missing ({_listed(columns)})"


def _listed(columns: Sequence[str]) -> str:
    names = ", ".join(columns[:20]) + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")
    return f"columns: {names or 'none'}"


def _check_text(text: str, where: str) -> None:
    if not text.strip():
        raise RowError(f"{where} is {'blank' if text else 'empty'}")
    _check_characters(text, where)


_UNUSABLE = re.compile("[\x00\ud800-\udfff]")


def _check_characters(text: str, where: str) -> None:
    found = _UNUSABLE.search(text)
    if found:
        what = "a NUL character" if found[0] == "\x00" else f"half a surrogate pair (U+{ord(found[0]):04X})"
        raise RowError(f"{where} has {what} at character {found.start()}")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    for kind, name in names.items():
        if isinstance(value, kind):
            return name
    return f"of type {type(value).__name__}"
