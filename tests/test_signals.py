"""Token statistics against naive float64 loops, the collector, and the pass that computes each of them once."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
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

from vigor.gradnorm import sequence_grad_norms
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass, StatsCollector, TokenStats, token_stats
from vigor.tokenstats import STATISTICS, statistics


def naive_token(logp: list[float], token: int) -> dict[str, float]:
    """The statistics of one distribution, from their definitions."""
    first, second = sorted(logp, reverse=True)[:2]
    gradient = [math.exp(x) - (v == token) for v, x in enumerate(logp)]
    return {
        "logps": logp[token],
        "entropy": -math.fsum(math.exp(x) * x for x in logp if x > -math.inf),
        "self_certainty": math.fsum(-math.log(len(logp)) - x for x in logp) / len(logp),
        "collision": math.fsum(math.exp(2 * x) for x in logp),
        "max_prob": math.exp(first),
        "margin": math.exp(first) - math.exp(second),
        "rank": float(sum(x > logp[token] for x in logp)),
        "logit_grad": math.fsum(x**2 for x in gradient),
    }


@torch.no_grad()
def naive(model: nn.Module, sample: Sample, temperature: float = 1.0) -> dict[str, list[float]]:
    distributions = zip(naive_logps(model, sample, temperature), sample.counted, strict=True)
    tokens = [naive_token(logp.tolist(), sample.ids[t]) for logp, t in distributions]
    return {name: [values[name] for values in tokens] for name in STATISTICS}


def all_stats(model: nn.Module, *batch: Tensor, **options: Any) -> TokenStats:
    return token_stats(model, *batch, wanted=STATISTICS, **options)


def assert_equal_to_naive(
    stats: TokenStats, model: nn.Module, completion: Tensor, tolerance: float, temperature: float = 1.0
) -> None:
    assert torch.equal(stats.mask_BL, completion)
    for name in STATISTICS:
        statistic = stats[name]
        assert torch.equal(statistic, getattr(stats, f"{name}_BL"))
        assert bool((statistic[completion == 0] == 0).all()), name
        for b, sample in enumerate(SAMPLES):
            got = statistic[b][completion[b] == 1].tolist()
            assert got == pytest.approx(naive(model, sample, temperature)[name], abs=tolerance), name


def assert_same(one: TokenStats, other: TokenStats, tolerance: float = 0.0) -> None:
    for name in STATISTICS:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
@pytest.mark.parametrize("side", SIDES)
def test_statistics_equal_the_naive_loops(make: Any, side: Side) -> None:
    model = make()
    batch = padded(SAMPLES, side, extra=2)
    assert_equal_to_naive(all_stats(model, *batch), copy.deepcopy(model).double(), batch[2], 5e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_float64_models_give_float64(temperature: float) -> None:
    model, batch = gpt2(torch.float64), padded(SAMPLES, "mixed")
    stats = all_stats(model, *batch, temperature=temperature)
    assert {stats[name].dtype for name in STATISTICS} == {torch.float64}
    assert_equal_to_naive(stats, model, batch[2], 1e-10, temperature)


def test_micro_batch_and_chunk_change_nothing() -> None:
    model, batch = qwen2(), padded(SAMPLES, "mixed")
    wanted = all_stats(model, *batch)
    for micro_batch in range(1, len(SAMPLES) + 2):
        assert_same(all_stats(model, *batch, micro_batch=micro_batch), wanted, 5e-6)
    for chunk in range(1, 8):
        assert_same(all_stats(model, *batch, chunk=chunk), wanted, 5e-6)


def test_micro_batches_bound_the_rows_of_a_forward() -> None:
    model = qwen2()
    with counted_forwards(model) as shapes:
        all_stats(model, *padded(SAMPLES, "left", extra=9), micro_batch=2)
    lengths = sorted(len(sample.ids) for sample in SAMPLES)
    assert shapes == [(2, lengths[1]), (2, lengths[3]), (1, lengths[4])]


def test_identical_rows_share_every_bit() -> None:
    same, other = SAMPLES[0], SAMPLES[1]
    model, batch = qwen2(), padded([same, other, same, same, other], "mixed")
    with counted_forwards(model) as shapes:
        stats = all_stats(model, *batch, micro_batch=2)
    assert shapes == [(2, len(same.ids))]
    for name in STATISTICS:
        rows = stats[name]
        assert torch.equal(rows[0], rows[2])
        assert torch.equal(rows[0], rows[3])
        assert torch.equal(rows[1], rows[4])
    alone = all_stats(model, *padded([same]))
    torch.testing.assert_close(stats.logps_BL[3].sum(), alone.logps_BL.sum(), rtol=0, atol=1e-4)


def test_identical_rows_with_different_padding_share_at_their_own_positions() -> None:
    ids = torch.tensor([[0, 0, 4, 5, 6], [4, 5, 6, 0, 0]])
    attention = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    completion = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]])
    stats = all_stats(qwen2(), ids, attention, completion)
    assert torch.equal(stats.logps_BL[0, 3:], stats.logps_BL[1, 1:3])
    assert bool((stats.logps_BL[0, 3:] < 0).all())


def test_a_masked_vocabulary_entry_gives_no_nan() -> None:
    model, batch = qwen2(), padded(SAMPLES)
    wanted_logps = all_stats(model, *batch).logps_BL

    def mask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_fill(-1, torch.tensor([33, 34]), -torch.inf)

    model.lm_head.register_forward_hook(mask)
    stats = all_stats(model, *batch)
    counted = batch[2] == 1
    assert stats.entropy_BL.isfinite().all()
    assert bool((stats.entropy_BL[counted] > 0).all())
    assert bool((stats.logps_BL[counted] > wanted_logps[counted]).all())
    entropy = naive(copy.deepcopy(model).double(), SAMPLES[0])["entropy"]
    assert stats.entropy_BL[0][batch[2][0] == 1].tolist() == pytest.approx(entropy, abs=5e-6)
    # KL(uniform ‖ π) is infinite where π gives nothing to a token that the uniform distribution has.
    assert bool((stats.self_certainty_BL[counted] == math.inf).all())


def test_uniform_predictions() -> None:
    model = qwen2()
    model.lm_head.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    ids, attention, completion = padded(SAMPLES)
    stats = all_stats(model, ids, attention, completion)
    n, log_v = int(completion.sum()), math.log(VOCABULARY)
    assert stats.logps_BL.sum().item() == pytest.approx(-n * log_v, rel=1e-6)
    assert stats.entropy_BL.sum().item() == pytest.approx(n * log_v, rel=1e-6)
    assert stats.self_certainty_BL.abs().max() < 1e-6


def test_dropout_is_off_and_modes_are_restored() -> None:
    model, batch = lora(), padded(SAMPLES)
    wanted = all_stats(model, *batch)
    model.train()
    assert_same(all_stats(model, *batch), wanted)
    enable_checkpointing(model, use_reentrant=True)
    assert_same(all_stats(model, *batch), wanted)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_may_have_any_dtype(dtype: torch.dtype) -> None:
    ids, attention, completion = padded(SAMPLES, "left")
    stats = all_stats(qwen2(), ids, attention.to(dtype), completion.to(dtype))
    assert_same(stats, all_stats(qwen2(), ids, attention, completion))
    assert torch.equal(stats.mask_BL, completion)


def test_bfloat16_models_give_float32() -> None:
    batch = padded(SAMPLES)
    stats = all_stats(qwen2(torch.bfloat16), *batch)
    assert {stats[name].dtype for name in STATISTICS} == {torch.float32}
    wanted = all_stats(qwen2(), *batch)
    for name in set(STATISTICS) - {"rank"}:
        torch.testing.assert_close(stats[name], wanted[name], rtol=0, atol=0.1)
    assert (stats.rank_BL - wanted.rank_BL).abs().max() <= 1


def test_means_and_empty_rows() -> None:
    ids, attention, completion = padded([SAMPLES[0], Sample([3, 4], [])])
    stats = all_stats(qwen2(), ids, attention, completion)
    mean = stats.mean(stats.entropy_BL)
    assert mean[0].item() == pytest.approx(sum(naive(qwen2().double(), SAMPLES[0])["entropy"]) / 5, abs=5e-6)
    assert mean.isnan().tolist() == [False, True]
    assert bool((stats.entropy_BL[1] == 0).all())


def test_no_rows_and_only_empty_rows() -> None:
    nothing = torch.zeros((0, 4), dtype=torch.int64)
    assert all_stats(qwen2(), nothing, nothing, nothing).logps_BL.shape == (0, 4)
    stats = all_stats(qwen2(), *padded([Sample([3], []), Sample([4], [])]))
    assert stats.mean(stats.logps_BL).isnan().all()


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": math.nan}, {"micro_batch": 0}, {"chunk": 0}])
def test_sizes_and_temperature_must_be_positive(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        token_stats(qwen2(), *padded(SAMPLES), **options)


def test_a_counted_first_token_is_refused() -> None:
    ids, attention, _ = padded(SAMPLES)
    with pytest.raises(ValueError, match="first token of row 0"):
        all_stats(qwen2(), ids, attention, attention)


# The pass -----------------------------------------------------------------------------------------------------------


def policy_pass(model: nn.Module, **options: Any) -> PolicyPass:
    prompts, completions = [s.prompt for s in SAMPLES], [s.completion for s in SAMPLES]
    rollouts = Rollouts.from_token_ids(prompts, completions, group_size=1, pad_token_id=0)
    return PolicyPass(model, rollouts, **options)


@contextmanager
def decoded(model: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Collects (rows, tokens) of each time that the decoder's first layer runs."""
    shapes: list[tuple[int, ...]] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape[:2]))
    )
    try:
        yield shapes
    finally:
        handle.remove()


