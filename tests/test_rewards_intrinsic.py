"""Intrinsic rewards: what holds between them, their options, and that one policy pass serves them all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import SAMPLES, Sample, gpt2, llama, lora, naive_norm, opt, qwen2, qwen2_untied
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from vigor.rewards import METHODS, get
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

PLAIN = tuple(Sample(sample.prompt, sample.completion) for sample in SAMPLES[:4])
INTRINSIC = [name for name, method in METHODS.items() if method.family == "intrinsic"]
APART = {"sar", "head_grad_norm"}
"""They look at something else than the tokens' distributions."""


def rollouts_of(*samples: Sample, **fields: Any) -> Rollouts:
    prompts, completions = [s.prompt for s in samples], [s.completion for s in samples]
    fields = {"group_size": len(samples), **fields}
    return Rollouts.from_token_ids(prompts, completions, pad_token_id=0, **fields)


def scores_of(spec: str, model: nn.Module, *samples: Sample, temperature: float = 1.0) -> Tensor:
    rollouts = rollouts_of(*samples)
    return get(spec).score(rollouts, PolicyPass(model, rollouts, temperature=temperature))


# One pass -----------------------------------------------------------------------------------------------------------


def decoder_runs(names: list[str], *, told: bool) -> list[tuple[int, ...]]:
    model, rollouts, shapes = qwen2(), rollouts_of(*PLAIN), []
    rewards = [get(name) for name in names]
    model.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    PolicyPass(model, rollouts).grad_norms()  # the self-check, once a model and its hooks
    shapes.clear()
    needs = frozenset().union(*(reward.needs for reward in rewards)) if told else frozenset()
    policy = PolicyPass(model, rollouts, needs=needs)
    for reward in rewards:
        reward(rollouts, policy)
    return shapes


def test_one_pass_serves_all_rewards_in_any_order() -> None:
    names = [name for name in INTRINSIC if name not in APART]
    assert len(names) >= 15
    for order in (names, names[::-1]):
        assert len(decoder_runs(order, told=True)) == 1
    without_norms = [name for name in names if not name.startswith("vigor")]
    assert len(decoder_runs(without_norms, told=True)) == 1


def test_told_nothing_the_usual_mix_takes_two_passes() -> None:
    assert len(decoder_runs(["vigor", "self_certainty", "entropy", "logprob"], told=False)) == 2


def test_another_norm_does_not_bring_the_statistics_and_is_not_computed_twice() -> None:
    for spec in ("vigor(parameters=last_1)", "vigor(temperature=0.5)"):
        for order in ([spec, "entropy"], ["entropy", spec]):
            model, rollouts, shapes = qwen2(), rollouts_of(*PLAIN), []
            rewards = [get(name) for name in order]
            policy = PolicyPass(model, rollouts, needs=frozenset().union(*(reward.needs for reward in rewards)))
            model.model.layers[0].register_forward_pre_hook(lambda module, args, seen=shapes: seen.append(1))
            for reward in rewards:
                reward(rollouts, policy)
            assert len(shapes) == 4  # norms, their self-check on two rows, statistics


