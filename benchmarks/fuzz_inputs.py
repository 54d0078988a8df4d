"""What benchmarks/fuzz.py throws at the command: data files, settings, flags and run folders, as strategies.

A case is a command line and a function that prepares its files in an empty folder. Valid inputs are among them.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import yaml

HOSTILE = (
    "<|im_end|>", "<|endoftext|>", "</s>", "[INST]", "\x00", "\x1b[31m", "\x1b]0;pwned\x07", "\x9b2J", "\r", "\u202e",
    "\u2066", "\ud800", "\ufeff", "a" * 1_000_000, "{{ 7*7 }}", "%s%n", "../../etc/passwd", "", " ", "\n" * 50, "١٢",
    "é" * 300, "🙂", "-1", "1e400", "NaN", "null", "true", "[1", "vigor(ties=index)", "vigor(", "noisy(", "none",
)  # fmt: skip
texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30), st.sampled_from(["Q:1+1\nA:", "2", "lab", "user"]))
numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, 2, 4, 8, -1, 0.5, 10**400, float("nan")])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.one_of(st.sampled_from(["system", "user", "assistant", "tool"]), texts), "content": values}
        ),
        values,
    ),
    max_size=4,
)
COLUMNS = (
    "prompt", "problem", "question", "messages", "answer", "completion", "completions", "truncated", "id", "images",
)  # fmt: skip
rows = st.one_of(
    st.fixed_dictionaries({"prompt": texts, "answer": scalars}),
    st.fixed_dictionaries({"prompt": st.one_of(texts, messages), "completion": texts}),
    st.dictionaries(st.one_of(st.sampled_from(COLUMNS), texts), st.one_of(values, messages), max_size=5),
    values,
)


@dataclass(frozen=True)
class Case:
    """A command line; `prepare(folder)` makes the files that it names in the folder it will run in."""

    kind: str
    argv: tuple[str, ...]
    prepare: Callable[[Path], None]
    what: str = ""
    """The files' contents in a few words, for the report of a failure."""


@dataclass(frozen=True)
class World:
    """What the inputs start from, made once: see `fuzz.make_world`."""

    model: Path
    """Tokenizer and config.json, no weights: what gets as far as loading a model is refused there."""
    run: Path
    """A run folder with a checkpoint."""
    dump: Path
    comparison: Path


# Bytes ----------------------------------------------------------------------------------------------------------------


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes as they are, or cut, overwritten, in another encoding, or packed."""
    how = draw(st.sampled_from(["as is", "as is", "cut", "flip", "insert", "bom", "crlf", "utf-16", "gzip", "empty"]))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    if how == "cut":
        return data[:at]
    if how == "flip" and data:
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    if how == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=20)) + data[at:]
    if how == "utf-16":
        return data.decode("utf-8", "replace").encode("utf-16")
    return {
        "bom": b"\xef\xbb\xbf" + data,
        "crlf": data.replace(b"\n", b"\r\n"),
        "gzip": gzip.compress(data, 1),
        "empty": b"",
    }.get(how, data)


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


@st.composite
def text_table(draw: st.DrawFn) -> tuple[str, bytes]:
    """(suffix, contents) of a jsonl, json or csv file."""
    listed = draw(st.lists(rows, min_size=1, max_size=5))
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".jsonl.gz", ".ndjson"]))
    if suffix == ".csv":
        cells = st.lists(st.one_of(st.sampled_from(COLUMNS), texts), max_size=4)
        quote = draw(st.booleans())
        text = "\n".join(
            ",".join('"' + c.replace('"', '""') + '"' if quote else c for c in line)
            for line in [draw(cells), *draw(st.lists(cells, max_size=4))]
        )
    elif suffix == ".json":
        text = _json(draw(st.sampled_from([listed, {"data": listed}, {"a": listed, "b": listed}, listed[0]])))
    else:
        text = "\n".join(_json(row) for row in listed) + "\n"
    deep = draw(st.integers(0, 40))
    if deep == 0:
        text = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
    elif deep == 1:
        text = '{"prompt": "x", "n": ' + "9" * 10_000 + "}"
    elif deep == 2:
        text = text + text[: len(text) // 2]
    data = draw(damage(text.encode("utf-8", "surrogatepass")))
    return suffix, gzip.compress(data, 1) if suffix.endswith(".gz") and draw(st.booleans()) else data


@st.composite
def parquet_table(draw: st.DrawFn) -> tuple[str, bytes]:
    """(suffix, contents) of a parquet file, whole or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = draw(st.integers(0, 3))
    kinds = {
        "text": pa.string(),
        "binary": pa.binary(),
        "int": pa.int64(),
        "list": pa.list_(pa.string()),
        "null": pa.null(),
        "time": pa.timestamp("us"),
        "decimal": pa.decimal128(10, 2),
        "map": pa.map_(pa.string(), pa.int64()),
        "message": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        "bool": pa.bool_(),
    }
    samples: dict[str, Any] = {
        "text": "Q:1+1\nA:",
        "binary": b"\xff\xfe",
        "int": 7,
        "list": ["x"],
        "null": None,
        "time": 0,
        "decimal": "1.50",
        "map": [("a", 1)],
        "message": [{"role": "user", "content": "Q:1+1"}],
        "bool": True,
    }
    names = draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=4))
    chosen = [draw(st.sampled_from(list(kinds))) for _ in names]
    arrays = []
    for kind in chosen:
        value = samples[kind]
        plain = pa.array(["1.50"] * n).cast(kinds[kind]) if kind == "decimal" else pa.array([value] * n, kinds[kind])
        arrays.append(plain if kind != "text" or draw(st.booleans()) else pa.array([b"\xff"] * n).cast(pa.binary()))
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, names=names), stream)
    return ".parquet", draw(damage(stream.getvalue()))


