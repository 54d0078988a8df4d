"""The run folder: complete, readable by anyone, and refused where another run lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_trainer import PROMPTS, config, dataset, lab_tokenizer, save_tiny, table, trainer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState

from vigor.checkpoint import MARKER, WRITING, commit
from vigor.cli import main
from vigor.progress import SHOWN_LINES, MetricsFile, ProgressBar, StepClock, describe
from vigor.runfolder import RunFolder, RunFolderError, environment

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `vigor train` over three steps with answers known to half of the prompts."""
    folder = tmp_path_factory.mktemp("run")
    prompts = write_jsonl(
        folder / "prompts.jsonl",
        [{"prompt": text, "answer": answer} for text, answer in zip(PROMPTS, ("7", None, "15", None), strict=True)],
    )
    flags = {
        "prompts": prompts, "model_name_or_path": save_tiny(folder / "base"), "output_dir": folder / "out",
        "max_steps": 3, "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 8,
        "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": False,
    }  # fmt: skip
    assert (
        main(["train", "--use_cpu", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])
        == 0
    )
    return folder / "out"


# What a run leaves


def test_everything_is_there(run: Path) -> None:
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "results.json", "report.html", "curves.png"):
        assert (run / name).stat().st_size > 0, name
    assert sorted(p.name for p in (run / "completions").iterdir()) == [
        f"completions_{i:05d}.parquet" for i in (1, 2, 3)
    ]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-3"]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (run / "model" / name).is_file(), name


def test_config_yaml_holds_every_resolved_setting(run: Path) -> None:
    written = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    assert written["reward_funcs"] == ["vigor"]
    assert written["max_steps"] == 3
    assert written["learning_rate"] == 1e-3
    assert written["temperature"] == 1.0
    assert written["truncated"] == "score"
    assert written["output_dir"] == str(run)


def test_environment_json_says_where_it_ran(run: Path) -> None:
    written = json.loads((run / "environment.json").read_text("utf-8"))
    assert written["packages"]["torch"] == torch.__version__.split("+")[0] or written["packages"]["torch"] == (
        torch.__version__
    )
    assert written["processes"] == 1
    assert written["torch_threads"] == torch.get_num_threads()
    assert set(written) == {
        "command", "date", "python", "platform", "cpu_count", "torch_threads", "gpus", "processes", "packages",
        "commit",
    }  # fmt: skip


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def test_metrics_are_a_line_a_step_of_strict_json(run: Path) -> None:
    records = [
        json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        for name in (
            "loss", "grad_norm", "learning_rate", "entropy", "completions/mean_length", "scores/vigor",
            "rewards/vigor/mean", "rewards/accuracy/mean", "time/step", "time/generation", "time/reward",
            "time/update",
        ):  # fmt: skip
            assert name in record, name
        parts = sum(record[f"time/{part}"] for part in ("generation", "reward", "update"))
        assert parts == pytest.approx(record["time/step"])
        assert min(record[f"time/{part}"] for part in ("generation", "reward", "update")) > 0


def test_completions_hold_texts_rewards_and_advantages(run: Path) -> None:
    for step in (1, 2, 3):
        rows = table(run, step)
        assert set(rows.columns) == {
            "step", "prompt", "completion", "vigor", "accuracy", "length", "truncated", "vigor/score", "advantage",
        }  # fmt: skip
        assert len(rows) == 8
        assert (rows["step"] == step).all()
        assert rows["prompt"].nunique() == 2
        assert rows["length"].between(1, 8).all()
        assert rows["truncated"].dtype == bool
        known = rows["prompt"].isin([PROMPTS[0], PROMPTS[2]])
        assert (rows["accuracy"].notna() == known).all()
        assert rows["advantage"].notna().all()


def test_the_saved_model_is_the_trained_one(tmp_path: Path) -> None:
    made = trainer(tmp_path, "vigor", max_steps=2, learning_rate=1e-2)
    made.train()
    made.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = PROMPTS[0] + " let me see 3+4 so \\boxed{7} carry ok"
    ids = lab_tokenizer()(text, return_tensors="pt")["input_ids"]
    assert tokenizer(text)["input_ids"] == ids[0].tolist()
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, made.model.eval()(input_ids=ids).logits)


def test_the_model_of_a_run_is_that_of_its_last_checkpoint(run: Path) -> None:
    from safetensors.torch import load_file

    final, last = (load_file(run / name / "model.safetensors") for name in ("model", "checkpoints/checkpoint-3"))
    assert all(torch.equal(final[name], last[name]) for name in final)


def test_the_environment_outside_a_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


# The folder


def test_a_free_folder_is_checked_and_not_made(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert RunFolder.open(tmp_path / "empty").path == tmp_path / "empty"


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match=r"file is a file\. Name a folder with --output_dir"):
        RunFolder.open(tmp_path / "file")


def test_a_used_folder_is_refused_with_both_remedies(run: Path) -> None:
    with pytest.raises(RunFolderError, match=r"is not empty\. Continue that run with --resume, or .* --output_dir"):
        RunFolder.open(run)


