from __future__ import annotations

import csv
import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vigor.data import DataError, load_prompts

ROWS: list[dict[str, Any]] = [
    {"id": "a", "problem": "1+1?", "answer": "2", "level": 1},
    {"id": "b", "problem": "2+2?\nSay it.", "answer": 4, "level": 2},
    {"id": "c", "problem": "½ of «x»", "answer": None, "level": 3},
]
PROMPTS = [row["problem"] for row in ROWS]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(path: Path, rows: list[Any]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_as(kind: str, folder: Path) -> str:
    path = folder / f"prompts.{kind}"
    if kind in ("jsonl", "ndjson"):
        return jsonl(path, ROWS)
    if kind == "jsonl.gz":
        return write(path, gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    if kind == "json":
        return write(path, json.dumps(ROWS, indent=1))
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
        return str(path)
    rows = [{**row, "answer": None if row["answer"] is None else str(row["answer"])} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "jsonl.gz", "json", "csv", "parquet"])
def test_every_format_gives_the_same_prompts_and_answers(tmp_path: Path, kind: str) -> None:
    data = load_prompts(write_as(kind, tmp_path))
    assert data.dataset["prompt"][:] == PROMPTS
    assert data.dataset["answer"][:] == ["2", "4", None]
    assert [str(level) for level in data.dataset["level"]] == ["1", "2", "3"]
    assert data.dataset.column_names == ["prompt", "answer", "id", "level"]
    assert (data.n_rows, data.bad_rows, data.n_bad_rows) == (3, (), 0)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, kind: str) -> None:
    source = Path(write_as(kind, tmp_path))
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    data = load_prompts(str(source))
    assert data.dataset["prompt"][:] == PROMPTS
    assert data.dataset["id"][:] == ["a", "b", "c"]


def test_one_array_inside_an_object(tmp_path: Path) -> None:
    text = json.dumps({"version": "1", "meta": {"n": [1, 2]}, "data": ROWS, "end": None})
    assert load_prompts(write(tmp_path / "p.json", text)).dataset["prompt"][:] == PROMPTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a"},\n {"prompt": "b"\n {"prompt": "c"}]', "p.json:2: invalid JSON: Expecting ',' delimiter"),
        ('[{"prompt": "a"}', "expected ',' or ']', found the end"),
        ('[{"prompt": "a"}] x', "text after the end"),
        ('{"a": [{"prompt": "a"}], "b": []}', "several arrays ('a', 'b')"),
        ('{"prompt": "a"}', "holds no array"),
        ('"prompt"', "expected an array of objects"),
        (b'[{"prompt": "a"},\n{"prompt": "\xff"}]', "p.json:2: invalid UTF-8: byte 0xff at offset 30 of the file"),
    ],
)
def test_what_makes_a_json_file_unreadable(tmp_path: Path, text: str | bytes, message: str) -> None:
    source = write(tmp_path / "p.json", text)
    with pytest.raises(DataError) as caught:
        load_prompts(source, skip_bad_rows=True)
    assert message in str(caught.value)
    assert "convert it to .jsonl" in str(caught.value)


