"""Ranks, z-scores and what happens to ties, missing opinions and truncated rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vigor.shaping import (
    clip,
    gate,
    informative,
    leave_one_out,
    length_power,
    minmax,
    rank,
    share_between_identical,
    spread,
    truncated_worst,
    zscore,
)

NAN = math.nan
GOLDEN = [-1.4287, -1.0205, -0.6123, -0.2041, 0.2041, 0.6123, 1.0205, 1.4287]


def groups(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def random_scores(n: int = 60) -> Iterator[Tensor]:
    """(5, G) scores with many ties and some NaN."""
    for seed in range(n):
        generator = torch.Generator().manual_seed(seed)
        size = int(torch.randint(1, 10, (), generator=generator))
        scores = torch.randint(-3, 4, (5, size), generator=generator).float() / 3
        yield scores.masked_fill(torch.rand(scores.shape, generator=generator) < 0.2 * (seed % 3), NAN)


def slow_rank(row: list[float], ties: str) -> list[float]:
    valid = [x for x in row if not math.isnan(x)]
    if len(valid) == 1:
        return [0.0 if not math.isnan(x) else NAN for x in row]
    ranks = []
    for i, x in enumerate(row):
        below = sum(y < x for y in valid)
        if ties == "average":
            position = below + (sum(y == x for y in valid) - 1) / 2
        else:
            position = below + sum(y == x for y in row[:i])
        ranks.append(NAN if math.isnan(x) else 2 * position / (len(valid) - 1) - 1)
    return ranks


# Ranks --------------------------------------------------------------------------------------------------------------


def test_the_golden_advantages_of_eight() -> None:
    for _ in range(20):
        order = torch.randperm(8)
        norms = torch.rand(8).cumsum(0) + 0.01  # distinct, ascending
        advantages = zscore(rank(-norms[order][None]))
        assert [round(x, 4) for x in advantages[0, order.argsort()].tolist()] == GOLDEN[::-1]


@pytest.mark.parametrize("ties", ["average", "index"])
def test_rank_equals_the_slow_version(ties: str) -> None:
    for scores in random_scores():
        wanted = torch.tensor([slow_rank(row, ties) for row in scores.tolist()])
        torch.testing.assert_close(rank(scores, ties=ties), wanted, rtol=0, atol=1e-6, equal_nan=True)


def test_index_ties_are_those_of_the_official_code() -> None:
    for scores in random_scores():
        if scores.isnan().any() or scores.shape[1] == 1:
            continue
        official = scores.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        wanted = 2.0 * official / (scores.shape[1] - 1) - 1.0
        assert torch.equal(rank(scores, ties="index"), wanted)


def test_rank_of_ties() -> None:
    scores = groups([2.0, 1.0, 2.0, 3.0, 2.0])
    assert rank(scores).tolist() == [[0.0, -1.0, 0.0, 1.0, 0.0]]
    assert rank(scores, ties="index").tolist() == [[-0.5, -1.0, 0.0, 1.0, 0.5]]


def test_rows_without_an_opinion_take_no_part() -> None:
    ranks = rank(groups([NAN, 5.0, 1.0, NAN, 3.0], [NAN] * 5, [NAN, NAN, 7.0, NAN, NAN]))
    assert ranks[0, [1, 2, 4]].tolist() == [1.0, -1.0, 0.0]
    assert ranks.isnan().tolist() == [[True, False, False, True, False], [True] * 5, [True, True, False, True, True]]
    assert ranks[2, 2] == 0


@pytest.mark.parametrize("ties", ["average", "index"])
def test_groups_of_one_and_two(ties: str) -> None:
    assert rank(groups([3.0], [-1.0]), ties=ties).tolist() == [[0.0], [0.0]]
    assert rank(groups([3.0, 4.0], [4.0, 3.0]), ties=ties).tolist() == [[-1.0, 1.0], [1.0, -1.0]]


def test_equal_scores_rank_exactly_zero() -> None:
    for size in range(1, 20):
        assert bool((rank(torch.full((2, size), 0.1)) == 0).all())


def test_infinite_scores_have_ranks() -> None:
    assert rank(groups([-math.inf, 0.0, math.inf])).tolist() == [[-1.0, 0.0, 1.0]]
    assert rank(groups([-math.inf, -math.inf, 1.0])).tolist() == [[-0.5, -0.5, 1.0]]


@pytest.mark.parametrize("ties", ["average", "index"])
def test_rank_is_monotone_invariant_symmetric_and_bounded(ties: str) -> None:
    for scores in random_scores():
        ranks = rank(scores, ties=ties)
        assert torch.equal(rank(7 * scores.exp() - 2, ties=ties).nan_to_num(9), ranks.nan_to_num(9))
        assert ranks.nan_to_num(0).abs().max() <= 1
        assert ranks.nansum(-1).abs().max() < 1e-5


def test_average_rank_is_permutation_equivariant() -> None:
    for scores in random_scores():
        order = torch.randperm(scores.shape[1])
        assert torch.equal(rank(scores[:, order]).nan_to_num(9), rank(scores)[:, order].nan_to_num(9))


@pytest.mark.parametrize("shape", [(0, 4), (3, 1)])
def test_rank_and_zscore_of_small_shapes(shape: tuple[int, int]) -> None:
    assert rank(torch.zeros(shape)).shape == shape
    assert torch.equal(zscore(torch.ones(shape)), torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_results_are_float32_or_wider(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 5.0]], dtype=dtype)
    wider = torch.float64 if dtype == torch.float64 else torch.float32
    assert rank(scores).dtype == zscore(scores).dtype == wider
    wanted = torch.tensor([[2 * k / 3 - 1 for k in (2, 0, 1, 3)]], dtype=wider)
    torch.testing.assert_close(rank(scores), wanted, rtol=0, atol=1e-15 if wider == torch.float64 else 1e-7)


@pytest.mark.usefixtures("unchecked")
def test_unknown_ties_are_refused() -> None:
    with pytest.raises(ValueError, match="'average' or 'index', got 'random'"):
        rank(groups([1.0, 2.0]), ties="random")


# z-scores -----------------------------------------------------------------------------------------------------------


def test_zscore_is_that_of_numpy() -> None:
    for scores in random_scores():
        for got, row in zip(zscore(scores).tolist(), scores.tolist(), strict=True):
            valid = np.array([x for x in row if not math.isnan(x)])
            spread = valid.std(ddof=1) if len(valid) > 1 else 0.0
            for z, x in zip(got, row, strict=True):
                if math.isnan(x):
                    assert math.isnan(z)
                else:
                    assert z == pytest.approx((x - valid.mean()) / (spread + 1e-4), abs=2e-6)


def test_zscore_eps() -> None:
    scores = groups([0.0, 2.0])
    assert zscore(scores, eps=0.0)[0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert zscore(scores, eps=1.0)[0, 1].item() == pytest.approx(1 / (2**0.5 + 1))


def test_zscore_of_equal_scores_is_exactly_zero() -> None:
    # 0.1 and 1/3 have no exact mean: dividing its rounding error by 1e-4 would give an advantage of noise.
    scores = torch.tensor([[0.1] * 7, [1 / 3] * 7, [NAN] + [0.7] * 6])
    assert torch.equal(zscore(scores).nan_to_num(9), torch.tensor([[0.0] * 7, [0.0] * 7, [9.0] + [0.0] * 6]))


def test_zscore_of_one_opinion_is_zero() -> None:
    shaped = zscore(groups([NAN, 3.0, NAN]))
    assert shaped[0, 1] == 0
    assert shaped.isnan().tolist() == [[True, False, True]]


def test_zscore_is_permutation_equivariant() -> None:
    for scores in random_scores():
        order = torch.randperm(scores.shape[1])
        torch.testing.assert_close(
            zscore(scores[:, order]), zscore(scores)[:, order], rtol=0, atol=1e-5, equal_nan=True
        )


# Other shapes -------------------------------------------------------------------------------------------------------


def slow_minmax(valid: list[float], x: float) -> float:
    return (x - min(valid)) / (max(valid) - min(valid)) if max(valid) > min(valid) else 0.0


def slow_leave_one_out(valid: list[float], x: float) -> float:
    others = list(valid)
    others.remove(x)
    return x - math.fsum(others) / len(others) if others else 0.0


@pytest.mark.parametrize(("shape", "slow"), [(minmax, slow_minmax), (leave_one_out, slow_leave_one_out)])
def test_shapes_equal_the_slow_versions(shape: Any, slow: Callable[[list[float], float], float]) -> None:
    for scores in random_scores():
        for got, row in zip(shape(scores).tolist(), scores.tolist(), strict=True):
            valid = [x for x in row if not math.isnan(x)]
            wanted = [x if math.isnan(x) else slow(valid, x) for x in row]
            assert got == pytest.approx(wanted, abs=2e-6, nan_ok=True)


@pytest.mark.parametrize("shape", [minmax, leave_one_out])
def test_shapes_of_equal_scores_and_of_small_groups_are_exactly_zero(shape: Any) -> None:
    for size in range(1, 9):
        assert bool((shape(torch.full((3, size), 0.1)) == 0).all())
    assert shape(groups([NAN, 3.0, NAN])).nan_to_num(9).tolist() == [[9.0, 0.0, 9.0]]
    assert shape(torch.zeros(0, 4)).shape == (0, 4)
    assert shape(torch.full((1, 3), NAN)).isnan().all()


def test_shapes_are_permutation_equivariant_and_float32_or_wider() -> None:
    for shape in (minmax, leave_one_out):
        for scores in random_scores(12):
            order = torch.randperm(scores.shape[1])
            torch.testing.assert_close(
                shape(scores[:, order]), shape(scores)[:, order], rtol=0, atol=2e-6, equal_nan=True
            )
        assert shape(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32
        assert shape(torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_minmax_bounds() -> None:
    assert minmax(groups([-5.0, 0.0, 15.0])).tolist() == [[0.0, 0.25, 1.0]]
    assert minmax(groups([0.0, math.inf, 1.0])).isnan().tolist() == [[False, True, False]]
    assert minmax(groups([0.0, -math.inf, 1.0])).isnan().all()


def test_length_power() -> None:
    scores, lengths = groups([2.0, -3.0, NAN, 5.0]), torch.tensor([[4, 9, 2, 0]])
    for power in (0.5, -1.0, 0.0, 2.0):
        wanted = [x * max(t, 1) ** power for x, t in zip(scores[0].tolist(), lengths[0].tolist(), strict=True)]
        assert length_power(scores, lengths, power)[0].tolist() == pytest.approx(wanted, rel=1e-6, nan_ok=True)


def test_clip() -> None:
    scores = groups([-3.0, 0.5, NAN, math.inf])
    assert clip(scores, -1.0, 1.0).nan_to_num(9).tolist() == [[-1.0, 0.5, 9.0, 1.0]]
    for low, high in ((1.0, -1.0), (NAN, 1.0), (0.0, NAN)):
        with pytest.raises(ValueError, match=r"clip: low .* must not exceed high"):
            clip(scores, low, high)


def test_spread_is_the_coefficient_of_variation() -> None:
    for scores in random_scores():
        for got, row in zip(spread(scores + 5).tolist(), (scores + 5).tolist(), strict=True):
            valid = np.array([x for x in row if not math.isnan(x)])
            wanted = valid.std(ddof=1) / abs(valid.mean()) if len(set(valid.tolist())) > 1 else 0.0
            assert got == pytest.approx(wanted, abs=1e-6)
    assert spread(groups([-1.0, 1.0])).tolist() == [math.inf]
    assert spread(torch.tensor([[0.1] * 7, [NAN] * 7, [-0.7] * 6 + [NAN]])).tolist() == [0.0, 0.0, 0.0]


def test_the_gate_silences_groups_that_hardly_differ() -> None:
    scores = groups([-100.0, -101.0, -100.5], [-100.0, -150.0, -50.0], [-1.0, -1.0, -1.0], [NAN, -1.0, -9.0])
    ranks = rank(scores)
    gated = gate(ranks, scores, min_spread=0.05)
    assert gated[0].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(gated[1], ranks[1])
    assert gated[2].tolist() == [0.0, 0.0, 0.0]
    assert gated[3].nan_to_num(9).tolist() == [9.0, 1.0, -1.0]
    assert torch.equal(gate(ranks, scores, min_spread=0.0).nan_to_num(9), ranks.nan_to_num(9))
    assert gate(rank(groups([NAN, 2.0])), groups([NAN, 2.0]), min_spread=0.5).nan_to_num(9).tolist() == [[9.0, 0.0]]


# Groups and rows ----------------------------------------------------------------------------------------------------


def test_informative() -> None:
    scores = groups([1.0, 1.0, 1.0], [1.0, 1.0, 1.0001], [NAN, 1.0, 2.0], [NAN, 2.0, 2.0], [NAN] * 3, [NAN, NAN, 1.0])
    assert informative(scores).tolist() == [False, True, True, False, False, False]
    assert informative(groups([-math.inf, 0.0], [math.inf, math.inf])).tolist() == [True, False]


def test_truncated_rows_are_just_below_the_worst_complete_one_and_level() -> None:
    scores = groups([5.0, 9.0, 3.0, -8.0])
    worst = truncated_worst(scores, torch.tensor([[False, True, False, True]]))
    assert worst[0, [0, 2]].tolist() == [5.0, 3.0]
    assert worst[0, 1] == worst[0, 3] < 3.0
    assert rank(worst)[0].tolist() == pytest.approx([1.0, -2 / 3, 1 / 3, -2 / 3])
    assert worst[0, 1].item() == pytest.approx(3.0, rel=1e-6)


def test_truncated_rows_in_other_groups_and_complete_groups_are_left() -> None:
    scores = groups([1.0, 2.0], [4.0, 3.0])
    none = torch.zeros(2, 2, dtype=torch.bool)
    assert torch.equal(truncated_worst(scores, none), scores)
    worst = truncated_worst(scores, torch.tensor([[False, False], [True, False]]))
    assert worst[0].tolist() == [1.0, 2.0]
    assert worst[1, 0] < worst[1, 1] == 3.0


def test_a_group_without_a_complete_row_keeps_no_order() -> None:
    worst = truncated_worst(groups([5.0, 9.0, 3.0], [5.0, NAN, 2.0]), torch.tensor([[True] * 3, [True, False, True]]))
    assert informative(worst).tolist() == [False, False]
    assert worst[1].isnan().tolist() == [False, True, False]


def test_truncated_rows_without_an_opinion_stay_so() -> None:
    worst = truncated_worst(groups([NAN, 2.0, 1.0]), torch.tensor([[True, False, False]]))
    assert worst[0, 0].isnan()
    assert worst[0, 1:].tolist() == [2.0, 1.0]


def test_a_truncated_row_is_never_above_an_infinitely_bad_complete_one() -> None:
    worst = truncated_worst(groups([-math.inf, 4.0, 5.0]), torch.tensor([[False, True, False]]))
    assert worst.tolist() == [[-math.inf, -math.inf, 5.0]]


def test_identical_rows_get_the_score_of_the_first() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.5000001, 0.75], [1.0, 2.0, 3.0, 4.0]])
    keys = torch.tensor([[7, -3, 7, 8], [7, 7, 9, 9]])
    assert share_between_identical(scores, keys).tolist() == [[0.5, 0.25, 0.5, 0.75], [1.0, 1.0, 3.0, 3.0]]