def test_resuming_takes_the_last_whole_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-last"):
        written = root / WRITING / name
        written.mkdir(parents=True)
        (written / "trainer_state.json").write_text("{}")
        commit(root, name, {})
    (root / "checkpoint-11" / MARKER).unlink()
    folder = RunFolder.open(tmp_path, resume=True)
    assert folder.last_checkpoint(hashes=False)[0] == tmp_path / "checkpoints" / "checkpoint-10"


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds no checkpoint\. Start anew without --resume.*--save_steps"):
        RunFolder.open(tmp_path, resume=True)


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "a": float("nan"), "b": float("inf"), "c": -0.5, "d": None, "e": "é"})
    (line,) = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": -0.5, "d": None, "e": "é"}


def test_of_a_step_logged_twice_the_last_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_metrics() == []
    for step, loss in ((1, 0.1), (2, 0.2), (3, 0.3), (3, 0.4), (4, 0.5)):
        folder.append_metrics({"step": step, "loss": loss})
    assert [(r["step"], r["loss"]) for r in folder.read_metrics()] == [(1, 0.1), (2, 0.2), (3, 0.4), (4, 0.5)]


def test_a_line_cut_off_by_a_crash_does_not_break_the_rest(tmp_path: Path) -> None:
    """A run that dies while it writes leaves half a line; the resumed run must still append and report."""
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "loss": 0.1})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    folder.append_metrics({"step": 2, "loss": 0.2})
    assert [record["step"] for record in folder.read_metrics()] == [1, 2]


# What a run shows


LOGS = {
    "scores/vigor": -12.345, "rewards/vigor/mean": 0.0, "rewards/accuracy/mean": 0.4375, "entropy": 0.71,
    "completions/mean_length": 24.5, "time/step": 1.5, "time/generation": 1.0, "time/reward": 0.3, "time/update": 0.2,
}  # fmt: skip


def test_a_line_shows_scores_accuracy_length_entropy_and_seconds() -> None:
    assert describe(LOGS, ["vigor", "accuracy"]) == (
        "vigor -12.3  accuracy 0.438  length 24.5  entropy 0.71  1.50 s (generation 1.00 reward 0.30 update 0.20)"
    )
    assert describe({"scores/vigor": None, "rewards/accuracy/mean": None}, ["vigor", "accuracy"]) == ""


def state(step: int, steps: int, main_process: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=steps, is_world_process_zero=main_process)


def test_without_a_terminal_about_twenty_lines_are_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bar, args = ProgressBar(["vigor"]), config(tmp_path)
    bar.on_train_begin(args, state(0, 100), TrainerControl())
    for step in range(1, 101):
        bar.on_step_end(args, state(step, 100), TrainerControl())
        bar.on_log(args, state(step, 100), TrainerControl(), logs=dict(LOGS))
        bar.on_log(args, state(step, 100, main_process=False), TrainerControl(), logs=dict(LOGS))
    bar.on_log(args, state(100, 100), TrainerControl(), logs={"train_runtime": 1.0})
    bar.on_train_end(args, state(100, 100), TrainerControl())
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == SHOWN_LINES + 1
    assert shown[0].startswith("step   1/100  vigor -12.3")
    assert shown[-1].startswith("step 100/100")


def test_on_a_terminal_a_bar_follows_the_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar, args = ProgressBar(["vigor"]), config(tmp_path)
    bar.on_train_begin(args, state(4, 10), TrainerControl())
    assert bar.bar is not None
    assert (bar.bar.n, bar.bar.total) == (4, 10)
    bar.on_step_end(args, state(5, 10), TrainerControl())
    bar.on_log(args, state(5, 10), TrainerControl(), logs=dict(LOGS))
    assert bar.bar.n == 5
    assert "vigor -12.3" in bar.bar.postfix
    bar.on_train_end(args, state(10, 10), TrainerControl())


def test_only_the_main_process_writes_metrics(tmp_path: Path) -> None:
    writer, args = MetricsFile(RunFolder(tmp_path)), config(tmp_path)
    writer.on_log(args, state(1, 2, main_process=False), TrainerControl(), logs={"loss": 1.0})
    writer.on_log(args, state(2, 2), TrainerControl(), logs={"train_runtime": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()
    writer.on_log(args, state(2, 2), TrainerControl(), logs={"loss": 1.0})
    assert RunFolder(tmp_path).read_metrics() == [{"step": 2, "loss": 1.0}]


def test_the_clock_splits_each_step(tmp_path: Path) -> None:
    made = trainer(tmp_path, "vigor", data=dataset(), max_steps=2, gradient_accumulation_steps=2)
    made.add_callback(StepClock(made))
    made.train()
    for record in made.state.log_history[:2]:
        parts = [record[f"time/{part}"] for part in ("generation", "reward", "update")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(record["time/step"])
    assert made.take_seconds() == {"generation": 0.0, "reward": 0.0}
