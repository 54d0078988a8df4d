from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vigor.data import BadRow, DataError, load_prompts
from vigor.data import rows as data_rows


def load(tmp_path: Path, lines: list[Any], **options: Any) -> Any:
    """Load a jsonl file; bytes are lines as they are, everything else is written as JSON."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return load_prompts(str(path), **options)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"text": "x", "id": 1}, "column 'prompt' is missing (columns: text, id)"),
        ({"prompt": None}, "column 'prompt' is null"),
        ({"prompt": ""}, "column 'prompt' is empty"),
        ({"prompt": " \n\t"}, "column 'prompt' is blank"),
        ({"prompt": 12}, "column 'prompt' is a number, expected text or a list of messages"),
        ({"prompt": True}, "column 'prompt' is a truth value, expected text or a list of messages"),
        ({"prompt": {"text": "x"}}, "column 'prompt' is an object, expected text or a list of messages"),
        ({"prompt": "a\x00b"}, "column 'prompt' has a NUL character at character 1"),
        (b'{"prompt": "ab\\ud800"}', "column 'prompt' has half a surrogate pair (U+D800) at character 2"),
        (b'{"prompt": "a"', "invalid JSON: Expecting ',' delimiter at character 14"),
        (b'{"prompt": "a"} {}', "invalid JSON: Extra data at character 16"),
        (b'{"prompt": "a\xffb"}', "invalid UTF-8: byte 0xff at offset 13 of the line"),
        (b"[" * 100_000, "invalid JSON: "),
        ([1, 2], "expected a JSON object, found [1, 2]"),
        ("text", 'expected a JSON object, found "text"'),
        ({"prompt": "x", "answer": [1]}, "column 'answer' is a list, expected text, a number or null"),
        ({"prompt": "x", "answer": True}, "column 'answer' is a truth value, expected text, a number or null"),
        (b'{"prompt": "x", "note": "\\udfff"}', "a column besides the prompt has half a surrogate pair"),
        ({"prompt": [turn("user", "x")]}, "column 'prompt' is a conversation, but the first good row is plain text"),
    ],
)
def test_bad_rows_are_named_and_skipped(tmp_path: Path, line: Any, reason: str) -> None:
    lines = [{"prompt": "good", "answer": "1"}, b"", line, {"prompt": "good too", "answer": "2"}]
    with pytest.raises(DataError) as caught:
        load(tmp_path, lines)
    message = str(caught.value).splitlines()
    assert message[0] == "1 of 3 rows cannot be used:"
    assert message[1].startswith(f"  {tmp_path / 'prompts.jsonl'}:3: {reason}")
    assert "--skip_bad_rows" in message[-1]

    data = load(tmp_path, lines, skip_bad_rows=True)
    assert data.dataset["prompt"][:] == ["good", "good too"]
    assert data.dataset["answer"][:] == ["1", "2"]
    assert (data.n_rows, data.n_bad_rows, len(data.bad_rows)) == (2, 1, 1)
    assert isinstance(data.bad_rows[0], BadRow) and data.bad_rows[0].line == 3


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "is an empty list"),
        (["hi"], "message 1 is text"),
        ([{"role": "user"}], "message 1 has no 'content' (keys: role)"),
        ([{"content": "x"}], "message 1 has no 'role' (keys: content)"),
        ([turn("human", "x")], "message 1 has the role 'human', expected one of system, user, assistant, tool"),
        ([turn("user", 3)], "message 1: content is a number"),
        ([turn("user", [{"type": "text", "text": "x"}])], "message 1: content is a list"),
        ([turn("user", " ")], "message 1 is blank"),
        ([turn("user", "a\x00")], "message 1 has a NUL character at character 1"),
        ([turn("user", "x"), turn("assistant", "y")], "ends with a turn of the assistant"),
        ([turn("system", "x")], "ends with a turn of the system"),
        ([turn("user", "x"), turn("system", "y"), turn("user", "z")], "message 2 is a system turn"),
        ([{**turn("user", "x"), "tool_calls": [1]}], "message 1 has the key 'tool_calls'"),
    ],
)
def test_bad_conversations(tmp_path: Path, messages: list[Any], reason: str) -> None:
    lines = [{"messages": [turn("user", "x")]}, {"messages": messages}]
    data = load(tmp_path, lines, skip_bad_rows=True)
    assert data.n_rows == 1
    assert [row.line for row in data.bad_rows] == [2]
    assert reason in data.bad_rows[0].reason


def test_good_conversations_keep_role_and_content(tmp_path: Path) -> None:
    talk = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    data = load(tmp_path, [{"messages": [{**message, "name": None} for message in talk]}])
    assert data.dataset[0]["prompt"] == talk


def test_the_prompt_column_is_found_in_the_documented_order(tmp_path: Path) -> None:
    row = {"messages": [turn("user", "m")], "question": "q", "problem": "p", "prompt": "x"}
    for column, expected in [("prompt", "x"), ("problem", "p"), ("question", "q"), ("messages", row["messages"])]:
        assert load(tmp_path, [row]).dataset[0]["prompt"] == expected
        del row[column]
        row["id"] = 1


def test_no_known_prompt_column(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, [{"text": "a"}, {"text": "b"}], skip_bad_rows=True)
    assert "none of the columns prompt, problem, question, messages is there (columns: text)" in str(caught.value)
    assert "--prompt_column" in str(caught.value)
    assert "--skip_bad_rows" not in str(caught.value)
    assert load(tmp_path, [{"text": "a"}], prompt_column="text").dataset[:] == {"prompt": ["a"]}


def test_named_columns_hide_the_ones_they_replace(tmp_path: Path) -> None:
    row = {"prompt": "old", "answer": "old", "q": "new", "solution": 3, "id": 7}
    data = load(tmp_path, [row], prompt_column="q", answer_column="solution")
    assert data.dataset[:] == {"prompt": ["new"], "answer": ["3"], "id": [7]}


def test_a_named_answer_column_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'solution' is missing"):
        load(tmp_path, [{"prompt": "x"}], answer_column="solution")
    csv = tmp_path / "p.csv"
    csv.write_text("prompt\nx\n")
    with pytest.raises(DataError, match="column 'solution' is missing"):
        load_prompts(str(csv), answer_column="solution")


def test_answers_keep_the_text_of_numbers(tmp_path: Path) -> None:
    numbers = [b"2", b"-0.50", b"1e3", b"12345678901234567890123", b"null", b'""', b'" a "', b"NaN"]
    data = load(tmp_path, [b'{"prompt": "x", "answer": ' + number + b"}" for number in numbers])
    assert data.dataset["answer"][:] == ["2", "-0.50", "1e3", "12345678901234567890123", None, None, " a ", None]


def test_no_answer_column_without_answers(tmp_path: Path) -> None:
    assert load(tmp_path, [{"prompt": "x"}]).dataset.column_names == ["prompt"]
    assert load(tmp_path, [{"prompt": "x"}, {"prompt": "y", "answer": 1}]).dataset["answer"][:] == [None, "1"]


def test_extra_columns_of_one_type_stay_and_mixed_ones_become_json(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "n": 1, "x": 1, "mixed": 1, "tests": ["t"], "nested": {"a": [1]}, "flag": True, "none": None},
        {"prompt": "b", "n": 2, "x": 2.5, "mixed": ["é"], "tests": [], "nested": None, "late": "z", "big": 2**70},
        {"prompt": "a", "n": None, "x": None, "mixed": "1", "tests": None, "nested": {"b": 2}, "flag": False},
    ]
    dataset = load(tmp_path, rows).dataset
    assert dataset["prompt"][:] == ["a", "b", "a"]
    assert dataset["n"][:] == [1, 2, None]
    assert dataset["x"][:] == [1.0, 2.5, None]
    assert dataset["tests"][:] == [["t"], [], None]
    assert dataset["flag"][:] == [True, None, False]
    assert dataset["late"][:] == [None, "z", None]
    assert dataset["none"][:] == [None, None, None]
    assert dataset["mixed"][:] == ["1", '["é"]', '"1"']
    assert dataset["nested"][:] == ['{"a": [1]}', None, '{"b": 2}']
    assert dataset["big"][:] == [None, str(2**70), None]


def test_a_system_prompt_makes_conversations(tmp_path: Path) -> None:
    rows = [{"prompt": "x"}, {"prompt": [turn("user", "y")]}, {"prompt": [turn("system", "own"), turn("user", "z")]}]
    data = load(tmp_path, rows, system_prompt="Be brief.")
    assert data.dataset["prompt"][:] == [
        [turn("system", "Be brief."), turn("user", "x")],
        [turn("system", "Be brief."), turn("user", "y")],
        [turn("system", "own"), turn("user", "z")],
    ]
    with pytest.raises(DataError, match="system prompt is blank"):
        load(tmp_path, rows, system_prompt=" ")


def test_the_message_shows_twenty_rows_and_counts_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"prompt": ""}] * 33 + [{"prompt": "x"}]
    with pytest.raises(DataError) as caught:
        load(tmp_path, lines)
    message = str(caught.value).splitlines()
    assert message[0] == "33 of 34 rows cannot be used:"
    assert message[20].endswith(":20: column 'prompt' is empty")
    assert message[21] == "  and 13 more"
    monkeypatch.setattr("vigor.data.load.KEPT_BAD_ROWS", 25)
    data = load(tmp_path, lines, skip_bad_rows=True)
    assert (len(data.bad_rows), data.n_bad_rows, data.n_rows) == (25, 33, 1)


def test_all_rows_bad_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        load(tmp_path, [{"prompt": ""}, b"{"], skip_bad_rows=True)


def test_limit_keeps_the_first_good_rows_and_reads_no_further(tmp_path: Path) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b"}, b"broken"]
    assert load(tmp_path, lines, limit=2).dataset["prompt"][:] == ["a", "b"]
    assert load(tmp_path, [b"broken", *lines], limit=2, skip_bad_rows=True).dataset["prompt"][:] == ["a", "b"]
    with pytest.raises(DataError, match="limit=0"):
        load(tmp_path, lines, limit=0)


def test_files_have_no_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split='test'"):
        load(tmp_path, [{"prompt": "a"}], split="test")


def test_a_line_over_the_size_limit_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vigor.data.files.MAX_ROW_BYTES", 2**20)
    lines = [{"prompt": "a"}, {"prompt": "x" * 3 * 2**20}, {"prompt": "b"}]
    data = load(tmp_path, lines, skip_bad_rows=True)
    assert data.dataset["prompt"][:] == ["a", "b"]
    assert [(row.line, row.reason) for row in data.bad_rows] == [(2, "the line is longer than 1 MiB")]


def test_checks_know_nothing_of_files() -> None:
    checker = data_rows.RowChecker(None, None, None, None, None)
    assert checker.check({"question": "q", "k": 1}) == data_rows.GoodRow("q", None, {"k": 1})
