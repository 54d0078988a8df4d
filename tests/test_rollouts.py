"""The value that flows: its checks, its padding and its texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from models import SAMPLES, SIDES, Sample, Side, padded

from vigor.rollouts import Rollouts, identical_rows, strip_padding, text_of


def batch(**changes: Any) -> dict[str, Any]:
    ids = torch.tensor([[0, 5, 6, 7], [8, 9, 4, 0]])
    attention = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    completion = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    values = {"input_ids_BL": ids, "attention_mask_BL": attention, "completion_mask_BL": completion, "group_size": 2}
    return {**values, **changes}


def test_lengths_count_completion_tokens_in_any_mask_dtype() -> None:
    assert len(Rollouts(**batch())) == 2
    for dtype in (torch.int64, torch.bool, torch.float32):
        rollouts = Rollouts(**batch(completion_mask_BL=batch()["completion_mask_BL"].to(dtype)))
        assert rollouts.lengths_B.tolist() == [2, 2]
        assert rollouts.lengths_B.dtype == torch.int64


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["attention_mask_BL", "completion_mask_BL"])
def test_masks_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 3\), but input_ids_BL \(2, 4\)"):
        Rollouts(**batch(**{name: torch.ones(2, 3)}))


def test_group_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Rollouts(**batch(group_size=0))


def test_counted_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves out"):
        Rollouts(**batch(completion_mask_BL=torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])))


@pytest.mark.parametrize("row", [0, 1])
def test_a_completion_without_a_prompt_is_refused(row: int) -> None:
    completion = batch()["completion_mask_BL"].clone()
    completion[row] = batch()["attention_mask_BL"][row]
    with pytest.raises(ValueError, match=f"row {row} has no prompt"):
        Rollouts(**batch(completion_mask_BL=completion))


def test_from_token_ids_pads_on_the_right() -> None:
    rollouts = Rollouts.from_token_ids([[3], [4, 5]], [[6, 0, 7], []], group_size=2, pad_token_id=0, micro_step=4)
    assert rollouts.input_ids_BL.tolist() == [[3, 6, 0, 7], [4, 5, 0, 0]]
    assert rollouts.attention_mask_BL.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert rollouts.completion_mask_BL.tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]
    assert rollouts.lengths_B.tolist() == [3, 0]
    assert rollouts.micro_step == 4


def test_from_token_ids_of_nothing_is_empty() -> None:
    rollouts = Rollouts.from_token_ids([], [], group_size=1, pad_token_id=0)
    assert len(rollouts) == 0
    assert rollouts.lengths_B.tolist() == []


def test_from_token_ids_refuses_unequal_lists_and_empty_prompts() -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        Rollouts.from_token_ids([[1], [2]], [[3]], group_size=1, pad_token_id=0)
    with pytest.raises(ValueError, match="row 1 has no prompt"):
        Rollouts.from_token_ids([[1], []], [[3], [4]], group_size=1, pad_token_id=0)


@pytest.mark.parametrize("side", SIDES)
def test_strip_padding_gives_back_the_rows_and_where_they_stood(side: Side) -> None:
    ids, attention, completion = padded(SAMPLES, side, extra=3)
    for b, (row, sample) in enumerate(zip(strip_padding(ids, attention, completion), SAMPLES, strict=True)):
        assert row.ids_L.tolist() == sample.ids
        assert row.completion_L.nonzero().flatten().tolist() == sample.counted
        assert ids[b, row.positions_L].tolist() == sample.ids


def test_strip_padding_closes_gaps() -> None:
    ids, attention = torch.tensor([[9, 0, 8, 0, 7]]), torch.tensor([[1, 0, 1, 0, 1]])
    (row,) = strip_padding(ids, attention, torch.tensor([[0, 0, 0, 1, 1]]))
    assert row.ids_L.tolist() == [9, 8, 7]
    assert row.completion_L.tolist() == [False, False, True]
    assert row.positions_L.tolist() == [0, 2, 4]


@pytest.mark.usefixtures("unchecked")
def test_strip_padding_refuses_flat_tensors() -> None:
    flat = torch.ones(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"must be \(B, L\)"):
        strip_padding(flat, flat, flat)


def test_identical_rows_keep_their_order() -> None:
    samples = [SAMPLES[2], SAMPLES[0], Sample([21, 22, 23, 24], [25, 17]), SAMPLES[0], SAMPLES[2]]
    assert identical_rows(strip_padding(*padded(samples, "left"))) == [[0, 4], [1, 3], [2]]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("as it is", "as it is"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "a\nb"),
        ([{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "4"}], "\n4"),
        ([{"role": "assistant", "tool_calls": []}], ""),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\\boxed{1}"}]}], "\\boxed{1}"),
        ([], ""),
    ],
)
def test_text_of(text: Any, plain: str) -> None:
    assert text_of(text) == plain
    rollouts = Rollouts.from_token_ids([[1]], [[2]], group_size=1, pad_token_id=0, completions=[text])
    assert rollouts.completion_texts == [plain]


def test_shape_annotations_are_checked_in_tests() -> None:
    with pytest.raises(TypeCheckError, match="completion_mask_BL"):
        strip_padding(torch.ones((2, 4), dtype=torch.int64), torch.ones(2, 4), torch.ones(2, 5))
