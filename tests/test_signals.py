"""Token statistics against naive float64 loops, and the pass that computes each of them once."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from models import (
    SAMPLES,
    SIDES,
    VOCABULARY,
    ZOO,
    Sample,
    Side,
    counted_forwards,
    enable_checkpointing,
    gpt2,
    lora,
    naive_logps,
    naive_norm,
    padded,
    qwen2,
)
from torch import Tensor, nn

from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass, TokenStats, token_stats

STATISTICS = ("logps_BL", "entropy_BL", "self_certainty_BL")


@torch.no_grad()
def naive(model: nn.Module, sample: Sample, temperature: float = 1.0) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for logp, t in zip(naive_logps(model, sample, temperature), sample.counted, strict=True):
        terms = logp.tolist()
        values["logps_BL"].append(terms[sample.ids[t]])
        values["entropy_BL"].append(-math.fsum(math.exp(x) * x for x in terms if x > -math.inf))
        values["self_certainty_BL"].append(math.fsum(-math.log(VOCABULARY) - x for x in terms) / VOCABULARY)
    return values


def assert_equal_to_naive(
    stats: TokenStats, model: nn.Module, completion: Tensor, tolerance: float, temperature: float = 1.0
) -> None:
    assert torch.equal(stats.mask_BL, completion)
    for name in STATISTICS:
        statistic = getattr(stats, name)
        assert bool((statistic[completion == 0] == 0).all()), name
        for b, sample in enumerate(SAMPLES):
            got = statistic[b][completion[b] == 1].tolist()
            assert got == pytest.approx(naive(model, sample, temperature)[name], abs=tolerance), name


def assert_same(one: TokenStats, other: TokenStats, tolerance: float = 0.0) -> None:
    for name in STATISTICS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=tolerance)


@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
@pytest.mark.parametrize("side", SIDES)
def test_statistics_equal_the_naive_loops(make: Any, side: Side) -> None:
    model = make()
    batch = padded(SAMPLES, side, extra=2)
    assert_equal_to_naive(token_stats(model, *batch), copy.deepcopy(model).double(), batch[2], 5e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_float64_models_give_float64(temperature: float) -> None:
    model, batch = gpt2(torch.float64), padded(SAMPLES, "mixed")
    stats = token_stats(model, *batch, temperature=temperature)
    assert {getattr(stats, name).dtype for name in STATISTICS} == {torch.float64}
    assert_equal_to_naive(stats, model, batch[2], 1e-10, temperature)


def test_micro_batch_and_chunk_change_nothing() -> None:
    model, batch = qwen2(), padded(SAMPLES, "mixed")
    wanted = token_stats(model, *batch)
    for micro_batch in range(1, len(SAMPLES) + 2):
        assert_same(token_stats(model, *batch, micro_batch=micro_batch), wanted, 5e-6)
    for chunk in range(1, 8):
        assert_same(token_stats(model, *batch, chunk=chunk), wanted, 5e-6)


def test_micro_batches_bound_the_rows_of_a_forward() -> None:
    model = qwen2()
    with counted_forwards(model) as shapes:
        token_stats(model, *padded(SAMPLES, "left", extra=9), micro_batch=2)
    lengths = sorted(len(sample.ids) for sample in SAMPLES)
    assert shapes == [(2, lengths[1]), (2, lengths[3]), (1, lengths[4])]


def test_identical_rows_share_every_bit() -> None:
    same, other = SAMPLES[0], SAMPLES[1]
    model, batch = qwen2(), padded([same, other, same, same, other], "mixed")
    with counted_forwards(model) as shapes:
        stats = token_stats(model, *batch, micro_batch=2)
    assert shapes == [(2, len(same.ids))]
    for name in STATISTICS:
        rows = getattr(stats, name)
        assert torch.equal(rows[0], rows[2])
        assert torch.equal(rows[0], rows[3])
        assert torch.equal(rows[1], rows[4])
    alone = token_stats(model, *padded([same]))
    torch.testing.assert_close(stats.logps_BL[3].sum(), alone.logps_BL.sum(), rtol=0, atol=1e-4)


def test_identical_rows_with_different_padding_share_at_their_own_positions() -> None:
    ids = torch.tensor([[0, 0, 4, 5, 6], [4, 5, 6, 0, 0]])
    attention = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    completion = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]])
    stats = token_stats(qwen2(), ids, attention, completion)
    assert torch.equal(stats.logps_BL[0, 3:], stats.logps_BL[1, 1:3])
    assert bool((stats.logps_BL[0, 3:] < 0).all())


def test_a_masked_vocabulary_entry_gives_no_nan() -> None:
    model, batch = qwen2(), padded(SAMPLES)
    wanted_logps = token_stats(model, *batch).logps_BL

    def mask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_fill(-1, torch.tensor([33, 34]), -torch.inf)

    model.lm_head.register_forward_hook(mask)
    stats = token_stats(model, *batch)
    counted = batch[2] == 1
    assert stats.entropy_BL.isfinite().all()
    assert bool((stats.entropy_BL[counted] > 0).all())
    assert bool((stats.logps_BL[counted] > wanted_logps[counted]).all())
    entropy = naive(copy.deepcopy(model).double(), SAMPLES[0])["entropy_BL"]
    assert stats.entropy_BL[0][batch[2][0] == 1].tolist() == pytest.approx(entropy, abs=5e-6)
    # KL(uniform ‖ π) is infinite where π gives nothing to a token that the uniform distribution has.
    assert bool((stats.self_certainty_BL[counted] == math.inf).all())


def test_uniform_predictions() -> None:
    model = qwen2()
    model.lm_head.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    ids, attention, completion = padded(SAMPLES)
    stats = token_stats(model, ids, attention, completion)
    n, log_v = int(completion.sum()), math.log(VOCABULARY)
    assert stats.logps_BL.sum().item() == pytest.approx(-n * log_v, rel=1e-6)
    assert stats.entropy_BL.sum().item() == pytest.approx(n * log_v, rel=1e-6)
    assert stats.self_certainty_BL.abs().max() < 1e-6


def test_dropout_is_off_and_modes_are_restored() -> None:
    model, batch = lora(), padded(SAMPLES)
    wanted = token_stats(model, *batch)
    model.train()
    assert_same(token_stats(model, *batch), wanted)
    enable_checkpointing(model, use_reentrant=True)
    assert_same(token_stats(model, *batch), wanted)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_may_have_any_dtype(dtype: torch.dtype) -> None:
    ids, attention, completion = padded(SAMPLES, "left")
    stats = token_stats(qwen2(), ids, attention.to(dtype), completion.to(dtype))
    assert_same(stats, token_stats(qwen2(), ids, attention, completion))
    assert torch.equal(stats.mask_BL, completion)


def test_bfloat16_models_give_float32() -> None:
    batch = padded(SAMPLES)
    stats = token_stats(qwen2(torch.bfloat16), *batch)
    assert {getattr(stats, name).dtype for name in STATISTICS} == {torch.float32}
    assert_same(stats, token_stats(qwen2(), *batch), 0.5)


def test_means_and_empty_rows() -> None:
    ids, attention, completion = padded([SAMPLES[0], Sample([3, 4], [])])
    stats = token_stats(qwen2(), ids, attention, completion)
    mean = stats.mean(stats.entropy_BL)
    assert mean[0].item() == pytest.approx(sum(naive(qwen2().double(), SAMPLES[0])["entropy_BL"]) / 5, abs=5e-6)
    assert mean.isnan().tolist() == [False, True]
    assert bool((stats.entropy_BL[1] == 0).all())


def test_no_rows_and_only_empty_rows() -> None:
    nothing = torch.zeros((0, 4), dtype=torch.int64)
    assert token_stats(qwen2(), nothing, nothing, nothing).logps_BL.shape == (0, 4)
    stats = token_stats(qwen2(), *padded([Sample([3], []), Sample([4], [])]))
    assert stats.mean(stats.logps_BL).isnan().all()


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": math.nan}, {"micro_batch": 0}, {"chunk": 0}])
def test_sizes_and_temperature_must_be_positive(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        token_stats(qwen2(), *padded(SAMPLES), **options)


def test_a_counted_first_token_is_refused() -> None:
    ids, attention, _ = padded(SAMPLES)
    with pytest.raises(ValueError, match="first token of row 0"):
        token_stats(qwen2(), ids, attention, attention)


# The pass -----------------------------------------------------------------------------------------------------------


def policy_pass(model: nn.Module, **options: Any) -> PolicyPass:
    prompts, completions = [s.prompt for s in SAMPLES], [s.completion for s in SAMPLES]
    rollouts = Rollouts.from_token_ids(prompts, completions, group_size=1, pad_token_id=0)
    return PolicyPass(model, rollouts, **options)


def test_the_pass_computes_each_quantity_once_and_only_on_use() -> None:
    model = qwen2()
    with counted_forwards(model) as shapes:
        policy = policy_pass(model)
        assert shapes == []
        assert policy.token_stats() is policy.token_stats()
        assert len(shapes) == 1
        assert policy.grad_norms() is policy.grad_norms("trainable", temperature=1.0)
        assert shapes[1:] == [(5, 8), (1, 6)]  # one batched pass, and its self-check on the shortest row
        policy.grad_norms("head")
        policy.grad_norms(temperature=0.5)
        assert shapes[3:] == [(5, 8), (1, 6), (5, 8)]
        policy.grad_norms(accumulation="gradient_dtype")
        assert len(shapes) == 6 + len(SAMPLES)  # whole gradients take the loop


def test_the_pass_is_at_the_temperature_of_the_policy() -> None:
    model = qwen2(torch.float64)
    policy = policy_pass(model, temperature=0.8, micro_batch=2)
    sample = Sample(SAMPLES[0].prompt, SAMPLES[0].completion)
    assert policy.grad_norms()[0].item() == pytest.approx(naive_norm(model, sample, 0.8), rel=1e-9)
    assert policy.grad_norms(temperature=1.0)[0].item() == pytest.approx(naive_norm(model, sample), rel=1e-9)
    stats = policy.token_stats()
    assert stats.mean(stats.logps_BL)[0].item() == pytest.approx(sum(naive(model, sample, 0.8)["logps_BL"]) / 5)