def test_a_reward_on_a_shared_pass_scores_as_it_does_alone() -> None:
    model, rollouts = qwen2(), rollouts_of(*PLAIN)
    rewards = [get(name) for name in INTRINSIC if name != "sar"]
    shared = PolicyPass(model, rollouts, needs=frozenset().union(*(reward.needs for reward in rewards)))
    for reward in rewards:
        alone = reward.score(rollouts, PolicyPass(model, rollouts))
        torch.testing.assert_close(reward.score(rollouts, shared), alone, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", INTRINSIC)
def test_needs_name_what_is_read(name: str) -> None:
    reward = get(name)
    assert reward.needs & {"grad_norm", "token_stats"}
    assert ("backward" in METHODS[name].cost) == ("grad_norm" in reward.needs)


# VIGOR's relatives --------------------------------------------------------------------------------------------------


def test_ablations_share_the_score_of_vigor() -> None:
    model, rollouts = qwen2(), rollouts_of(*PLAIN)
    policy = PolicyPass(model, rollouts)
    vigor = get("vigor").score(rollouts, policy)
    assert torch.equal(get("vigor_zscore").score(rollouts, policy), vigor)
    assert torch.equal(get("vigor_raw")(rollouts, policy), vigor)
    torch.testing.assert_close(get("vigor_no_sqrt").score(rollouts, policy) * rollouts.lengths_B.sqrt(), vigor)


@pytest.mark.parametrize("make", [llama, qwen2_untied])
def test_the_head_norm_is_vigors_over_an_untied_head(make: Any) -> None:
    for temperature in (1.0, 0.7):
        got = scores_of("head_grad_norm", make(), *PLAIN, temperature=temperature)
        torch.testing.assert_close(
            got, scores_of("vigor(parameters=head)", make(), *PLAIN, temperature=temperature), rtol=2e-6, atol=0
        )


def test_the_head_norm_of_a_biased_head_under_a_soft_cap() -> None:
    config = Gemma2Config(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    model.lm_head.bias = nn.Parameter(torch.randn(37))
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    wanted = [-math.sqrt(len(s.completion)) * naive_norm(model, s, 0.8, lambda name: "lm_head" in name) for s in PLAIN]
    assert scores_of("head_grad_norm", model, *PLAIN, temperature=0.8).tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("make", [gpt2, opt, lora])
def test_the_head_norm_leaves_the_model_as_it_was(make: Any) -> None:
    model = make().train()
    first = scores_of("head_grad_norm", model, *PLAIN)
    assert torch.equal(scores_of("head_grad_norm", model, *PLAIN), first)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_head_norm_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = scores_of("head_grad_norm", qwen2(), *SAMPLES)
    for most in (1, 37 * 16, 37 * 20):
        monkeypatch.setattr("vigor.rewards.head_grad_norm.LOGITS", most)
        torch.testing.assert_close(scores_of("head_grad_norm", qwen2(), *SAMPLES), wanted, rtol=2e-6, atol=0)


def test_a_head_that_is_not_linear_is_refused() -> None:
    model = qwen2()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="is Sequential, not a linear layer"):
        scores_of("head_grad_norm", model, *PLAIN)


def test_the_logit_norm_is_that_of_autograd() -> None:
    model, sample = qwen2(torch.float64), PLAIN[0]
    logits = (model(input_ids=torch.tensor([sample.ids])).logits[0].detach() / 0.8).requires_grad_()
    logps = logits.log_softmax(-1)
    nll = -torch.stack([logps[t - 1, sample.ids[t]] for t in sample.counted]).mean()
    (gradient,) = torch.autograd.grad(nll, [logits])
    wanted = -math.sqrt(len(sample.counted)) * gradient.norm().item()
    assert scores_of("logit_grad_norm", model, sample, temperature=0.8).item() == pytest.approx(wanted, rel=1e-6)


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vigor_focal(metric=mood)", "metric='mood' must be one of"),
        ("vigor(min_spread=-1)", "min_spread must not be negative, got -1"),
        ("logprob(length=mean)", "no option 'length'"),
    ],
)
def test_senseless_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get(spec)


def test_the_focal_weight_has_the_officials_thresholds() -> None:
    model, rollouts = qwen2(), rollouts_of(*PLAIN)
    policy = PolicyPass(model, rollouts)
    vigor = get("vigor").score(rollouts, policy)
    stats = policy.token_stats("entropy", "logps")
    entropy, p_norm = stats.mean(stats.entropy_BL), stats.sum(stats.logps_BL.exp()) / stats.mask_BL.sum(1)
    middle = entropy.sort().values[1:3].mean().item()
    found = get(f"vigor_focal(target={middle}, exponent=2)").score(rollouts, policy)
    torch.testing.assert_close(found, vigor * torch.where(entropy + 1e-6 < middle, (entropy + 1e-6) ** 2, 1.0))
    middle = p_norm.sort().values[1:3].mean().item()
    found = get(f"vigor_focal(metric=p_norm, target={middle})").score(rollouts, policy)
    torch.testing.assert_close(found, vigor * torch.where(p_norm > middle, (1 - p_norm) ** -0.5, 1.0))
    # No token of this model has a probability near 0.9, the target where none is given.
    assert torch.equal(get("vigor_focal(metric=p_norm)").score(rollouts, policy), vigor)


