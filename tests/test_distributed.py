"""Two processes (gloo, CPU) give the rewards, scores and advantages of one, groups split between them included.

Sampling differs with the processes' seeds, so the completions are injected. This file is also the program of the
two: `python tests/test_distributed.py work FOLDER FUSED-ROWS…` or `python tests/test_distributed.py train FLAG…`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import pytest
import torch
from helpers_distributed import forked
from helpers_trainer import save_tiny, table, tiny_model, trainer, weights, write_jsonl

from vigor.cli import main
from vigor.commands.train import leave_process_group
from vigor.runfolder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EOS = 1
RUNS = (("off", 12), ("off", 6), ("off", 4), ("keep", 12), ("keep", 4), ("retain", 6))
REWARDS = ["vigor", "self_certainty", "random", "vigor(ties=index)"]
CUT, EQUAL = (0, 5, 11, 13), {1: [44, 45, EOS], 6: [44, 45, EOS], 10: [46, EOS], 12: [46, EOS]}
# Three groups of eight; with two processes rows 8 to 11 of the second lie in the first process, 12 to 15 in the other.
COMPLETIONS = [EQUAL.get(row, [40 + row, 20 + row % 5, 50 - row, *([] if row in CUT else [EOS])]) for row in range(24)]


def work(folder: Path, rows: int, fused: str) -> None:
    """One process of a run whose generation batch is the 24 completions above."""
    torch.set_num_threads(1)
    made = trainer(
        folder,
        REWARDS,
        reward_weights=[1.0, 0.3, 0.0, 0.0],
        completions=COMPLETIONS,
        num_generations=8,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=24 // rows // int(os.environ.get("WORLD_SIZE", "1")),
        truncated="worst",
        fused=fused,
        max_grad_norm=0.5,
    )
    made.train()
    if made.accelerator.is_main_process:
        torch.save(weights(made.accelerator.unwrap_model(made.model)), folder / "weights.pt")


def train_late(argv: list[str]) -> NoReturn:
    """`vigor train` whose second process gets to the check of the run folder three seconds late."""
    check = RunFolder.open.__func__

    def late(*args: Any, **kwargs: Any) -> RunFolder:
        if os.environ["RANK"] == "1":
            time.sleep(3)
        return check(*args, **kwargs)

    RunFolder.open = classmethod(late)
    raise SystemExit(main(argv))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    work(folder, 24, "off")
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of two processes for each kind of update and number of rows a process and round."""
    folder = tmp_path_factory.mktemp("together")
    done = forked(__file__, "work", folder, *(f"{fused}-{rows}" for fused, rows in RUNS), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("fused", "rows"), RUNS)
def test_two_processes_give_the_rewards_of_one(fused: str, rows: int, alone: Path, together: Path) -> None:
    compare(table(alone), table(together / f"{fused}-{rows}"))


@pytest.mark.parametrize(("fused", "rows"), RUNS)
def test_two_processes_end_in_the_weights_of_one(fused: str, rows: int, alone: Path, together: Path) -> None:
    wanted, got = torch.load(alone / "weights.pt"), torch.load(together / f"{fused}-{rows}" / "weights.pt")
    start = weights(tiny_model())
    moved = sum((wanted[name] - start[name]).square().sum() for name in wanted).sqrt()
    off = sum((wanted[name] - got[name]).square().sum() for name in wanted).sqrt()
    # Adam's first step is as long as the learning rate whatever the gradient: where that is rounding, signs may flip.
    assert off < 2e-2 * moved


def compare(alone: pd.DataFrame, together: pd.DataFrame) -> None:
    for column in ("prompt", "completion", "length", "truncated", "random"):
        assert together[column].tolist() == alone[column].tolist(), column
    for column in ("vigor/score", "self_certainty"):
        assert together[column].tolist() == pytest.approx(alone[column].tolist(), rel=1e-6), column
    for column in ("vigor", "vigor(ties=index)"):
        assert together[column].tolist() == alone[column].tolist(), column
    assert together["advantage"].tolist() == pytest.approx(alone["advantage"].tolist(), abs=1e-4)


def test_the_batch_holds_what_it_is_meant_to_test(alone: Path) -> None:
    rows = table(alone)
    assert rows["truncated"].to_numpy().nonzero()[0].tolist() == list(CUT)
    assert rows["vigor"][0] == rows["vigor"][5] == rows["vigor"][:8].min()
    assert rows["vigor"][11] == rows["vigor"][13] == rows["vigor"][8:16].min()
    assert rows["vigor"][1] == rows["vigor"][6]
    assert rows["vigor"][10] == rows["vigor"][12]
    assert rows["vigor"].nunique() > 6


def test_vigor_train_runs_in_two_processes_and_writes_its_files_once(tmp_path: Path) -> None:
    prompts = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": f"Q:{a}+2\nA:", "answer": str(a + 2)} for a in range(1, 9)]
    )
    model = save_tiny(tmp_path / "model")
    flags = {
        "prompts": prompts, "model_name_or_path": model, "output_dir": "run", "max_steps": 2, "num_generations": 4,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_completion_length": 8,
        "learning_rate": 1e-3, "save_steps": 1, "ddp_backend": "gloo", "gradient_checkpointing": False,
    }  # fmt: skip
    argv = ["train", "--use_cpu", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
    done = forked(__file__, *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert done.stdout.count("Run folder:") == 1
    assert done.stdout.count("step 1/2") == 1
    assert json.loads((run / "environment.json").read_text("utf-8"))["processes"] == 2
    for step in (1, 2):
        rows = table(run, step)
        assert len(rows) == 8
        assert rows["prompt"].nunique() == 2
        assert rows.groupby("prompt")["vigor"].mean().tolist() == pytest.approx([0, 0], abs=1e-6)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    for name in ("config.yaml", "results.json", "report.html", "model/model.safetensors", "model/tokenizer.json"):
        assert (run / name).is_file(), name
    resumed = forked(__file__, *argv, "--resume", "--max_steps", "3", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]


def test_when_one_of_two_forks_fails_the_other_is_killed(tmp_path: Path) -> None:
    """As torchrun does; else a failure would wait for the time limit."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, tempfile, time\n"
        "print(os.environ['WORLD_SIZE'], tempfile.mkdtemp(), flush=True)\n"
        "sys.exit('no luck') if os.environ['RANK'] == '1' else time.sleep(600)\n"
    )
    done = forked(str(script), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "no luck\n")
    folders = [line.removeprefix("2 ") for line in done.stdout.splitlines()]
    assert not any(Path(folder).exists() for folder in folders)
    script.write_text("import time; time.sleep(600)")
    assert forked(str(script), processes=1, timeout=1).returncode == 9


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train_late(sys.argv[1:])
    for name in sys.argv[3:]:
        fused, rows = name.split("-")
        work(Path(sys.argv[2]) / name, int(rows), fused)
    leave_process_group()
