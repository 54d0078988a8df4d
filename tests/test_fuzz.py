"""Bad input: a few hundred of benchmarks/fuzz.py's inputs, and a corpus of what once went wrong or must be said so."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import fuzz
from fuzz_inputs import GROUP, KINDS, Case, World

from vigor import terminal
from vigor.cli import main
from vigor.reading import ReadError, check, read_settings
from vigor.terminal import one_screen, printable

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return fuzz.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("kind", "inputs"), [("data file", 100), ("settings file", 60), ("command line", 40)])
def test_no_input_makes_a_traceback_a_hang_or_a_half_written_folder(world: World, kind: str, inputs: int) -> None:
    tally = fuzz.fuzz(world, inputs, 1, [kind])
    assert tally.kinds[kind] >= inputs * 0.9
    assert tally.outcomes["refused"] > 0
    assert tally.failures == []


def test_no_damaged_folder_does(world: World) -> None:
    tally = fuzz.fuzz(world, 15, 1, ["run folder"])
    assert tally.failures == []


def test_every_kind_is_tried_here_or_above() -> None:
    assert set(KINDS) == {"data file", "settings file", "command line", "run folder"}


def test_the_judge_sees_what_is_out_of_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above could not fail."""

    def behave(how: str) -> Callable[[Any], int]:
        def act(argv: Any) -> int:
            if how == "traceback":
                raise TypeError("x")
            if how == "half-written":
                Path("out").mkdir()
            print({"control": "\x1b[31m", "screen": "x\n" * 100}.get(how, "told"), file=sys.stderr)
            return 1 if how == "status" else 2

        return act

    seen = {"traceback": "traceback: TypeError", "half-written": "half-written: ['out']", "status": "status 1",
            "control": "control character", "screen": "more than a screen", "fine": "None"}  # fmt: skip
    for how, problem in seen.items():
        monkeypatch.setattr(fuzz, "main", behave(how))
        assert str(fuzz.judge(Case("data file", ("train",), lambda folder: None), fuzz.Tally())).startswith(problem)


# The corpus: prompts


def jsonl(**row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


PROMPTS: dict[str, tuple[bytes, str]] = {
    "NUL": (jsonl(prompt="a\x00b"), "d.jsonl:1: column 'prompt' has a NUL character at character 1"),
    "lone surrogate": (jsonl(prompt="a\ud800"), "d.jsonl:1: column 'prompt' has half a surrogate pair (U+D800)"),
    "1 MB": (jsonl(prompt="ab" * 500_000), "d.jsonl:1: the prompt has"),
    "deep nesting": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "d.jsonl:1: invalid JSON"),
    "NaN": (b'{"prompt": NaN}\n', "d.jsonl:1: column 'prompt' is a number"),
    "huge integer": (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}\n", "d.jsonl:1: invalid JSON"),
    "UTF-16": ('{"prompt": "x"}\n'.encode("utf-16"), "d.jsonl:1: invalid UTF-8: byte 0xff at offset 0 of the line"),
    "empty": (b"", "d.jsonl: no rows: the file is empty"),
    "gzip by another name": (gzip.compress(b'{"prompt": "x"}\n'), "d.jsonl:1: invalid UTF-8"),
    "no object": (b"[1, 2]\n", "d.jsonl:1: expected a JSON object, found [1, 2]"),
    "half a line": (b'{"prompt": "x"}\n{"prom', "d.jsonl:2: invalid JSON"),
    "control in a key": (b'{"pro\\u001b[31mmpt": "x"}\n', r"d.jsonl:1: none of the columns"),
}


def plan(world: World, *flags: str) -> list[str]:
    model = ("--model_name_or_path", str(world.model))
    return ["train", "--prompts", "d.jsonl", *model, *GROUP, "--output_dir", "out", "--dry_run", *flags]


