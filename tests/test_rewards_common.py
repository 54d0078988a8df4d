"""What every method promises, one row a method; a method without a row fails here.

The rows stand in rows_*.py, one file a family; rewards_table.py says what a row holds.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import rows_agreement
import rows_intrinsic
import rows_reference
import rows_verifiable
import torch
from models import SIDES, Sample, Side, enable_checkpointing, qwen2, qwen3
from rewards_table import G, Row, built, emptied, policy_of, rollouts_of, with_first
from torch import Tensor, nn

from vigor.rewards import METHODS, get, parse_spec
from vigor.rewards.base import Reward
from vigor.rollouts import BatchTexts

TABLE: dict[str, Row] = {**rows_intrinsic.ROWS, **rows_agreement.ROWS, **rows_reference.ROWS, **rows_verifiable.ROWS}
POLICY = {"grad_norm", "token_stats", "reference_logps"}
"""What a reward needs that reads the policy."""

specs = pytest.mark.parametrize("spec", TABLE)
RUNNERS = {"unit_tests", "verpo"}
"""Methods that run code; their rows name a function that needs no sandbox."""
names = pytest.mark.parametrize("name", [name for name in METHODS if name not in RUNNERS])


def assert_same(got: Tensor, wanted: Tensor | list[float], tolerance: float = 2e-6) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float32)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


@cache
def reward_of(spec: str) -> Reward:
    """One for all tests: some start a process of their own to compare answers."""
    return get(spec)


def fresh_scores(spec: str, **padding: Any) -> Tensor:
    row = TABLE[spec]
    rollouts = rollouts_of(*row.batch, **padding)
    return reward_of(spec).score(rollouts, policy_of(row, rollouts))


@cache
def plain_scores(spec: str) -> Tensor:
    """Right-padded, and not to be changed."""
    return fresh_scores(spec)


def test_every_method_has_a_row() -> None:
    assert {parse_spec(spec)[0] for spec in TABLE} == set(METHODS)
    assert set(METHODS) - RUNNERS <= set(TABLE)


@specs
@pytest.mark.parametrize("make", [qwen2, qwen3])
def test_equals_the_slow_reference(spec: str, make: Callable[..., nn.Module]) -> None:
    model, row = built(make), TABLE[spec]
    wanted = row.slow(model, row.batch)
    rollouts = rollouts_of(*row.batch)
    policy = policy_of(row, rollouts, model)
    scores = reward_of(spec).score(rollouts, policy)
    assert scores.dtype == torch.float32
    assert scores.shape == (len(row.batch),)
    assert not scores.requires_grad
    assert scores.tolist() == pytest.approx(wanted, rel=row.tolerance, abs=row.tolerance, nan_ok=True)
    rewards = reward_of(spec)(rollouts, policy)
    assert rewards.tolist() == pytest.approx(row.shape(wanted), rel=row.tolerance, abs=row.tolerance, nan_ok=True)


@specs
@pytest.mark.parametrize("side", SIDES)
def test_padding_changes_nothing(spec: str, side: Side) -> None:
    assert_same(fresh_scores(spec, side=side, extra=5), plain_scores(spec))


@specs
def test_permuting_groups_and_rows_permutes_rewards(spec: str) -> None:
    row, order = TABLE[spec], [6, 4, 7, 5, 2, 0, 3, 1]
    moved = [row.batch[i] for i in order]
    one, other = rollouts_of(*row.batch), rollouts_of(*moved)
    rewards = reward_of(spec)(one, policy_of(row, one))
    permuted = reward_of(spec)(other, policy_of(row, other))
    assert_same(permuted, rewards[order] if row.follows_rows else row.shape(row.slow(built(), moved)))


@specs
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batch_changes_nothing(spec: str, micro_batch: int) -> None:
    row = TABLE[spec]
    rollouts = rollouts_of(*row.batch)
    assert_same(reward_of(spec).score(rollouts, policy_of(row, rollouts, micro_batch=micro_batch)), plain_scores(spec))


def texts_of(row: Row) -> BatchTexts:
    """What the trainer gathers for rewards that compare completions."""
    columns = {name: [c.columns[name] for c in row.batch] for name in row.batch[0].columns}
    return BatchTexts([c.text for c in row.batch], columns)


@specs
def test_processes_that_hold_parts_score_the_same(spec: str) -> None:
    row = TABLE[spec]
    texts = texts_of(row) if "group" in reward_of(spec).needs else None
    cut = G if row.whole_groups and texts is None else 3
    parts = []
    for first, batch in ((0, row.batch[:cut]), (cut, row.batch[cut:])):
        rollouts = rollouts_of(*batch, first_row=first, batch_texts=texts)
        parts.append(reward_of(spec).score(rollouts, policy_of(row, rollouts)))
    assert_same(torch.cat(parts), plain_scores(spec))


@specs
def test_gradient_checkpointing_and_train_mode_change_nothing(spec: str) -> None:
    model, row = qwen2(), TABLE[spec]
    enable_checkpointing(model, use_reentrant=False)
    rollouts = rollouts_of(*row.batch)
    assert_same(reward_of(spec).score(rollouts, policy_of(row, rollouts, model.train())), plain_scores(spec))
    assert all(parameter.grad is None for parameter in model.parameters())


@specs
def test_scoring_draws_no_random_numbers(spec: str) -> None:
    state = torch.get_rng_state()
    fresh_scores(spec)
    assert torch.equal(torch.get_rng_state(), state)


@specs
def test_bfloat16_weights_change_little(spec: str) -> None:
    row = TABLE[spec]
    rollouts = rollouts_of(*row.batch)
    scores, wanted = reward_of(spec).score(rollouts, policy_of(row, rollouts, built(bfloat16))), plain_scores(spec)
    assert scores.dtype == torch.float32
    assert torch.equal(scores.isnan(), wanted.isnan())
    assert (scores - wanted).abs().nan_to_num(0.0).max() <= row.bfloat16 * wanted.abs().nan_to_num(0.0).max()


def bfloat16() -> nn.Module:
    return qwen2(torch.bfloat16)


@specs
def test_an_empty_completion(spec: str) -> None:
    row = TABLE[spec]
    batch = (emptied(row.batch[0]), *row.batch[1:])
    rollouts = rollouts_of(*batch)
    wanted = row.slow(built(), batch)
    assert_same(reward_of(spec).score(rollouts, policy_of(row, rollouts)), wanted, max(2e-6, row.tolerance))
    rewards = reward_of(spec)(rollouts, policy_of(row, rollouts))
    assert rewards.isnan().tolist() == [math.isnan(x) for x in row.shape(wanted)]


@specs
def test_only_empty_completions(spec: str) -> None:
    row = TABLE[spec]
    batch = [emptied(completion) for completion in row.batch]
    rollouts = rollouts_of(*batch)
    assert_same(reward_of(spec)(rollouts, policy_of(row, rollouts)), row.shape(row.slow(built(), batch)))


@specs
def test_one_row_alone(spec: str) -> None:
    row = TABLE[spec]
    batch = with_first(row, sample=Sample(row.batch[0].sample.prompt, [6]))[:1]
    rollouts = rollouts_of(*batch, group_size=1)
    if "twin" in reward_of(spec).needs:
        with pytest.raises(ValueError, match="not 2"):
            reward_of(spec).score(rollouts, policy_of(row, rollouts))
        return
    assert_same(reward_of(spec).score(rollouts, policy_of(row, rollouts)), row.slow(built(), batch), row.tolerance)
    assert not reward_of(spec)(rollouts, policy_of(row, rollouts)).isinf().any()


@specs
@pytest.mark.parametrize("side", SIDES)
def test_identical_completions_get_identical_rewards(spec: str, side: Side) -> None:
    row = TABLE[spec]
    batch = [row.batch[0]] * 4 + [row.batch[1], row.batch[0], row.batch[1], row.batch[0]]
    rollouts = rollouts_of(*batch, side=side)
    policy = policy_of(row, rollouts, micro_batch=3)
    if row.follows_rows:
        scores, rewards = reward_of(spec).score(rollouts, policy), reward_of(spec)(rollouts, policy)
        for values in (scores[:4], rewards[:4], rewards[4::2], rewards[5::2]):
            assert len(set(values.nan_to_num(9).tolist())) == 1
    else:
        assert_same(reward_of(spec).score(rollouts, policy), row.slow(built(), batch))


@specs
def test_completions_that_were_all_cut_off(spec: str) -> None:
    row = TABLE[spec]
    cut_off = rollouts_of(*row.batch, truncated_B=torch.ones(len(row.batch), dtype=torch.bool))
    rewards = reward_of(spec)(cut_off, policy_of(row, cut_off))
    plain = rollouts_of(*row.batch)
    assert torch.equal(rewards.isnan(), reward_of(spec)(plain, policy_of(row, plain)).isnan())
    assert not rewards.isinf().any()
    complete = rollouts_of(*row.batch, truncated_B=torch.zeros(len(row.batch), dtype=torch.bool))
    assert_same(reward_of(spec).score(complete, policy_of(row, complete)), plain_scores(spec))


def diverged() -> nn.Module:
    """A model whose weights are NaN."""
    model = copy.deepcopy(qwen2())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


@specs
def test_a_diverged_policy_is_noticed(spec: str) -> None:
    row, reward = TABLE[spec], reward_of(spec)
    rollouts = rollouts_of(*row.batch)
    if reward.needs & POLICY:
        with pytest.raises(FloatingPointError, match=r"(nan for 8 of 8 completions|NaN for continuation).*diverged"):
            reward(rollouts, policy_of(row, rollouts, built(diverged)))
    else:
        assert_same(reward.score(rollouts, policy_of(row, rollouts, built(diverged))), plain_scores(spec))


@specs
def test_the_name_is_the_spec(spec: str) -> None:
    assert get(spec).name == spec
    assert get(get(spec).name).name == spec


@names
def test_defaults_written_out_change_nothing(name: str) -> None:
    factory = inspect.signature(vars(import_module(METHODS[name].module))[name])
    options = {key: parameter.default for key, parameter in factory.parameters.items()}
    literal = (bool, int, float, str, type(None))
    written = ", ".join(f"{key}={value!r}" for key, value in options.items() if isinstance(value, literal))
    spec = f"{name}({written})"
    assert parse_spec(spec)[0] == name
    row = TABLE[name]
    rollouts = rollouts_of(*row.batch)
    policy = policy_of(row, rollouts)
    reward = get(spec)
    assert isinstance(reward, Reward)
    assert_same(reward(rollouts, policy), reward_of(name)(rollouts, policy), 0.0)
    assert reward.needs == reward_of(name).needs
    assert reward.columns == reward_of(name).columns


@names
def test_has_a_page_in_the_docs(name: str) -> None:
    page = Path(__file__).parents[1] / "docs" / "methods" / f"{name}.md"
    assert page.is_file(), f"{page} is missing: every method has a page"
