"""Group metrics against brute force, and in the trainer's logs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import dataset, table, trainer
from torch import Tensor

from vigor.groupmetrics import top_quarter_accuracy, within_group_auc
from vigor.rewards.base import Reward, from_values, ranked

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NAN = math.nan


def slow_auc(scores: list[list[float]], right: list[list[float]]) -> float:
    """Every pair of a right and a wrong completion of a prompt, one after the other."""
    outcomes = []
    for group, correct in zip(scores, right, strict=True):
        for (s, r), (t, q) in itertools.permutations(zip(group, correct, strict=True), 2):
            if r == 1 and q == 0 and not math.isnan(s) and not math.isnan(t):
                outcomes.append(1.0 if s > t else 0.5 if s == t else 0.0)
    return sum(outcomes) / len(outcomes) if outcomes else NAN


def slow_top_quarter(scores: list[list[float]], right: list[list[float]]) -> float:
    """The mean over every order in which equal scores may be taken, of the accuracy of each group's top quarter."""
    correct, places = 0.0, 0
    for group, labels in zip(scores, right, strict=True):
        rows = [(s, r) for s, r in zip(group, labels, strict=True) if not math.isnan(s) and not math.isnan(r)]
        k = math.ceil(len(rows) / 4)
        orders = [
            order for order in itertools.permutations(rows) if all(a[0] >= b[0] for a, b in itertools.pairwise(order))
        ]
        correct += sum(sum(r for _, r in order[:k]) for order in orders) / max(len(orders), 1)
        places += k
    return correct / places if places else NAN


