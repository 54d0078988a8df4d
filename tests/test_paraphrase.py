"""The lab's paraphraser: the answer stays, the split stays, the wording changes, and everything is repeatable."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from vigor.data import load_prompts
from vigor.lab.paraphrase import main, make_pairs, paraphrase
from vigor.lab.tasks import SPLITS, TASKS, make_example, split_of
from vigor.lab.tokenizer import UNK, build_tokenizer

N = 300


def answer_of(prompt: str) -> str:
    """The gold answer by Python itself, from the question alone."""
    question = prompt.removeprefix("Q:").removesuffix("\nA:")
    if "print" in question:
        with redirect_stdout(StringIO()) as printed:
            exec(question, {})
        return printed.getvalue().strip()
    if question.endswith(" mod 10"):
        return str(eval(question.removesuffix(" mod 10")) % 10)
    if question.startswith("solve "):
        left, right = question.removeprefix("solve ").replace("x", "*x").split("=")
        solutions = [x for x in range(-200, 200) if eval(left, {"x": x}) == int(right)]
        assert len(solutions) == 1
        return str(solutions[0])
    return str(eval(question))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_the_gold_answer_the_split_and_the_vocabulary_stay(task: str, split: str) -> None:
    tokenizer, found = build_tokenizer(), 0
    for index in range(N):
        example = make_example(task, split, index)
        assert answer_of(example.prompt) == example.answer
        other = paraphrase(example.prompt, seed=index)
        if other is None:
            continue
        found += 1
        assert other != example.prompt
        assert answer_of(other) == example.answer
        assert split_of(other[2:-3]) == split
        assert UNK not in tokenizer.encode(other).tokens
    assert found >= 0.85 * N, f"only {found} of {N} questions have another wording"


@pytest.mark.parametrize("task", TASKS)
def test_a_rewrite_is_a_question_of_the_same_task(task: str) -> None:
    """As many digits, terms and lines as before, so that no view is harder than the other by its size."""
    for index in range(N):
        prompt = make_example(task, "train", index).prompt
        other = paraphrase(prompt)
        assert other is None or (
            other.count("\n") == prompt.count("\n")
            and abs(len(other) - len(prompt)) <= 2
            and ("solve" in other) == ("solve" in prompt)
            and ("mod" in other) == ("mod" in prompt)
        )


def test_the_seed_alone_decides() -> None:
    prompts = [make_example("lab:math", "train", index).prompt for index in range(100)]
    once = [paraphrase(prompt, seed=3) for prompt in prompts]
    assert once == [paraphrase(prompt, seed=3) for prompt in prompts]
    assert once != [paraphrase(prompt, seed=4) for prompt in prompts]


def test_golden_rewrites() -> None:
    assert paraphrase("Q:45+303\nA:") == "Q:44+304\nA:"
    assert paraphrase("Q:s='dehaca'\nprint(s[1:4])\nA:") == "Q:s='dehaah'\nprint(s[1:4])\nA:"
    assert paraphrase("Q:solve 5x+19=59\nA:") == "Q:solve 5x+18=58\nA:"


def test_what_is_no_question_of_the_lab_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompt of the lab: '45"):
        paraphrase("45+303")
    with pytest.raises(ValueError, match="no question of the lab: 'why"):
        paraphrase("Q:why?\nA:")


@pytest.mark.parametrize("task", TASKS)
def test_pairs_stand_side_by_side(task: str) -> None:
    rows = make_pairs(task, "train", 50, start=7, seed=1)
    assert len(rows) == 100
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["pair"] == second["pair"]
        assert (
            first["answer"] == second["answer"] == answer_of(str(first["prompt"])) == answer_of(str(second["prompt"]))
        )
        assert first["prompt"] != second["prompt"]
    assert len({row["pair"] for row in rows}) == 50
    assert make_pairs(task, "train", 20, start=7, seed=1) == rows[:40]


def test_the_command_writes_prompts_that_the_loader_takes_in_order(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    assert main(["--task", "lab:code", "--questions", "20", "--out", str(out)]) == 0
    written = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert written == make_pairs("lab:code", "train", 20)
    loaded = load_prompts(str(out)).dataset
    assert loaded["pair"] == [row["pair"] for row in written]
    assert loaded["prompt"] == [row["prompt"] for row in written]
