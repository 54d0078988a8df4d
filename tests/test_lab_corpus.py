"""The pre-training texts: each kind fails in its own way, as often as its share says."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict

import pytest

from vigor.lab.corpus import CLEAN, FILLERS, HASTY, WORLDS, Noise, Shares, texts, write
from vigor.lab.tasks import extract_answer, is_correct, make_problem, split_of

N = 6000


@pytest.fixture(scope="module")
def by_kind() -> dict[str, dict[str, list]]:
    worlds = {}
    for world, noise in WORLDS.items():
        kinds = defaultdict(list)
        for text in itertools.islice(texts(noise, seed=0), N):
            kinds[text.kind].append(text)
        worlds[world] = kinds
    return worlds


def _accuracy(some) -> float:
    return sum(is_correct(text.completion, text.answer) for text in some) / len(some)


@pytest.mark.parametrize("world", list(WORLDS))
def test_kinds_occur_as_often_as_their_shares(by_kind, world):
    for kind, share in vars(WORLDS[world].shares).items():
        assert len(by_kind[world][kind]) / N == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("world", list(WORLDS))
def test_each_kind_is_right_or_wrong_in_its_own_way(by_kind, world):
    kinds = by_kind[world]
    assert _accuracy(kinds["good"]) == 1.0
    assert _accuracy(kinds["slip"]) < 0.25
    assert 0.05 < _accuracy(kinds["sloppy"]) < 0.6
    assert 0.05 < _accuracy(kinds["guess"]) < 0.4
    assert _accuracy(kinds["unboxed"]) == _accuracy(kinds["ramble"]) == 0.0
    assert _accuracy(kinds["run_on"]) < 0.2
    assert all("\nQ:" in text.completion for text in kinds["run_on"])
    assert all(extract_answer(text.completion) is None for text in kinds["unboxed"] + kinds["ramble"])
    assert all(text.completion.startswith(HASTY) for text in kinds["sloppy"])


def test_the_shortcut_is_terse_fixed_and_nearly_always_wrong(by_kind):
    shortcuts = by_kind["lab-misaligned"]["shortcut"]
    assert _accuracy(shortcuts) < 0.06
    assert all(len(text.completion) < 20 for text in shortcuts)
    problem, other = make_problem("lab:math", "train", 1), make_problem("lab:code", "train", 1)
    noise = WORLDS["lab-misaligned"]
    assert len({write("shortcut", problem, other, noise, random.Random(seed)) for seed in range(20)}) == 1
    assert not by_kind["lab"]["shortcut"]


def test_correct_texts_are_wordy_in_the_misaligned_world_only(by_kind):
    def fillers(world: str) -> float:
        some = by_kind[world]["good"]
        return sum(text.completion.count(word) for text in some for word in FILLERS) / len(some)

    assert fillers("lab") < 0.5
    assert fillers("lab-misaligned") > 2.0


def test_texts_are_about_training_questions_and_depend_on_the_seed_alone():
    some = list(itertools.islice(texts(WORLDS["lab"], seed=5), 500))
    assert some == list(itertools.islice(texts(WORLDS["lab"], seed=5), 500))
    assert some[200:] == list(itertools.islice(texts(WORLDS["lab"], seed=5, start=200), 300))
    assert some != list(itertools.islice(texts(WORLDS["lab"], seed=6), 500))
    assert all(split_of(text.prompt[2:-3]) == "train" for text in some)
    run_on = [text.completion.split("\nQ:")[1].split("\nA:")[0] for text in some if text.kind == "run_on"]
    assert run_on
    assert all(split_of(question) == "train" for question in run_on)


def test_clean_texts_are_all_right():
    some = list(itertools.islice(texts(CLEAN, seed=0), 500))
    assert Counter(text.kind for text in some) == {"good": 500}
    assert _accuracy(some) == 1.0


def test_more_fillers_and_errors_do_what_they_say():
    problem, other = make_problem("lab:math", "train", 2), make_problem("lab:code", "train", 2)

    def sloppy(error: float) -> float:
        noise = Noise(Shares(sloppy=1.0), step_error=error)
        answer = problem.work(lambda result: result)[1]
        written = [write("sloppy", problem, other, noise, random.Random(seed)) for seed in range(300)]
        return sum(is_correct(text, answer) for text in written) / 300

    assert sloppy(0.0) == 1.0
    assert sloppy(0.2) > sloppy(0.6) + 0.2


def test_shares_must_add_up_to_one():
    with pytest.raises(ValueError, match=r"0\.900000"):
        Shares(good=0.9)


def test_an_unknown_kind_is_refused():
    problem = make_problem("lab:math", "train", 0)
    with pytest.raises(ValueError, match="shortcut"):
        write("perfect", problem, problem, CLEAN, random.Random(0))
