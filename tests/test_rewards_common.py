"""What every method promises, one row a method; a method without a row fails here."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    EOS,
    PAD,
    SIDES,
    VOCABULARY,
    Sample,
    Side,
    enable_checkpointing,
    naive_logps,
    naive_norm,
    padded,
    qwen2,
    qwen3,
)
from torch import Tensor, nn

from vigor.rewards import METHODS, get, parse_spec
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

G = 4
TEMPERATURE = 0.9


@dataclass(frozen=True)
class Completion:
    """A completion with everything that some method reads."""

    sample: Sample
    text: str
    answer: str | None = "72"
    right: bool = False


BATCH = (
    Completion(Sample([5, 9, 3], [7, 8, 30, 2, EOS]), r"\boxed{72}", right=True),
    Completion(Sample([5, 9, 3], [PAD, 6, EOS, PAD, 11, 12, 36]), "so it is 72"),
    Completion(Sample([5, 9, 3], [17]), r"\boxed{}"),
    Completion(Sample([5, 9, 3], [7, 8, 9, 10, 11, 12], holes=(1, 2, 4)), r"\boxed{71}"),
    Completion(Sample([4], [2, 2, 2, EOS]), r"\boxed{\frac{1}{2}}", answer="0.5", right=True),
    Completion(Sample([4], [20, 21, 22, 23]), r"\boxed{2}", answer="0.5"),
    Completion(Sample([4], [6]), r"\boxed{0.5} or \boxed{0.50}", answer="0.5", right=True),
    Completion(Sample([4], [31, 3, 31, 3, 31, 3]), "", answer="0.5"),
)
EMPTY = Completion(Sample([5, 9, 3], []), "")


def average_ranks(scores: list[float]) -> list[float]:
    shaped = []
    for group in (scores[i : i + G] for i in range(0, len(scores), G)):
        for x in group:
            position = sum(y < x for y in group) + (sum(y == x for y in group) - 1) / 2
            shaped.append(2 * position / (len(group) - 1) - 1)
    return shaped


def unchanged(scores: list[float]) -> list[float]:
    return scores


def slow_vigor(model: nn.Module, row: int, completion: Completion) -> float:
    return -math.sqrt(len(completion.sample.counted)) * naive_norm(model, completion.sample, TEMPERATURE)


@torch.no_grad()
def slow_self_certainty(model: nn.Module, row: int, completion: Completion) -> float:
    model = copy.deepcopy(model).double().eval()
    tokens = []
    for logp in naive_logps(model, completion.sample, TEMPERATURE):
        tokens.append(math.fsum((math.log(1 / VOCABULARY) - x) / VOCABULARY for x in logp.tolist()))
    return math.fsum(tokens) / len(tokens)


def slow_format(model: nn.Module, row: int, completion: Completion) -> float:
    return float(re.search(r"\\boxed\{[^{}]*[^{} ]", completion.text) is not None)


def slow_random(model: nn.Module, row: int, completion: Completion) -> float:
    generator = torch.Generator().manual_seed(0)
    return float([torch.rand((), generator=generator).item() for _ in range(row + 1)][-1] < 0.5)


@dataclass(frozen=True)
class Row:
    """What is promised of one method."""

    slow: Callable[[nn.Module, int, Completion], float]
    """Float64 reference of one row's score: (model, row, completion)."""
    shape: Callable[[list[float]], list[float]] = unchanged
    empty: float = math.nan
    """Score of an empty completion; NaN = no opinion."""
    follows_rows: bool = True
    """Whether a completion keeps its score when it moves to another row."""
    bfloat16: float = 0.0
    """Largest relative change of a score when the weights are rounded to bfloat16."""


TABLE = {
    "vigor": Row(slow_vigor, shape=average_ranks, bfloat16=0.1),
    "self_certainty": Row(slow_self_certainty, bfloat16=0.1),
    "accuracy": Row(lambda model, row, completion: float(completion.right), empty=0.0),
    "format": Row(slow_format, empty=0.0),
    "random": Row(slow_random, empty=1.0, follows_rows=False),
}

methods = pytest.mark.parametrize("name", METHODS)


def rollouts_of(*batch: Completion, side: Side = "right", extra: int = 0, group_size: int = G) -> Rollouts:
    return Rollouts(
        *padded([c.sample for c in batch], side, extra=extra),
        group_size=group_size,
        completions=[c.text for c in batch],
        columns={"answer": [c.answer for c in batch]},
    )


def scores_of(
    name: str, *batch: Completion, model: nn.Module | None = None, micro_batch: int = 16, **padding: Any
) -> Tensor:
    rollouts = rollouts_of(*batch, **padding)
    policy = PolicyPass(qwen2() if model is None else model, rollouts, temperature=TEMPERATURE, micro_batch=micro_batch)
    return get(name).score(rollouts, policy)