def test_the_pass_computes_each_quantity_once_and_only_on_use() -> None:
    model = qwen2()
    with decoded(model) as shapes:
        policy = policy_pass(model)
        assert shapes == []
        assert policy.token_stats() is policy.token_stats("entropy")
        assert torch.equal(policy.logps(), policy.token_stats().logps_BL)
        assert len(shapes) == 1
        policy.token_stats("margin", "rank")
        assert set(policy.token_stats().values) == {"logps", "entropy", "self_certainty", "margin", "rank"}
        assert len(shapes) == 2  # not known ahead: a pass of its own
        assert policy.grad_norms() is policy.grad_norms("trainable", temperature=1.0)
        assert shapes[2:] == [(5, 8), (1, 8), (1, 6)]  # one batched pass, and its self-check on two rows
        policy.grad_norms("head")
        policy.grad_norms(temperature=0.5)
        assert shapes[5:] == [(5, 8), (1, 8), (1, 6), (5, 8)]
        policy.grad_norms(accumulation="gradient_dtype")
        assert len(shapes) == 9 + len(SAMPLES)  # whole gradients take the loop


def test_what_is_declared_is_computed_together() -> None:
    model = qwen2()
    with decoded(model) as shapes:
        policy = policy_pass(model, needs={"token_stats", "entropy", "margin", "self_certainty"})
        assert set(policy.token_stats("entropy").values) == {"entropy", "margin", "self_certainty"}
        policy.token_stats("margin")
        assert len(shapes) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_statistics_come_from_the_forward_of_the_norms(temperature: float) -> None:
    model, needs = qwen2(), {"grad_norm", "full_norm", "token_stats", *STATISTICS}
    with decoded(model):
        policy_pass(model).grad_norms()  # the self-check, once a model and its hooks
    for prepared in (True, False):
        policy = policy_pass(model, temperature=temperature, needs=needs)
        with decoded(model) as shapes:
            if prepared:
                policy.prepare()
            stats, norms = policy.token_stats(*STATISTICS), policy.grad_norms()
            assert shapes == [(5, 8)]
        alone = policy_pass(model, temperature=temperature)
        assert_same(stats, alone.token_stats(*STATISTICS), 1e-5)
        torch.testing.assert_close(norms, alone.grad_norms(), rtol=1e-6, atol=0)


