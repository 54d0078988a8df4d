"""Two processes give the agreement and reference rewards of one, with groups and pairs split between them.

As a program: `test_agreement_distributed.py FOLDER` is one process of a run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers_distributed import forked
from helpers_trainer import dataset, lab_tokenizer, table, trainer
from transformers import TrainerCallback

from vigor.commands.train import leave_process_group

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EOS = 1
SPLIT = ["majority_vote", "majority_vote(trained=3)", "empo", "co_rewarding_2", "rlpr", "verifree", "nover", "random"]
ANSWERS = ("7", "7", "8", None, "9", "8", "8", "7", None, None, "3", "4", "5", "5", "6", "7", "5", None)
TEACHER = ("8", "8", "1", "2", "3", "7", "7", None, "7", "2", "3", "4", "6", "6", None, "7", "5", "8")
"""Three groups of six: rows 6 to 8 of the second lie in the first process, 9 to 11 in the other."""


def texts(answers: Any) -> list[list[int]]:
    tokenizer = lab_tokenizer()
    return [
        [*tokenizer(" ok" if a is None else f"{i % 5}+{a} so \\boxed{{{a}}}")["input_ids"], EOS]
        for i, a in enumerate(answers)
    ]


def inject(made: Any, policy: list[list[int]], teacher: list[list[int]]) -> None:
    """Replaces sampling: the policy's rows first, then the teacher's, and so on."""
    turns = [policy, teacher]

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        turns.append(turns.pop(0))
        first = made.accelerator.process_index * len(prompt_ids)
        return [list(ids) for ids in turns[-1][first : first + len(prompt_ids)]], None

    made._generate_single_turn = generate


class Gradient(TrainerCallback):
    """Writes the gradient of a step, as the first process has it after reduction."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            torch.save(torch.cat(gradients), self.folder / "gradient.pt")


def work(folder: Path) -> None:
    """One process: runs with split groups, and one whose two wordings lie in different processes."""
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    split = trainer(
        folder / "split",
        SPLIT,
        data=dataset([f"Q:{a}+2\nA:" for a in (5, 1, 3)], answer=["7", "3", "5"]),
        reward_weights=[1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.0, 0.1],
        num_generations=6,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=6 // processes,
    )
    inject(split, texts(ANSWERS), texts(TEACHER))
    split.train()
    twins = trainer(
        folder / "twins",
        ["co_rewarding_1", "co_rewarding_1(equal=math)"],
        data=dataset(["Q:3+4\nA:", "Q:4+3\nA:"], pair=["a", "a"]),
        num_generations=6,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4 // processes,
        completions=texts(ANSWERS[:12]),
    )
    twins.train()
    terms = trainer(
        folder / "terms",
        ["verifree", "jepo(bound=group)"],
        data=dataset([f"Q:{a}+2\nA:" for a in (5, 1, 3)], answer=["7", "3", "5"]),
        num_generations=6,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=6 // processes,
        completions=texts(ANSWERS),
        max_grad_norm=0.0,
    )
    terms.add_callback(Gradient(folder / "terms"))
    terms.train()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    alone, together = (tmp_path_factory.mktemp(name) for name in ("alone", "together"))
    work(alone)
    done = forked(__file__, together)
    assert done.returncode == 0, done.stderr[-3000:]
    return alone, together


def columns_of(runs: tuple[Path, Path], run: str, names: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    one, other = (table(folder / run) for folder in runs)
    assert other["completion"].tolist() == one["completion"].tolist()
    for name in names:
        assert other[name].tolist() == pytest.approx(one[name].tolist(), rel=1e-6, abs=1e-7, nan_ok=True), name
    assert other["advantage"].tolist() == pytest.approx(one["advantage"].tolist(), abs=1e-4)
    return one, other


def test_split_groups_vote_as_whole_ones(runs: tuple[Path, Path]) -> None:
    one, other = columns_of(runs, "split", SPLIT)
    assert other["majority_vote"].tolist() == [1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0]
    assert other["co_rewarding_2"].tolist() == [0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert other["teacher_completion"].tolist() == one["teacher_completion"].tolist()
    assert other["majority_vote(trained=3)"].isna().tolist() == [False, False, False, True, True, True] * 3
    assert other["empo"].tolist()[6:12] == pytest.approx([0] * 6), "no two of the second group agree"
    assert other["rlpr"].nunique() > 5


def test_the_other_wording_may_lie_in_the_other_process(runs: tuple[Path, Path]) -> None:
    _, other = columns_of(runs, "twins", ["co_rewarding_1", "co_rewarding_1(equal=math)"])
    assert other["co_rewarding_1"].tolist() == [0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0]


def test_terms_of_the_loss_are_those_of_one_process(runs: tuple[Path, Path]) -> None:
    one, other = (torch.load(folder / "terms" / "gradient.pt") for folder in runs)
    assert one.norm() > 1e-4
    assert (other - one).norm() < 1e-4 * one.norm()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    leave_process_group()