# Cases ----------------------------------------------------------------------------------------------------------------


def _write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def _special(name: str, kind: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = folder / name
        if kind == "directory":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "dangling":
            path.symlink_to(folder / "nowhere")
        elif kind == "device":
            path.symlink_to("/dev/zero")

    return prepare


SPECIAL = ("directory", "fifo", "loop", "dangling", "device", "missing")
GROUP = (
    "--use_cpu", "true", "--num_generations", "4", "--per_device_train_batch_size", "4", "--max_completion_length",
    "8", "--max_steps", "1", "--save_strategy", "no",
)  # fmt: skip


def _reader(world: World, name: str, tool: str, flags: list[str]) -> tuple[str, ...]:
    model = ("--model_name_or_path", str(world.model))
    if tool == "train":
        return ("train", "--prompts", name, *model, *GROUP, "--output_dir", "out", "--dry_run", *flags)
    if tool == "probe":
        return ("probe", "--prompts", name, *model, "--max_completion_length", "8")
    return ("score", "--completions", name, *model, "--out", "out.jsonl")


def data_files(world: World) -> st.SearchStrategy[Case]:
    """Prompts and completions in files."""

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        tool = draw(st.sampled_from(["train", "train", "score", "probe"]))
        flags = draw(
            st.sampled_from(
                [
                    [],
                    *[["--skip_bad_rows", "true"]] * 3,
                    ["--system_prompt", "Be brief."],
                    ["--prompt_column", "question"],
                    ["--max_prompt_length", "4"],
                ]
            )
        )
        if draw(st.integers(0, 15)) == 0:
            kind, suffix = (
                draw(st.sampled_from(SPECIAL)),
                draw(st.sampled_from([".jsonl", ".csv", ".json", ".parquet"])),
            )
            return Case("data file", _reader(world, f"d{suffix}", tool, flags), _special(f"d{suffix}", kind), kind)
        suffix, data = draw(st.one_of(text_table(), text_table(), parquet_table()))
        suffix = suffix if draw(st.integers(0, 9)) else draw(st.sampled_from([".parquet", ".csv", ".gz", ".txt", ""]))
        return Case(
            "data file", _reader(world, f"d{suffix}", tool, flags), _write(f"d{suffix}", data), repr(data[:200])
        )

    return case()


KEYS = (
    "prompts", "model_name_or_path", "reward_funcs", "reward_weights", "max_steps", "num_generations", "output_dir",
    "per_device_train_batch_size", "max_completion_length", "learning_rate", "temperature", "seed", "env", "run_name",
    "lr_scheduler_type", "optim", "loss_type", "save_strategy", "save_steps", "logging_steps", "use_cpu", "fused",
    "truncated", "max_prompts", "max_prompt_length", "system_prompt", "prompt_split", "chat_template_kwargs", "beta",
    "model_init_kwargs", "dtype", "use_peft", "lora_r", "lora_target_modules", "gradient_accumulation_steps",
    "epsilon", "steps_per_generation", "generation_batch_size", "num_train_epochs", "warmup_steps", "weight_decay",
    "top_p", "top_k", "bf16", "fp16", "report_to", "eval_strategy", "max_skipped_updates", "reward_weights_final",
    "scale_rewards", "skip_bad_rows", "watch_accuracy", "resume", "lab_eval_prompts", "max_grad_norm", "adam_beta2",
    "num_iterations", "generation_kwargs", "lr_scheduler_kwargs", "optim_args", "importance_sampling_level",
    "multi_objective_aggregation",
)  # fmt: skip
YAML_TEXT = (
    "- 1\n- 2\n", "just text", "a: b: c", "\t", "!!python/object/apply:os.system ['touch pwned']", "1: 2\n",
    "? [a]\n: b", "a: &x [*x]", "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nmax_steps: *c", "max_steps: 2026-01-01",
    "null", "{}", "[]", "max_steps: !!binary aGVsbG8=", "--- 1\n--- 2\n", "prompts: !!set {a, b}",
    "max_steps: 1\nmax_steps: 2", "\x00", "%YAML 9.9\n---\n", "env: [1]", "env: {1: 2}", "env: {'a=b': 1}",
    "env: {'': 1}", 'env: {A: "\\0"}', 'prompts: "\\0"', 'output_dir: "a\\0b"', "[" * 5000, "{a: " * 3000,
    "max_steps: " + "9" * 6000, "model_name_or_path: [a]", "reward_funcs: {vigor: 1}",
)  # fmt: skip


def settings_files(world: World) -> st.SearchStrategy[Case]:
    """YAML for train and compare: good settings with some replaced, or text that is no settings."""
    good: dict[str, Any] = {
        "prompts": "lab:math",
        "model_name_or_path": str(world.model),
        "num_generations": 4,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "use_cpu": True,
        "save_strategy": "no",
    }
    plans = ("recipe", "settings", "methods", "worlds", "seeds", "baseline")

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        compares = draw(st.integers(0, 3)) == 0
        if draw(st.integers(0, 5)) == 0:
            data = draw(st.sampled_from(YAML_TEXT)).encode()
        else:
            found = dict(good)
            if compares and draw(st.booleans()):
                found = {"recipe": "lab", "methods": ["vigor", "random"], "seeds": [0], "settings": {"max_steps": 2}}
            keys = st.one_of(st.sampled_from(plans if "recipe" in found else KEYS), texts)
            changed = st.dictionaries(keys, st.one_of(values, scalars), min_size=1, max_size=3)
            found.update(draw(changed))
            data = yaml.safe_dump(found, allow_unicode=draw(st.booleans()), sort_keys=False).encode("utf-8", "replace")
            data = draw(damage(data)) if draw(st.integers(0, 3)) == 0 else data
        argv = ("compare" if compares else "train", "--config", "c.yaml", "--output_dir", "out", "--dry_run")
        if draw(st.integers(0, 25)) == 0:
            kind = draw(st.sampled_from(SPECIAL))
            return Case("settings file", argv, _special("c.yaml", kind), kind)
        return Case("settings file", argv, _write("c.yaml", data), repr(data[:300]))

    return case()


SPECS = (
    "vigor", "vigor(ties=index)", "entropy", "random(p=0.5)", "contains(word=x)", "both(first=format, second=random)",
    "noisy", "accuracy", "os.system", "no_such.module", ".", "..", "vigor(", "vigor(ties=)", "vigor(a=b)",
    "json.dumps", "tiers(steps=[1])", "overlong(budget=0)", "l1_max(alpha=-1)", "regex_match(pattern='(')",
    "sys.exit",
)  # fmt: skip


def flags(world: World) -> st.SearchStrategy[Case]:
    """Command lines: known flags with unfit values, and what is none."""
    arguments = texts.filter(lambda text: "\x00" not in text and not any("\ud800" <= c <= "\udfff" for c in text))
    written = st.one_of(arguments.map(lambda t: t[:2000]), scalars.map(str).map(lambda t: t.replace("\x00", "")[:2000]))
    printable = written.map(lambda t: t.encode("utf-8", "replace").decode())
    pair = st.tuples(st.sampled_from(KEYS).map(lambda k: f"--{k}"), printable).filter(lambda p: p[0] != "--env")
    own = st.sampled_from(
        [
            "--signals",
            "--best_of",
            "--temperature",
            "--batch_size",
            "--n_prompts",
            "--num_generations",
            "--out",
            "--device",
            "--dtype",
            "--methods",
            "--seeds",
            "--worlds",
            "--jobs",
            "--baseline",
            "--title",
            "--family",
            "--needs",
            "--labelled",
            "--seed",
            "--config",
        ]
    )
    model = ("--model_name_or_path", str(world.model))

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        tool = draw(
            st.sampled_from(
                ["train", "train", "train", "compare", "score", "probe", "methods", "report", "replay", "any"]
            )
        )
        extra = [part for one in draw(st.lists(pair, max_size=2)) for part in one]
        other = [part for one in draw(st.lists(st.tuples(own, printable), max_size=2)) for part in one]
        spec = draw(st.sampled_from(SPECS))
        argv: list[str] = {
            "train": [
                "train",
                "--prompts",
                "lab:math",
                *model,
                *GROUP,
                "--output_dir",
                "out",
                "--dry_run",
                *draw(st.sampled_from([[], ["--reward_funcs", spec]])),
                *extra,
            ],
            "compare": ["compare", "--config", "lab", "--output_dir", "out", *other, *extra, "--dry_run"],
            "score": ["score", "--completions", "c.jsonl", *model, "--out", "out.jsonl", "--signals", spec, *other],
            "probe": ["probe", "--prompts", "lab:math", *model, "--signals", spec, *other],
            "methods": ["methods", draw(printable), *other],
            "report": ["report", draw(printable), *other],
            "replay": ["replay", draw(printable)],
            "any": draw(st.lists(printable, max_size=4)),
        }[tool]
        return Case("command line", tuple(argv), _write("c.jsonl", b'{"prompt": "Q:1+1\\nA:", "completion": "2"}\n'))

    return case()


def run_folders(world: World) -> st.SearchStrategy[Case]:
    """Folders of runs, comparisons and dumps of which some files are gone, cut or something else."""
    places = {"run": world.run, "dump": world.dump, "comparison": world.comparison}
    files = {
        name: sorted(
            p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and p.stat().st_size < 10**6
        )
        for name, path in places.items()
    }
    named = {
        name: [f for f in listed if f.endswith((".json", ".jsonl", ".yaml", ".parquet", "COMMITTED"))]
        for name, listed in files.items()
    }

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        which = draw(st.sampled_from(["run"] * 6 + ["comparison", "dump", "dump"]))
        changes: list[tuple[str, Any]] = []
        for name in draw(st.lists(st.sampled_from(named[which]), min_size=1, max_size=3, unique=True)):
            data = (places[which] / name).read_bytes()
            how = draw(st.sampled_from(["damage", "json", "gone", *SPECIAL[:5]]))
            if how == "damage":
                changes.append((name, draw(damage(data))))
            elif how == "json":
                value = draw(values)
                if name.endswith(".json") and draw(st.booleans()):
                    value = json.loads(data)
                    key = draw(st.sampled_from(sorted(value)))
                    value[key] = draw(values)
                dumped = yaml.safe_dump(value) if name.endswith(".yaml") else _json(value)
                changes.append((name, dumped.encode("utf-8", "replace")))
            else:
                changes.append((name, how))

        def prepare(folder: Path) -> None:
            shutil.copytree(places[which], folder / "r", symlinks=True)
            for name, change in changes:
                path = folder / "r" / name
                path.unlink()
                if isinstance(change, bytes):
                    path.write_bytes(change)
                elif change != "gone":
                    _special(path.name, change)(path.parent)

        tool = (
            "replay"
            if which == "dump"
            else draw(st.sampled_from(["report", "resume", "resume"]))
            if which == "run"
            else "report"
        )
        config = ("--config", str(world.run / "config.yaml"), "--output_dir", "r", "--max_steps", "3")
        argv = {
            "report": ("report", "r"),
            "replay": ("replay", "r"),
            "resume": ("train", *config, "--resume", "--dry_run"),
        }[tool]
        told = ", ".join(f"{name}: {c if isinstance(c, str) else repr(c[:80])}" for name, c in changes)
        return Case("run folder", argv, prepare, told)

    return case()


KINDS: dict[str, tuple[float, Callable[[World], st.SearchStrategy[Case]]]] = {
    "data file": (0.45, data_files),
    "settings file": (0.25, settings_files),
    "command line": (0.18, flags),
    "run folder": (0.12, run_folders),  # a page with its charts takes a second
}
"""Name, share of the inputs, and strategy of each kind."""