def assert_same(got: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_every_method_has_a_row() -> None:
    assert list(TABLE) == list(METHODS)


@methods
@pytest.mark.parametrize("make", [qwen2, qwen3])
def test_equals_the_slow_reference(name: str, make: Callable[..., nn.Module]) -> None:
    model, row = make(), TABLE[name]
    wanted = [row.slow(model, i, completion) for i, completion in enumerate(BATCH)]
    scores = scores_of(name, *BATCH, model=model)
    assert scores.dtype == torch.float32
    assert scores.shape == (len(BATCH),)
    assert not scores.requires_grad
    assert scores.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    rollouts = rollouts_of(*BATCH)
    shaped = get(name)(rollouts, PolicyPass(model, rollouts, temperature=TEMPERATURE))
    assert shaped.tolist() == pytest.approx(row.shape(wanted), rel=1e-6, abs=1e-7)


@methods
@pytest.mark.parametrize("side", SIDES)
def test_padding_changes_nothing(name: str, side: Side) -> None:
    assert_same(scores_of(name, *BATCH, side=side, extra=5), scores_of(name, *BATCH))


@methods
def test_permuting_groups_and_rows_permutes_rewards(name: str) -> None:
    order = [6, 4, 7, 5, 2, 0, 3, 1]
    model, moved = qwen2(), [BATCH[i] for i in order]
    one, other = rollouts_of(*BATCH), rollouts_of(*moved)
    rewards = get(name)(one, PolicyPass(model, one))
    permuted = get(name)(other, PolicyPass(model, other))
    assert_same(permuted, rewards[order] if TABLE[name].follows_rows else rewards)


@methods
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_micro_batch_changes_nothing(name: str, micro_batch: int) -> None:
    assert_same(scores_of(name, *BATCH, micro_batch=micro_batch), scores_of(name, *BATCH))


@methods
def test_gradient_checkpointing_and_train_mode_change_nothing(name: str) -> None:
    model = qwen2()
    enable_checkpointing(model, use_reentrant=False)
    assert_same(scores_of(name, *BATCH, model=model.train()), scores_of(name, *BATCH))


@methods
def test_scoring_draws_no_random_numbers(name: str) -> None:
    state = torch.get_rng_state()
    rollouts = rollouts_of(*BATCH)
    model = qwen2()
    get(name)(rollouts, PolicyPass(model, rollouts))
    assert torch.equal(torch.get_rng_state(), state)


@methods
def test_bfloat16_weights_change_little(name: str) -> None:
    scores, tolerance = scores_of(name, *BATCH, model=qwen2(torch.bfloat16)), TABLE[name].bfloat16
    assert scores.dtype == torch.float32
    wanted = scores_of(name, *BATCH)
    assert bool(((scores - wanted).abs() <= tolerance * wanted.abs()).all())


@methods
def test_an_empty_completion(name: str) -> None:
    batch = (EMPTY, *BATCH[1:])
    assert_same(scores_of(name, *batch), torch.cat([torch.tensor([TABLE[name].empty]), scores_of(name, *BATCH)[1:]]))
    rollouts = rollouts_of(*batch)
    shaped = get(name)(rollouts, PolicyPass(qwen2(), rollouts))
    assert shaped.isnan().tolist() == [math.isnan(TABLE[name].empty)] + [False] * 7


@methods
def test_one_row_alone(name: str) -> None:
    one_token = replace(BATCH[0], sample=Sample([5], [6]))
    wanted = TABLE[name].slow(qwen2(), 0, one_token)
    assert scores_of(name, one_token, group_size=1).tolist() == pytest.approx([wanted], rel=1e-6)
    rollouts = rollouts_of(one_token, group_size=1)
    assert get(name)(rollouts, PolicyPass(qwen2(), rollouts)).isfinite().all()


@methods
@pytest.mark.parametrize("side", SIDES)
def test_identical_completions_get_identical_rewards(name: str, side: Side) -> None:
    batch = [BATCH[0]] * 5 + list(BATCH[1:4]) * 5
    scores = scores_of(name, *batch, side=side, micro_batch=3)
    if TABLE[name].follows_rows:
        assert len(set(scores[:5].tolist())) == 1
        assert len(set(scores.tolist())) <= 4
    else:
        assert set(scores.tolist()) <= {0.0, 1.0}


@methods
def test_the_name_is_the_spec(name: str) -> None:
    reward = get(name)
    assert get(reward.name).name == name
    assert parse_spec(reward.name) == (name, {})


@methods
def test_has_a_page_in_the_docs(name: str) -> None:
    page = Path(__file__).parents[1] / "docs" / "methods" / f"{name}.md"
    assert page.is_file(), f"{page} is missing: every method has a page"
