"""Scores of completions: equal to each completion by itself, resumable without loss, bad rows named before a model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers_trainer import CHAT_TEMPLATE, lab_tokenizer, save_tiny, tiny_model, write_jsonl

from vigor.cli import main
from vigor.gradnorm import sequence_grad_norms
from vigor.scoring import Sample, check_signals, rollouts_of, score_completions
from vigor.scoring.output import best

ROWS: list[dict[str, Any]] = [
    {"prompt": "Q:3+4\nA:", "completions": [r" so \boxed{7}", r" \boxed{8}", r" easy \boxed{7}"], "answer": "7"},
    {"prompt": "Q:12+7\nA:", "completions": [r" 2+7=9; 1+0=1 so \boxed{19}"], "answer": "19"},
    {"prompt": "Q:9-4\nA:", "completions": ["", r" \boxed{5}"], "answer": "5"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def samples() -> list[Sample]:
    return [Sample(row["prompt"], tuple(row["completions"]), {"answer": row["answer"]}, i + 1, False, True)
            for i, row in enumerate(ROWS)]  # fmt: skip


def score(model: Path, source: Path, out: Path, *more: str) -> int:
    command = ["score", "--completions", str(source), "--out", str(out), "--model_name_or_path", str(model)]
    return main([*command, "--device", "cpu", *more])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("batch_size", "window"), [(1, 1), (2, 1), (16, 4)])
def test_scores_are_those_of_each_completion_alone(batch_size: int, window: int) -> None:
    policy, tokenizer = tiny_model().eval(), lab_tokenizer()
    names = ["vigor", "logprob", "majority_vote", "accuracy"]
    options = {"temperature": 0.7, "batch_size": batch_size, "window": window}
    found = list(score_completions(policy, tokenizer, samples(), names, **options))
    assert [sample for sample, _ in found] == samples()
    assert [[s["majority_vote"] for s in scores] for _, scores in found] == [[1, 0, 1], [1], [0, 1]]
    assert [[s["accuracy"] for s in scores] for _, scores in found] == [[1, 0, 1], [1], [0, 1]]
    for sample, scores in found:
        for text, row in zip(sample.completions, scores, strict=True):
            prompt = tokenizer(sample.prompt)["input_ids"]
            own = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([prompt + own])
            completion = torch.tensor([[0] * len(prompt) + [1] * len(own)])
            norm = sequence_grad_norms(policy, ids, torch.ones_like(ids), completion, temperature=0.7, method="loop")
            assert row["vigor"] == pytest.approx(-float(norm) * len(own) ** 0.5, rel=1e-4)  # type: ignore[arg-type]
            logps = (policy(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
            expected = logps.gather(1, torch.tensor(own)[:, None]).mean().item()
            assert row["logprob"] == pytest.approx(expected, rel=1e-5)


def test_a_truncated_completion_gets_no_eos() -> None:
    tokenizer = lab_tokenizer()
    for truncated in (False, True):
        sample = Sample("Q:3+4\nA:", (" easy",), truncated=truncated)
        rollouts = rollouts_of(tokenizer, [(sample, " easy")], group_size=1, device="cpu")
        assert int(rollouts.lengths_B[0]) == 2 - truncated
        assert bool(rollouts.truncated_B[0]) == truncated  # type: ignore[index]


def test_rows_of_one_prompt_and_a_list_of_completions_are_the_same(model: Path, tmp_path: Path) -> None:
    apart = [{"prompt": row["prompt"], "completion": text, "answer": row["answer"]}
             for row in ROWS for text in row["completions"]]  # fmt: skip
    one = write_jsonl(tmp_path / "one.jsonl", apart)
    several = write_jsonl(tmp_path / "several.jsonl", ROWS)
    for source in (one, several):
        out = source.with_suffix(".out.jsonl")
        assert score(model, source, out, "--signals", "logprob", "majority_vote", "--best_of", "vigor") == 0
    first, second = (lines(path.with_suffix(".out.jsonl")) for path in (one, several))
    assert [row["of"] for row in first] == [3, 1, 2]
    keys = ("prompt", "completion", "answer", "score/vigor", "score/logprob", "score/majority_vote", "of")
    assert [[row[key] for key in keys] for row in first] == [[row[key] for key in keys] for row in second]


def test_best_of_takes_the_first_of_equals_and_a_missing_score_last() -> None:
    rows = [{"prompt": p, "completion": c, "s": s}
            for p, c, s in [("a", "1", None), ("a", "2", 1.0), ("a", "3", 1.0), ("b", "4", None)]]  # fmt: skip
    assert [(row["completion"], row["of"]) for row in best(rows, "s")] == [("2", 3), ("4", 1)]


def test_parquet_in_and_out_with_other_columns(model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "note": i} for i, row in enumerate(ROWS)]), source)
    assert score(model, source, out, "--signals", "logprob") == 0
    table = pq.read_table(out).to_pylist()
    assert [(row["line"], row["index"], row["note"]) for row in table] == [
        (1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 0, 1), (3, 0, 2), (3, 1, 2),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.part*"))


def test_conversations_are_scored_through_the_template(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "chat", CHAT_TEMPLATE)
    rows = [{"prompt": [{"role": "user", "content": "3+4"}], "completion": [{"role": "assistant", "content": " easy"}]},
            {"prompt": "Q:3+4\nA:", "completion": " easy"}]  # fmt: skip
    source, out = write_jsonl(tmp_path / "chat.jsonl", rows), tmp_path / "out.jsonl"
    assert score(model, source, out, "--signals", "logprob") == 0
    first, second = lines(out)
    assert first["score/logprob"] == pytest.approx(second["score/logprob"], rel=1e-6)


def test_bad_rows_are_named_by_line_before_the_model_loads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "bad.jsonl"
    good = json.dumps(ROWS[0])
    long = json.dumps({"prompt": "Q:3+4\nA:", "completion": "1" * 10_000})
    bad = ['{"prompt": "x"}', '{"prompt": "x", "completion": 3}', "{", '{"completion": "y"}', long,
           '{"prompt": "x", "completions": []}', '{"prompt": "x", "completion": "a", "completions": []}']  # fmt: skip
    source.write_text("\n".join([good, *bad]) + "\n", "utf-8")
    from transformers import AutoModelForCausalLM

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
        from vigor.commands import score as command

        tokenizer = lab_tokenizer()
        tokenizer.model_max_length = 256
        patch.setattr(command, "load_tokenizer", lambda name: tokenizer)
        assert score(model, source, tmp_path / "out.jsonl") == 2
    message = capsys.readouterr().err
    for line in range(2, 9):
        assert f"{source}:{line}:" in message
    assert f"{source}:1:" not in message and "--skip_bad_rows" in message
    assert not list(tmp_path.glob("out*"))
    keep = tmp_path / "keep.jsonl"
    keep.write_text("\n".join([good, *bad[:4]]) + "\n", "utf-8")
    assert score(model, keep, tmp_path / "out.jsonl", "--signals", "logprob", "--skip_bad_rows") == 0
    assert len(lines(tmp_path / "out.jsonl")) == 3


@pytest.mark.parametrize(
    ("signals", "said"),
    [(["nonsense"], "unknown reward"), (["co_rewarding_2"], "only a training"), (["co_rewarding_1"], "only a training"),
     (["logprob", "logprob"], "more than once"), (["keyword_chain"], "which not every row has"), ([], "at least one")],
)  # fmt: skip
def test_signals_that_cannot_be_had_are_refused(signals: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_signals(signals, ["answer"])


def test_a_cut_run_goes_on_after_its_last_complete_row(model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ROWS * 3)
    whole = tmp_path / "whole.jsonl"
    options = ("--signals", "logprob", "majority_vote", "--batch_size", "1")
    assert score(model, source, whole, *options) == 0
    text = whole.read_bytes()
    out = tmp_path / "out.jsonl"
    from vigor.commands.score import settings
    from vigor.scoring.output import PartFile

    parser_settings = _settings(model, source, out, options)
    ends = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    for cut in (0, 5, ends[0], ends[0] + 9, ends[1] + 1, ends[3], ends[-1] - 1, ends[-1]):
        part = PartFile(out, settings(parser_settings), resume=True)
        part.begin()
        part.rows.write_bytes(text[:cut])
        assert score(model, source, out, *options) == 2, "an unfinished run is not overwritten"
        assert score(model, source, out, *options, "--resume") == 0
        assert _rounded(lines(out)) == _rounded(lines(whole))
        out.unlink()
    part.begin()
    assert score(model, source, out, "--signals", "logprob", "--resume") == 2, "other settings"


@pytest.mark.usefixtures("unchecked")
def test_a_killed_process_loses_and_doubles_nothing(model: Path, tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"Q:{i}+4\nA:"} for i in range(60) for row in ROWS]
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "vigor", "score", "--completions", str(source), "--out", str(out),
               "--device", "cpu", "--batch_size", "2", "--model_name_or_path", str(model)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = out.with_name(out.name + ".part")
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    assert score(model, source, out, "--batch_size", "2", "--resume") == 0
    written = lines(out)
    assert [(row["line"], row["index"]) for row in written] == [
        (i + 1, j) for i, row in enumerate(rows) for j in range(len(row["completions"]))
    ]


def _settings(model: Path, source: Path, out: Path, options: tuple[str, ...]) -> Any:
    import argparse

    from vigor.commands.score import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    command = ["--completions", str(source), "--out", str(out), "--model_name_or_path", str(model), *options]
    return parser.parse_args(command)


def _rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows]