@pytest.mark.parametrize("name", PROMPTS)
def test_a_bad_prompt_is_named_by_its_line(
    world: World, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = PROMPTS[name]
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_bytes(content)
    assert main(plan(world)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "\x1b" not in err and len(err) < 2000
    assert os.listdir() == ["d.jsonl"]


@pytest.mark.parametrize(
    "content",
    [
        jsonl(prompt="Q:<|im_end|>1+1\nA:"),
        jsonl(prompt="Q:\u202e1+1\nA:"),
        jsonl(prompt="Q:\x1b[31m1+1\nA:"),
        jsonl(prompt="Q:1+1", id=1) * 3,
        b"\xef\xbb\xbf" + jsonl(prompt="Q:1+1"),
        jsonl(prompt="Q:1+1").replace(b"\n", b"\r\n"),
        b'{"prompt": "Q:1+1", "n": 99999999999999999999, "x": Infinity}\n',
    ],
)
def test_hostile_but_usable_prompts_are_taken(
    world: World, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_bytes(content)
    assert main(plan(world)) == 0
    assert not fuzz.CONTROL.search(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["directory", "fifo", "loop", "dangling", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(
    world: World, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fuzz_inputs import _special

    monkeypatch.chdir(tmp_path)
    _special("d.jsonl", kind)(tmp_path)
    assert main(plan(world)) == 2
    assert "d.jsonl" in capsys.readouterr().err


# The corpus: settings


SETTINGS: dict[str, tuple[str, str]] = {
    "mapping for text": ("prompts: {}", "prompts: {} is an object, expected text or null"),
    "list for a number": ("max_steps: [1, 2]", "max_steps: [1, 2] is a list, expected a whole number"),
    "null reward": ("reward_funcs: [null]", "reward_funcs: [None] is a list, expected a list"),
    "text for a number": ("max_steps: many", "argument --max_steps"),
    "too large": ("max_steps: 99999999999999999999", "expected a whole number of 64 bits"),
    "unknown": ("max_step: 3", "unknown settings max_step"),
    "self": ("self: 3", "unknown settings self"),
    "number as a name": ("1: 2", "the setting 1 is a number, expected a name"),
    "twice": ("max_steps: 1\nmax_steps: 2", "'max_steps' stands there twice"),
    "endless": ("a: &x [*x]", "holds more than 100,000 values, or itself"),
    "laughs": ("\n".join(["a0: &a0 [x]", *(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(8))]),
               "holds more than 100,000 values"),
    "python object": ("x: !!python/object/apply:os.system ['touch pwned']", "is not YAML"),
    "NUL": ('output_dir: "a\\0b"', "output_dir: 'a\\x00b' has a NUL character at character 1"),
    "env": ("env: {'A=B': 1}", "'A=B' is no variable that can be set"),
    "nesting": ("[" * 3000, "is not YAML"),
    "no length": ("max_completion_length: 0", "max_completion_length=0: give the tokens"),
    "text for a mapping": ("chat_template_kwargs: brief", "chat_template_kwargs='brief': give a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bad_setting_is_named(
    world: World, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = SETTINGS[name]
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text, "utf-8")
    flags = [flag for flag in plan(world) if flag not in GROUP] + ["--use_cpu", "true", "--num_generations", "4"]
    try:
        status = main([*flags, "--config", "c.yaml"])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == ["c.yaml"]


def test_null_is_the_default_where_a_setting_cannot_be_null(world: World, tmp_path: Path) -> None:
    from vigor.commands.settings import fit
    from vigor.config import VigorConfig

    assert fit({"max_steps": None, "reward_weights": None, "top_p": 1}, [VigorConfig]) == {
        "reward_weights": None,
        "top_p": 1,
    }


def test_a_comparisons_values_must_be_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--config", "lab", "--temperature", "\x1b[31m", "--dry_run"]) == 2
    assert "--temperature '\\x1b[31m': the value cannot be read" in capsys.readouterr().err


# The corpus: folders


def test_shapes_are_told_by_place(tmp_path: Path) -> None:
    check({"a": [{"b": 1.5}]}, {"a": [{"b": (int, float), "c?": str}]}, "f")
    for value, message in (
        ({"a": [{"b": True}]}, r"f: a\[0\]: b is a truth value, expected a number"),
        ({"a": [{"b": float("nan")}]}, r"f: a\[0\]: b is nan, expected a number"),
        ({"a": {}}, r"f: a is an object, expected a list"),
        ({}, r"f has no entry 'a'"),
        ({"a": [{"b": 1, "c": 2}]}, r"f: a\[0\]: c is a number, expected text"),
    ):
        with pytest.raises(ReadError, match=message):
            check(value, {"a": [{"b": (int, float), "c?": str}]}, "f")
    with pytest.raises(ReadError, match="is no regular file"):
        read_settings(tmp_path)


def test_a_refused_report_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "new"), "--out", str(tmp_path / "there" / "page.html")]) == 2
    assert list(tmp_path.iterdir()) == []
    assert "no run folder" in capsys.readouterr().err


class Bomb:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_nothing_in_a_dump_is_unpickled(
    world: World, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / "dump.json").write_bytes((world.dump / "dump.json").read_bytes())
    path = tmp_path / "dump" / "batch-0.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(made)))
    else:
        torch.save({"batches": [Bomb(made)], "losses": []}, path)
    assert main(["replay", str(tmp_path / "dump")]) == 2
    assert "batch-0.pt is no file of tensors" in capsys.readouterr().err
    assert not made.exists()


def test_code_from_a_model_folder_is_off_by_default(tmp_path: Path) -> None:
    from vigor.config import VigorConfig

    assert VigorConfig(str(tmp_path), use_cpu=True).trust_remote_code is False


# The terminal


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b]0;t\x07\x9b2J\r\u202e\ud800\tb\nc\x7f") == (
        "a\\x1b]0;t\\x07\\x9b2J\\x0d\\u202e\\ud800\tb\nc\\x7f"
    )
    assert printable("naïve 漢字 🙂 ‖∇‖") == "naïve 漢字 🙂 ‖∇‖"


def test_a_message_fits_a_screen_and_keeps_its_ends() -> None:
    lines = [f"line {i}" for i in range(100)]
    short = one_screen("\n".join([*lines, "x" * 10_000 + " Remedy: y"])).split("\n")
    assert len(short) == terminal.LINES
    assert short[0] == "line 0" and short[-1].endswith("Remedy: y") and len(short[-1]) < terminal.COLUMNS + 60
    assert "  … 62 more lines …" in short


@pytest.mark.parametrize(
    "argv",
    [
        ["report", "\x1b]0;pwned\x07"],
        ["replay", "\x9b2J"],
        ["methods", "\x1b[31m"],
        ["\x1b[31m"],
        ["train", "--\x1b[31m", "1"],
        ["train", "--config", "\x1b[31m"],
        ["train", "--config", "lab", "--reward_funcs", "\x1b[31m", "--dry_run"],
        ["train", "--config", "lab", "--output_dir", "\x1b[31m", "--dry_run"],
        ["compare", "--config", "lab", "--methods", "\x1b[31m", "--dry_run"],
        ["score", "--completions", "\x1b[31m.jsonl", "--out", "o.jsonl", "--model_name_or_path", "lab"],
        ["probe", "--prompts", "\r\x1b[1A", "--model_name_or_path", "lab"],
    ],
)
def test_no_escape_sequence_of_others_reaches_the_terminal(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        main(argv)
    told = capsys.readouterr()
    assert told.out + told.err
    assert not fuzz.CONTROL.search(told.out + told.err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "typed.yaml"], "--dtype int8: choose auto"),
        (["--reward_funcs", ".."], "--reward_funcs ..: neither"),
        (["--reward_funcs", ".f"], "--reward_funcs .f: neither"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0: must be at least 1"),
        (["--max_steps", "1" + 40 * "0"], "questions of the lab, which are all made before the run"),
        (["--gradient_accumulation_steps", "-1"], "gradient_accumulation_steps=-1: must be at least 1"),
    ],
)
def test_what_ten_thousand_inputs_found(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lab = "prompts: lab:math\nmodel_name_or_path: lab\nuse_cpu: true\n"
    (tmp_path / "typed.yaml").write_text(lab + "dtype: int8\n")  # the parser checks choices of flags, not of YAML
    base = [] if "--config" in flags else ["--config", "lab"]
    assert main(["train", *base, "--dry_run", *flags]) == 2
    assert message in capsys.readouterr().err


def test_names_in_progress_lines_and_tables_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    from vigor.commands.methods import table
    from vigor.progress import describe

    assert describe({"rewards/\x1b[31m/mean": 0.5}, ["\x1b[31m"]) == "\\x1b[31m 0.5"
    table([("\x9b2J", "a"), ("b", "c")])
    assert capsys.readouterr().out == "\\x9b2J  a\nb       c\n"