def test_a_json_file_larger_than_the_reading_window(tmp_path: Path) -> None:
    rng = random.Random(0)
    prompts = ["é" * rng.randrange(1, 40) + f' {i} \\ " ]}} ' for i in range(30_000)] + ["x" * 3_000_000, "end"]
    rows = [{"prompt": prompt, "n": i} for i, prompt in enumerate(prompts)]
    source = write(tmp_path / "p.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    data = load_prompts(source)
    assert data.dataset["prompt"][:] == prompts
    assert data.dataset["n"][:] == list(range(len(prompts)))


def test_csv_lines_are_physical_lines(tmp_path: Path) -> None:
    text = (
        'id,prompt,answer\r\n1,"two\r\nlines ""quoted"", and a comma",4\r\n\r\n2,,5\r\n3,"four\n\n\nlines",\r\n4,x\r\n'
        '5,"a"b,1\r\n6,fine,"1,000"\r\n7,"never closed\r\n'
    )
    data = load_prompts(write(tmp_path / "p.csv", text), skip_bad_rows=True)
    assert data.dataset["prompt"][:] == ['two\r\nlines "quoted", and a comma', "four\n\n\nlines", "fine"]
    assert data.dataset["answer"][:] == ["4", None, "1,000"]
    assert [(row.line, row.reason.split(":")[0]) for row in data.bad_rows] == [
        (5, "column 'prompt' is empty"),
        (10, "the row has 2 fields, the header has 3"),
        (11, "invalid CSV"),
        (13, "invalid CSV"),
    ]


def test_csv_with_invalid_utf8_names_line_and_byte(tmp_path: Path) -> None:
    source = write(tmp_path / "p.csv", b'prompt,answer\n"a\nb\xe9c",1\nok,2\n')
    data = load_prompts(source, skip_bad_rows=True)
    assert data.dataset["prompt"][:] == ["ok"]
    assert str(data.bad_rows[0]) == f"{source}:2: invalid UTF-8: byte 0xe9 at offset 1 of line 3"


def test_a_csv_field_over_the_default_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    data = load_prompts(write(tmp_path / "p.csv", "prompt\n" + "x" * 200_000 + "\n"))
    assert len(data.dataset[0]["prompt"]) == 200_000
    assert csv.field_size_limit() == before


def test_a_csv_header_with_a_repeated_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'prompt' appears twice"):
        load_prompts(write(tmp_path / "p.csv", "prompt,prompt\na,b\n"))


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    whole = gzip.compress(jsonl(tmp_path / "x", ROWS * 50).encode() * 500)
    with pytest.raises(DataError, match="damaged"):
        load_prompts(write(tmp_path / "cut.jsonl.gz", gzip.compress(Path(tmp_path / "x").read_bytes())[:-12]))
    with pytest.raises(DataError, match="damaged"):
        load_prompts(write(tmp_path / "junk.jsonl.gz", b"no gzip" + whole))


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable parquet file"):
        load_prompts(write(tmp_path / "p.parquet", b"PAR1 and nothing else"))


def test_parquet_keeps_types_and_skips_bad_rows(tmp_path: Path) -> None:
    n = 3000
    table = pa.table(
        {
            "prompt": pa.array([None if i % 1000 == 7 else f"p{i}" for i in range(n)]),
            "answer": pa.array([float("nan") if i == 0 else i / 2 for i in range(n)]),
            "kind": pa.array([f"k{i % 3}" for i in range(n)]).dictionary_encode(),
            "tests": pa.array([[{"in": i, "out": [str(i)]}] for i in range(n)]),
        }
    )
    source = str(tmp_path / "p.parquet")
    pq.write_table(table, source, row_group_size=700)
    data = load_prompts(source, skip_bad_rows=True)
    assert [row.line for row in data.bad_rows] == [8, 1008, 2008]
    kept = [i for i in range(n) if i % 1000 != 7]
    assert data.dataset["prompt"][:] == [f"p{i}" for i in kept]
    assert data.dataset["answer"][:3] == [None, "0.5", "1.0"]
    assert data.dataset["kind"][:] == [f"k{i % 3}" for i in kept]
    assert data.dataset[2500]["tests"] == [{"in": kept[2500], "out": [str(kept[2500])]}]


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    def text(values: list[bytes]) -> pa.Array:
        return pa.array(values, type=pa.binary()).view(pa.string())

    source = str(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": text([b"a\xff", b"ok", b"b"]), "note": text([b"", b"n", b"c\xfe"])}), source)
    data = load_prompts(source, skip_bad_rows=True)
    assert data.dataset[:] == {"prompt": ["ok"], "note": ["n"]}
    assert [(row.line, row.reason) for row in data.bad_rows] == [
        (1, "column 'prompt' has invalid UTF-8 at byte 1"),
        (3, "column 'note' has invalid UTF-8 at byte 1"),
    ]


def test_a_lab_task(tmp_path: Path) -> None:
    train = load_prompts("lab:math", lab_size=50, seed=3)
    assert train.n_rows == 50
    assert set(train.dataset.column_names) == {"prompt", "answer"}
    assert load_prompts("lab:math", lab_size=50, seed=3).dataset[:] == train.dataset[:]
    assert load_prompts("lab:math", lab_size=50, seed=4).dataset[:] != train.dataset[:]
    test = load_prompts("lab:math", split="test", lab_size=50)
    assert not set(test.dataset["prompt"]) & set(train.dataset["prompt"])
    with pytest.raises(DataError, match="lab:maths"):
        load_prompts("lab:maths")


def test_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "q1", "n": 1}, {"question": " ", "n": 2}]).select([1, 0])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_prompts("owner/set-v1.0:main", split="test", skip_bad_rows=True)
    assert asked == [("owner/set-v1.0", "main", "test")]
    assert data.dataset[:] == {"prompt": ["q1"], "n": [1]}
    assert [str(row) for row in data.bad_rows] == ["owner/set-v1.0:main:1: column 'question' is blank"]


def test_a_hub_data_set_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"(?s)'owner/none'.*could not be loaded.*Without a network, give a file"):
        load_prompts("owner/none")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("./owner/name", "no such file"),
        ("a/b/c", "no such file"),
        ("with space", "no such file"),
        ("folder", "is a directory"),
        ("notes.txt", "format of 'notes.txt' is not known"),
        ("empty.jsonl", "no rows"),
        ("empty.csv", "no rows"),
        ("header.csv", "no rows"),
        ("empty.json", "no rows"),
        ("array.json", "no rows"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, text in {"notes.txt": "x", "header.csv": "prompt\n", "array.json": "[]"}.items():
        write(tmp_path / name, text)
    for name in ("empty.jsonl", "empty.csv", "empty.json"):
        write(tmp_path / name, "")
    with pytest.raises(DataError, match=message):
        load_prompts(source, skip_bad_rows=True)


def test_python_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(n: int) -> int:
        with open(tmp_path / f"{n}.jsonl", "w", encoding="utf-8") as file:
            for i in range(n):
                file.write(json.dumps({"prompt": f"{i} " + "word " * 200, "answer": i}) + "\n")
        tracemalloc.start()
        data = load_prompts(str(tmp_path / f"{n}.jsonl"))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert data.n_rows == n
        return size

    peak(2000)  # imports
    assert peak(24_000) < 1.2 * peak(6_000)


@pytest.mark.parametrize(("name", "n"), [("gsm8k_train", 7473), ("math_train", 7500)])
def test_real_training_sets(name: str, n: int) -> None:
    folder = os.environ.get("VIGOR_DATA_DIR")
    if folder is None:
        pytest.skip("VIGOR_DATA_DIR is not set: the folder with gsm8k_train.jsonl and math_train.jsonl")
    source = Path(folder, f"{name}.jsonl")
    data = load_prompts(str(source))
    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert data.n_rows == n == len(rows)
    assert data.dataset["prompt"][:] == [row["problem"] for row in rows]
    assert data.dataset["answer"][:] == [row["answer"] for row in rows]
    assert data.dataset["id"][:] == [row["id"] for row in rows]