def test_nothing_is_computed_ahead_where_it_saves_nothing() -> None:
    model = qwen2()
    with decoded(model) as shapes:
        policy_pass(model, needs={"grad_norm", "full_norm"}).prepare()
        policy_pass(model, needs={"token_stats", "entropy"}).prepare()
        policy_pass(model, needs={"grad_norm", "token_stats", "entropy"}).prepare()  # some other norm
        policy_pass(model, needs={"text"}).prepare()
    assert shapes == []


@pytest.mark.parametrize("side", SIDES)
def test_the_distribution_after_each_token(side: Side) -> None:
    model = qwen2(torch.float64)
    rollouts = Rollouts(*padded(SAMPLES, side), group_size=1)
    with torch.no_grad():
        found = PolicyPass(model, rollouts, temperature=0.7).stats_after("entropy", "self_certainty")
        for b, sample in enumerate(SAMPLES):
            logp = (model(input_ids=torch.tensor([sample.ids])).logits[0] / 0.7).log_softmax(-1)[sample.counted]
            entropy = -(logp.exp() * logp).sum(-1).mean().item()
            certainty = -logp.mean().item() - math.log(VOCABULARY)
            assert found.mean(found.entropy_BL)[b].item() == pytest.approx(entropy, rel=1e-9)
            assert found.mean(found.self_certainty_BL)[b].item() == pytest.approx(certainty, rel=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_completions_in_another_context(side: Side) -> None:
    model = qwen2(torch.float64)
    rollouts = Rollouts(*padded(SAMPLES, side), group_size=1)
    contexts = [[6], [1, 2, 3], [4, 4], [9, 8, 7, 6, 5, 4], [30]]
    found = PolicyPass(model, rollouts, temperature=0.7).logps_in_context(contexts)
    for b, (sample, context) in enumerate(zip(SAMPLES, contexts, strict=True)):
        moved = Sample(context, sample.completion, sample.holes)
        assert found.logps_BL[b][found.mask_BL[b] == 1].tolist() == pytest.approx(naive(model, moved, 0.7)["logps"])


def test_contexts_must_fit_the_rows() -> None:
    policy = policy_pass(qwen2())
    for contexts in ([[1]] * 4, [[1]] * 4 + [[]]):
        with pytest.raises(ValueError, match="contexts for 5 rows"):
            policy.logps_in_context(contexts)


class Chat:
    """A tokenizer whose template writes role markers; words are characters."""

    def __init__(self, bos: int | None, eos: int | None) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}

    def apply_chat_template(self, turns: Any, *, add_generation_prompt: bool, tokenize: bool, return_dict: bool) -> Any:
        assert add_generation_prompt and tokenize and return_dict
        return self("".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<a>")


def test_the_response_without_the_question() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    cases = [
        (turns, "", Chat(2, 1)("<system>Be brief.<user><a>")["input_ids"]),
        ("2+2?", "", [2]),
        ("2+2?", "Q:", Chat(2, 1)("Q:")["input_ids"]),
    ]
    model, sample = qwen2(), SAMPLES[0]
    for prompt, frame, context in cases:
        rollouts = Rollouts(*padded([sample]), group_size=1, prompts=[prompt])
        policy = PolicyPass(model, rollouts, tokenizer=Chat(2, 1))
        found = policy.logps_without_prompt(frame)
        assert torch.equal(found.logps_BL, policy.logps_in_context([context]).logps_BL)
        assert policy.logps_without_prompt(frame) is found
    rollouts = Rollouts(*padded([sample]), group_size=1, prompts=["2+2?"])
    eos_only = PolicyPass(model, rollouts, tokenizer=Chat(None, 1))
    assert torch.equal(eos_only.logps_without_prompt().logps_BL, eos_only.logps_in_context([[1]]).logps_BL)
    for tokenizer, message in ((None, "Give PolicyPass the policy's tokenizer"), (Chat(None, None), "neither BOS nor")):
        with pytest.raises(ValueError, match=message):
            PolicyPass(model, rollouts, tokenizer=tokenizer).logps_without_prompt()


# The collector --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", ["batched", "loop"])
def test_the_collector_takes_the_logits_of_the_norms(side: Side, method: Any) -> None:
    model, batch = qwen2(), padded([*SAMPLES, SAMPLES[1], Sample([3], [])], side, extra=1)
    collector = StatsCollector(*batch, STATISTICS)
    sequence_grad_norms(model, *batch, temperature=0.8, method=method, on_logits=collector)
    assert_same(collector.finish(), all_stats(model, *batch, temperature=0.8), 1e-5)


def test_the_collector_leaves_the_logits_alone() -> None:
    logits, ids = torch.randn(3, VOCABULARY), torch.tensor([[5, 6, 7, 8]])
    mask, before = torch.tensor([[0, 1, 1, 1]]), logits.clone()
    collector = StatsCollector(ids, torch.ones_like(ids), mask, STATISTICS, chunk=1)
    collector(torch.zeros(3, dtype=torch.int64), torch.arange(1, 4), logits, ids[0, 1:])
    assert torch.equal(logits, before)
    for i, row in enumerate(logits.double().log_softmax(-1).tolist()):
        for name, value in naive_token(row, i + 6).items():
            assert collector.finish()[name][0, i + 1].item() == pytest.approx(value, abs=2e-6)


def test_the_collector_notices_shifted_and_missing_tokens() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    collector = StatsCollector(ids, torch.ones_like(ids), torch.tensor([[0, 1, 1, 1]]))
    row, logits = torch.zeros(2, dtype=torch.int64), torch.randn(2, VOCABULARY)
    with pytest.raises(ValueError, match="some targets are not the tokens at"):
        collector(row, torch.arange(2), logits, ids[0, 1:3])
    collector(row, torch.arange(1, 3), logits, ids[0, 1:3])
    with pytest.raises(ValueError, match="no logits came for 1 of 3 counted tokens"):
        collector.finish()
    with pytest.raises(ValueError, match="unknown mood"):
        StatsCollector(ids, ids, ids, ["mood"])
    with pytest.raises(ValueError, match="'margin' was not computed, only logps, entropy, self_certainty"):
        _ = token_stats(qwen2(), *padded(SAMPLES)).margin_BL


def test_statistics_of_certain_uniform_and_tied_distributions() -> None:
    certain, uniform, tied = torch.full((5,), -1e4), torch.zeros(5), torch.tensor([3.0, 3.0, -1e4, -1e4, -1e4])
    certain[2] = 0.0
    found = statistics(torch.stack([certain, uniform, tied]), torch.tensor([2, 4, 1]), STATISTICS)
    wanted = {
        "logps": [0.0, -math.log(5), -math.log(2)],
        "entropy": [0.0, math.log(5), math.log(2)],
        "collision": [1.0, 0.2, 0.5],
        "max_prob": [1.0, 0.2, 0.5],
        "margin": [1.0, 0.0, 0.0],
        "rank": [0.0, 0.0, 0.0],
        "logit_grad": [0.0, 0.8, 0.5],
    }
    for name, values in wanted.items():
        assert found[name].tolist() == pytest.approx(values, abs=1e-12), name


def test_a_small_rest_is_not_lost_beside_a_large_probability() -> None:
    for gap in (5.0, 15.0, 25.0, 40.0):
        logits = torch.zeros(1, 4000)
        logits[0, 7] = gap
        rest = 3999 * math.exp(-gap)
        found = statistics(logits, torch.tensor([7]), STATISTICS)
        assert found["logps"].item() == pytest.approx(-math.log1p(rest), rel=1e-6)
        squares = 3999 * math.exp(-2 * gap)
        assert found["logit_grad"].item() == pytest.approx((rest**2 + squares) / (1 + rest) ** 2, rel=1e-5)
        assert found["entropy"].item() == pytest.approx(math.log1p(rest) + gap * rest / (1 + rest), rel=1e-6)


def test_long_rows_keep_float32_precision() -> None:
    logits = torch.randn(2, 150_001) * 4
    targets = torch.tensor([3, 77_777])
    found = statistics(logits, targets, STATISTICS)
    logp = logits.double().log_softmax(-1)
    assert found["self_certainty"].tolist() == pytest.approx((-logp.mean(-1) - math.log(150_001)).tolist(), rel=5e-7)
    assert found["entropy"].tolist() == pytest.approx((-(logp.exp() * logp).sum(-1)).tolist(), rel=5e-7)
    assert found["rank"].tolist() == [(row > row[t]).sum().item() for row, t in zip(logits, targets, strict=True)]


def test_nan_logits_give_nan_everywhere() -> None:
    logits = torch.randn(2, 9)
    logits[0, 3] = math.nan
    found = statistics(logits, torch.tensor([1, 1]), STATISTICS)
    for name in STATISTICS:
        assert found[name].isnan().tolist() == [True, False], name


def test_only_the_completions_logits_are_computed() -> None:
    model, seen = qwen2(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    sample = Sample([5] * 20, [7, 8, 9])
    token_stats(model, *padded([sample, Sample([5] * 20, [7])]))
    assert seen == [(2, 4, 16)]


# The temperature ------------------------------------------------------------------------------------------------------


def test_the_pass_is_at_the_temperature_of_the_policy() -> None:
    model = qwen2(torch.float64)
    policy = policy_pass(model, temperature=0.8, micro_batch=2)
    sample = Sample(SAMPLES[0].prompt, SAMPLES[0].completion)
    assert policy.grad_norms()[0].item() == pytest.approx(naive_norm(model, sample, 0.8), rel=1e-9)
    assert policy.grad_norms(temperature=1.0)[0].item() == pytest.approx(naive_norm(model, sample), rel=1e-9)
    stats = policy.token_stats()
    assert stats.mean(stats.logps_BL)[0].item() == pytest.approx(sum(naive(model, sample, 0.8)["logps"]) / 5)