def test_a_certain_completion_has_finite_focal_weight() -> None:
    model, certain = qwen2(), Sample([4], [9, 9])

    def sure(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_add(-1, torch.tensor([9]), torch.full((*output.shape[:-1], 1), 20.0))

    model.lm_head.register_forward_hook(sure)
    for metric in ("entropy", "p_norm"):
        assert scores_of(f"vigor_focal(metric={metric})", model, certain).isfinite().all()


def test_min_spread_silences_groups_that_hardly_differ() -> None:
    model, rollouts = qwen2(), rollouts_of(*PLAIN)
    policy = PolicyPass(model, rollouts)
    scores = get("vigor").score(rollouts, policy)
    spread = (scores.std() / scores.mean().abs()).item()
    assert torch.equal(get(f"vigor(min_spread={spread - 1e-3})")(rollouts, policy), get("vigor")(rollouts, policy))
    assert get(f"vigor(min_spread={spread + 1e-3})")(rollouts, policy).tolist() == [0.0] * 4


def test_legacy_shift_drops_the_first_distribution_and_takes_the_one_after_the_last() -> None:
    model, sample = qwen2(), PLAIN[0]
    rollouts = rollouts_of(sample)
    stats = PolicyPass(model, rollouts).token_stats("self_certainty")
    aligned = stats.self_certainty_BL[0][stats.mask_BL[0] == 1]
    shifted = get("self_certainty(legacy_shift=True)").score(rollouts, PolicyPass(model, rollouts)).item()
    longer = rollouts_of(Sample(sample.prompt, [*sample.completion, 6]))
    one_more = PolicyPass(model, longer).token_stats("self_certainty").self_certainty_BL[0, -1]
    assert shifted == pytest.approx((aligned[1:].sum() + one_more).item() / len(aligned), rel=1e-6)


class Tokens:
    """All that `sar` asks of a tokenizer."""

    bos_token_id, eos_token_id = 2, 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + len(word) for word in text.split()]}


def test_sar_compares_with_the_completion_in_a_frame() -> None:
    model, sample = qwen2(), PLAIN[0]
    rollouts = rollouts_of(sample, prompts=["Q: 2 + 2\nA:"])
    policy = PolicyPass(model, rollouts, tokenizer=Tokens())
    given = -scores_of("logprob", model, sample).item()
    for spec, context in (("sar", [2]), ("sar(frame='Q: A:')", [5, 5])):
        alone = -scores_of("logprob", model, Sample(context, sample.completion)).item()
        wanted = max((math.exp(alone) - math.exp(given)) / math.exp(alone), -1.0)
        assert get(spec).score(rollouts, policy).item() == pytest.approx(wanted, rel=1e-5)


def test_sar_is_never_below_minus_one() -> None:
    model, sample = qwen2(), Sample([4], [9, 9])

    def hates_nine_after_four(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_add(-1, torch.tensor([9]), torch.full((*output.shape[:-1], 1), -30.0))

    rollouts = rollouts_of(sample, prompts=["?"])
    policy = PolicyPass(model, rollouts, tokenizer=Tokens())
    policy.logps_without_prompt()
    model.lm_head.register_forward_hook(hates_nine_after_four)
    assert get("sar").score(rollouts, policy).item() == -1.0


def test_em_rl_is_centred_on_the_others() -> None:
    model, rollouts = qwen2(), rollouts_of(*PLAIN)
    policy = PolicyPass(model, rollouts)
    for name in ("em_rl_token", "em_rl_sequence"):
        scores, rewards = get(name).score(rollouts, policy).tolist(), get(name)(rollouts, policy).tolist()
        assert rewards == pytest.approx([x - (sum(scores) - x) / 3 for x in scores], abs=1e-5)
        assert sum(rewards) == pytest.approx(0, abs=1e-4)
    assert torch.equal(get("em_rl_sequence").score(rollouts, policy), get("logprob_sum").score(rollouts, policy))


def test_a_greedy_completion_has_the_best_token_rank() -> None:
    model, ids = qwen2(), [4, 5]
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    greedy = Sample(ids[:2], ids[2:])
    scores = scores_of("token_rank", model, greedy, *PLAIN)
    assert scores[0] == 0
    assert bool((scores[1:] < 0).all())