def batches() -> list[tuple[Tensor, Tensor]]:
    """Groups with ties, missing scores and missing labels, all right, all wrong."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for g in (1, 2, 4, 5, 6):
        scores = torch.randint(0, 4, (4, g), generator=generator).float()
        right = torch.randint(0, 2, (4, g), generator=generator).float()
        scores[torch.rand(4, g, generator=generator) < 0.15] = NAN
        right[torch.rand(4, g, generator=generator) < 0.15] = NAN
        found.append((scores, right))
    found.append((torch.zeros(2, 3), torch.ones(2, 3)))
    found.append((torch.full((2, 3), NAN), torch.ones(2, 3)))
    return found


@pytest.mark.parametrize(("scores", "right"), batches())
def test_equal_brute_force(scores: Tensor, right: Tensor) -> None:
    lists = scores.tolist(), right.tolist()
    assert within_group_auc(scores, right) == pytest.approx(slow_auc(*lists), abs=1e-12, nan_ok=True)
    assert top_quarter_accuracy(scores, right) == pytest.approx(slow_top_quarter(*lists), abs=1e-12, nan_ok=True)


def test_by_hand() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    right = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    # Group 1: 4 > 3, 4 > 1, 2 < 3, 2 > 1. Group 2: three ties.
    assert within_group_auc(scores, right) == pytest.approx((3 + 0 + 1.5) / 7)
    assert top_quarter_accuracy(scores, right) == pytest.approx((1 + 0.75) / 2)
    assert within_group_auc(scores, 1 - right) == pytest.approx(1 - 4.5 / 7)


def test_the_top_quarter_is_rounded_up() -> None:
    right = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    falling, rising = torch.arange(5.0, 0.0, -1.0)[None], torch.arange(5.0)[None]
    assert top_quarter_accuracy(falling, right) == 0.5
    assert top_quarter_accuracy(rising, right) == 0.0
    assert top_quarter_accuracy(falling[:, :4], right[:, :4]) == 1.0


@pytest.mark.parametrize("metric", [within_group_auc, top_quarter_accuracy])
def test_only_the_order_within_a_group_counts(metric: Any) -> None:
    scores, right = torch.randn(6, 5), torch.randint(0, 2, (6, 5)).float()
    moved = scores.exp() * torch.arange(1.0, 7.0)[:, None] + torch.arange(6.0)[:, None]
    assert metric(moved, right) == metric(scores, right)
    order = torch.randperm(5)
    assert metric(scores[:, order], right[:, order]) == pytest.approx(metric(scores, right))


# In the trainer -----------------------------------------------------------------------------------------------------


def rewards_of(values: list[float], name: str) -> Any:
    def reward(completions: list[Any], **_: Any) -> list[float]:
        return values

    reward.__name__ = name
    return reward


def logged(made: Any) -> dict[str, float]:
    return next(record for record in made.state.log_history if "reward" in record)


def test_every_reward_is_held_against_the_known_answers(tmp_path: Path) -> None:
    right = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    good = [4.0, 1.0, 3.0, 2.0, 1.0, 1.0, 2.0, 1.0]
    truth = Reward("accuracy", frozenset(), lambda rollouts, policy: from_values(right, rollouts))
    mine = Reward("mine", frozenset(), lambda rollouts, policy: from_values(good, rollouts), shape=ranked())
    made = trainer(tmp_path, [mine, rewards_of([-x for x in good], "against"), truth], reward_weights=[1.0, 0.5, 0.0])
    made.train()
    log = logged(made)
    groups = [good[:4], good[4:]], [right[:4], right[4:]]
    assert log["auc/mine"] == pytest.approx(slow_auc(*groups))
    assert log["auc/against"] == pytest.approx(1 - slow_auc(*groups))
    assert log["top25/mine"] == pytest.approx(slow_top_quarter(*groups))
    assert log["scores/mine"] == pytest.approx(sum(good) / 8)
    assert log["rewards/mine/mean"] == pytest.approx(0.0, abs=1e-6)
    assert log["rewards/mine/std"] > 0
    assert "auc/accuracy" not in log


def test_nothing_is_held_against_answers_that_nobody_knows(tmp_path: Path) -> None:
    made = trainer(tmp_path, ["random", "format"])
    made.train()
    assert not [key for key in logged(made) if key.startswith(("auc/", "top25/"))]


def test_groups_without_a_pair_have_no_auc(tmp_path: Path) -> None:
    made = trainer(tmp_path, ["random", "accuracy"], reward_weights=[1.0, 0.0], data=dataset(answer=["-"] * 4))
    made.train()
    log = logged(made)
    assert log["rewards/accuracy/mean"] == 0.0
    assert "auc/random" not in log
    assert log["top25/random"] == 0.0


# Weights over the run -------------------------------------------------------------------------------------------------


def total_of(made: Any) -> Any:
    return [record["reward"] for record in made.state.log_history if "reward" in record]


@pytest.mark.parametrize(
    ("schedule", "left"), [("linear", [1.0, 0.75, 0.5, 0.25]), ("cosine", [1.0, 0.853553, 0.5, 0.146447])]
)
def test_weights_move_along_their_schedule(tmp_path: Path, schedule: str, left: list[float]) -> None:
    made = trainer(
        tmp_path,
        [rewards_of([1.0] * 8, "one"), rewards_of([10.0] * 8, "ten")],
        max_steps=4,
        reward_weights=[1.0, 0.0],
        reward_weights_final=[0.0, 2.0],
        reward_weights_schedule=schedule,
    )
    made.train()
    records = [record for record in made.state.log_history if "reward" in record]
    assert [record["reward_weights/one"] for record in records] == pytest.approx(left, abs=1e-6)
    assert [record["reward"] for record in records] == pytest.approx([x + 20 * (1 - x) for x in left], abs=1e-4)


def test_weights_without_a_schedule_stay(tmp_path: Path) -> None:
    made = trainer(tmp_path, [rewards_of([1.0] * 8, "one")], max_steps=2, reward_weights=[0.5])
    made.train()
    assert total_of(made) == [0.5, 0.5]
    assert "reward_weights/one" not in logged(made)


# Mixing, as TRL does it -----------------------------------------------------------------------------------------------


def zscores(values: list[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))
    return [(x - mean) / (std + 1e-4) for x in values]


@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_both_ways_of_mixing(tmp_path: Path, how: str) -> None:
    small, large = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0], [50.0, 10.0, 20.0, 90.0, 1.0, 2.0, 3.0, 4.0]
    made = trainer(
        tmp_path,
        [rewards_of(small, "small"), rewards_of(large, "large")],
        reward_weights=[1.0, 0.5],
        multi_objective_aggregation=how,
    )
    made.train()
    groups = [(small[:4], large[:4]), (small[4:], large[4:])]
    if how == "sum_then_normalize":
        wanted = [x for a, b in groups for x in zscores([p + 0.5 * q for p, q in zip(a, b, strict=True)])]
    else:  # each reward on a scale of its own, the sum then on one scale over the whole batch
        summed = [p + 0.5 * q for a, b in groups for p, q in zip(zscores(a), zscores(b), strict=True)]
        wanted = zscores(summed)
    assert table(tmp_path)["advantage"].tolist() == pytest.approx(wanted, abs=1e-4)
