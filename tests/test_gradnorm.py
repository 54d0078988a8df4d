"""Gradient norms against the definition, and everything that must not change them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from models import (
    EOS,
    PAD,
    SAMPLES,
    SIDES,
    ZOO,
    Sample,
    Side,
    counted_forwards,
    enable_checkpointing,
    gpt2,
    llama,
    lora,
    naive_logps,
    naive_norm,
    opt,
    padded,
    qwen2,
    qwen2_untied,
)
from torch import Tensor, nn

from vigor.gradnorm import scoring_mode, select_parameters, sequence_grad_norms
from vigor.gradnorm.loop import gradient_norm
from vigor.signals import token_stats

zoo = pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)


def norms_of(model: nn.Module, *samples: Sample, side: Side = "right", extra: int = 0, **options: Any) -> Tensor:
    norms = sequence_grad_norms(model, *padded(samples, side, extra=extra), **options)
    assert isinstance(norms, Tensor)
    return norms


def naive_norms(model: nn.Module, *samples: Sample, **options: Any) -> Tensor:
    return torch.tensor([naive_norm(model, sample, **options) for sample in samples], dtype=torch.float64)


def assert_relative(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = ((got.double() - wanted.double()) / wanted.double()).abs().max().item()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


# The definition -----------------------------------------------------------------------------------------------------


@zoo
def test_float64_models_agree_with_the_definition_to_1e_9(make: Any) -> None:
    model = make(torch.float64)
    norms = norms_of(model, *SAMPLES)
    assert norms.dtype == torch.float64
    assert_relative(norms, naive_norms(model, *SAMPLES), 1e-9)


@zoo
def test_float32_models_agree_with_float64_to_1e_6(make: Any) -> None:
    model = make()
    norms = norms_of(model, *SAMPLES)
    assert norms.dtype == torch.float32
    assert not norms.requires_grad
    assert_relative(norms, naive_norms(model, *SAMPLES), 1e-6)


def test_finite_differences_over_every_parameter() -> None:
    model = gpt2(torch.float64, vocab_size=7, n_embd=2, n_layer=1, n_head=1, n_positions=8)
    sample = Sample([3], [2, 6, 1], holes=(1,))
    step, squares = 1e-5, []

    @torch.no_grad()
    def loss() -> float:
        terms = [-logp[sample.ids[t]] for logp, t in zip(naive_logps(model, sample), sample.counted, strict=True)]
        return float(sum(terms)) / len(terms)

    for parameter in model.parameters():
        values = parameter.data.view(-1)
        for i in range(len(values)):
            at = values[i].item()
            values[i] = at + step
            above = loss()
            values[i] = at - step
            squares.append(((above - loss()) / (2 * step)) ** 2)
            values[i] = at
    assert norms_of(model, sample).item() == pytest.approx(math.sqrt(math.fsum(squares)), rel=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 0.9, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    model = qwen2(torch.float64)
    norms = norms_of(model, *SAMPLES, temperature=temperature)
    assert_relative(norms, naive_norms(model, *SAMPLES, temperature=temperature), 1e-9)
    assert (norms - norms_of(model, *SAMPLES)).abs().min() > 1e-3


def test_tokens_that_are_not_counted_still_condition_the_others() -> None:
    model = qwen2(torch.float64)
    one, other = Sample([3], [5, 6, 7], holes=(1,)), Sample([3], [5, 8, 7], holes=(1,))
    assert_relative(norms_of(model, one, other), naive_norms(model, one, other), 1e-9)
    assert norms_of(model, one) != norms_of(model, other)


# What must not change a norm ----------------------------------------------------------------------------------------


@zoo
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("extra", [0, 7])
def test_padding_changes_nothing(make: Any, side: Side, extra: int) -> None:
    model = make(torch.float64)
    assert torch.equal(norms_of(model, *SAMPLES, side=side, extra=extra), norms_of(model, *SAMPLES))


def test_padding_token_changes_nothing() -> None:
    ids, attention, completion = padded(SAMPLES, "mixed", pad=29)
    assert torch.equal(sequence_grad_norms(qwen2(), ids, attention, completion), norms_of(qwen2(), *SAMPLES))


def test_a_left_padded_row_of_gpt2_is_the_row_alone() -> None:
    model = gpt2()
    alone = torch.cat([norms_of(model, sample) for sample in SAMPLES])
    assert torch.equal(norms_of(model, *SAMPLES, side="left", extra=5), alone)


def test_row_order_changes_nothing() -> None:
    model, order = llama(), [3, 0, 4, 2, 1]
    assert torch.equal(norms_of(model, *(SAMPLES[i] for i in order)), norms_of(model, *SAMPLES)[order])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_may_have_any_dtype(dtype: torch.dtype) -> None:
    ids, attention, completion = padded(SAMPLES, "left")
    norms = sequence_grad_norms(qwen2(), ids, attention.to(dtype), completion.to(dtype))
    assert torch.equal(norms, norms_of(qwen2(), *SAMPLES))


def test_tensors_may_be_non_contiguous() -> None:
    ids, attention, completion = (t.t().contiguous().t() for t in padded(SAMPLES, "left"))
    assert not ids.is_contiguous()
    assert torch.equal(sequence_grad_norms(qwen2(), ids, attention, completion), norms_of(qwen2(), *SAMPLES))


@pytest.mark.parametrize("make", [*ZOO.values(), opt], ids=[*ZOO, "opt"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(make: Any, reentrant: bool) -> None:
    model = make()
    plain = norms_of(model, *SAMPLES)
    enable_checkpointing(model, use_reentrant=reentrant)
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    model.train()
    assert torch.equal(norms_of(model, *SAMPLES), plain)
    assert [vars(m).get("_gradient_checkpointing_func") for m in model.modules()] == functions


def test_checkpointed_layers_run_twice_while_scoring() -> None:
    model = qwen2().train()
    calls: list[bool] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: calls.append(module.training))
    norms_of(model, SAMPLES[0], method="loop")
    assert calls == [False]
    enable_checkpointing(model, use_reentrant=False)
    norms_of(model, SAMPLES[0], method="loop")
    assert calls == [False] * 3


@pytest.mark.parametrize("make", [lora, gpt2, opt])
def test_dropout_is_off_in_train_mode(make: Any) -> None:
    model = make()
    wanted = norms_of(model, *SAMPLES)
    model.train()
    state = torch.get_rng_state()
    for _ in range(2):
        assert torch.equal(norms_of(model, *SAMPLES), wanted)
    assert torch.equal(torch.get_rng_state(), state), "scoring drew random numbers"


@pytest.mark.parametrize("ambient", [torch.no_grad, torch.enable_grad])
def test_the_ambient_grad_mode_changes_nothing(ambient: Any) -> None:
    with ambient():
        norms = norms_of(qwen2(), *SAMPLES)
    assert torch.equal(norms, norms_of(qwen2(), *SAMPLES))


def test_a_forward_pass_before_in_the_same_autocast_region_changes_nothing() -> None:
    model = qwen2()
    with torch.autocast("cpu", torch.bfloat16):
        alone = norms_of(model, *SAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        token_stats(model, *padded(SAMPLES))
        assert torch.equal(norms_of(model, *SAMPLES), alone)
    assert_relative(alone, naive_norms(model, *SAMPLES), 0.1)


def test_a_wrapped_model_has_the_norms_of_the_model() -> None:
    model = qwen2()
    assert torch.equal(norms_of(nn.DataParallel(model), *SAMPLES), norms_of(model, *SAMPLES))


# What it must leave alone -------------------------------------------------------------------------------------------


def test_grad_is_untouched() -> None:
    model = qwen2()
    norms_of(model, *SAMPLES)
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = [p.grad for p in model.parameters()]
    norms_of(model, *SAMPLES)
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert all(bool((g == 3.0).all()) for g in before if g is not None)


class Failing(RuntimeError):
    pass


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_of_every_module_are_restored(checkpointed: bool, fails: bool) -> None:
    model = lora()
    if checkpointed:
        enable_checkpointing(model, use_reentrant=False)
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 0
    before = [module.training for module in model.modules()]

    def fail(*_: Any) -> None:
        raise Failing

    if fails:
        layer = next(m for name, m in model.named_modules() if name.endswith("layers.1.mlp"))
        layer.register_forward_hook(fail)
        with pytest.raises(Failing):
            norms_of(model, *SAMPLES)
    else:
        norms_of(model, *SAMPLES)
    assert [module.training for module in model.modules()] == before


def test_weights_and_inputs_are_untouched() -> None:
    model = qwen2()
    weights, batch = copy.deepcopy(model.state_dict()), padded(SAMPLES, "left")
    kept = [t.clone() for t in batch]
    sequence_grad_norms(model, *batch)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(batch, kept, strict=True))


# Rows ---------------------------------------------------------------------------------------------------------------


def test_an_empty_completion_is_nan_and_costs_no_forward() -> None:
    empty = Sample([4, 5], [])
    model = qwen2()
    with counted_forwards(model) as shapes:
        norms = norms_of(model, SAMPLES[0], empty, method="loop")
    assert norms.isnan().tolist() == [False, True]
    assert shapes == [(1, 8)]
    assert norms_of(model, empty).isnan().all()


def test_a_row_of_padding_only_is_nan() -> None:
    ids, attention, completion = padded(SAMPLES[:2])
    attention[1] = completion[1] = 0
    assert sequence_grad_norms(qwen2(), ids, attention, completion).isnan().tolist() == [False, True]


def test_no_rows() -> None:
    nothing = torch.zeros((0, 4), dtype=torch.int64)
    assert sequence_grad_norms(qwen2(), nothing, nothing, nothing).shape == (0,)


def test_identical_rows_share_one_forward_and_every_bit() -> None:
    model = qwen2()
    same = SAMPLES[0]
    holed = Sample(same.prompt, same.completion, holes=(0,))
    with counted_forwards(model) as shapes:
        norms = norms_of(model, same, SAMPLES[1], same, holed, same, side="mixed", method="loop")
    assert len(shapes) == 3
    assert norms[0].item() == norms[2].item() == norms[4].item() != norms[3].item()


def test_equal_tokens_with_another_split_into_prompt_and_completion_are_other_rows() -> None:
    model = qwen2(torch.float64)
    samples = Sample([3, 4], [5, 6]), Sample([3], [4, 5, 6])
    assert_relative(norms_of(model, *samples), naive_norms(model, *samples), 1e-9)


# Log-probabilities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logps_stand_at_their_tokens(side: Side, temperature: float) -> None:
    model = qwen2(torch.float64)
    samples = (*SAMPLES, Sample([6], []), SAMPLES[0])
    ids, attention, completion = padded(samples, side, extra=2)
    norms, logps = sequence_grad_norms(
        model, ids, attention, completion, temperature=temperature, return_token_logps=True
    )
    assert torch.equal(norms.nan_to_num(), norms_of(model, *samples, temperature=temperature).nan_to_num())
    assert not logps.requires_grad
    assert bool((logps[completion == 0] == 0).all())
    for b, sample in enumerate(samples):
        naive = zip(naive_logps(model, sample, temperature), sample.counted, strict=True)
        wanted = torch.tensor([logp[sample.ids[t]].item() for logp, t in naive], dtype=torch.float64)
        torch.testing.assert_close(logps[b][completion[b] == 1], wanted, rtol=0, atol=1e-12)


# Parameters ---------------------------------------------------------------------------------------------------------


def is_last_layer_or_after(name: str) -> bool:
    return "layers.1." in name or name.startswith(("model.norm", "lm_head"))


@pytest.mark.parametrize(
    ("make", "parameters", "chosen"),
    [
        (qwen2, "trainable", lambda name: True),
        (qwen2, "head", lambda name: name == "model.embed_tokens.weight"),
        (qwen2_untied, "head", lambda name: name == "lm_head.weight"),
        (qwen2_untied, "last_1", is_last_layer_or_after),
        (qwen2_untied, "last_2", lambda name: "embed_tokens" not in name),
        (gpt2, "last_1", lambda name: ".h.1." in name or "ln_f" in name),
        (lora, "lora", lambda name: "lora" in name),
        (lora, "trainable", lambda name: "lora" in name),
        (lora, "last_1", lambda name: "lora" in name and "layers.1." in name),
    ],
)
def test_parameter_choices(make: Any, parameters: str, chosen: Any) -> None:
    model = make(torch.float64)
    norms = norms_of(model, *SAMPLES[:2], parameters=parameters)
    assert_relative(norms, naive_norms(model, *SAMPLES[:2], chosen=chosen), 1e-9)


def test_a_predicate_sees_names() -> None:
    model = qwen2(torch.float64)
    norms = norms_of(model, *SAMPLES[:2], parameters=lambda name: name.endswith("q_proj.bias"))
    wanted = naive_norms(model, *SAMPLES[:2], chosen=lambda name: name.endswith("q_proj.bias"))
    assert_relative(norms, wanted, 1e-9)


def test_frozen_parameters_do_not_count() -> None:
    model = qwen2_untied(torch.float64)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    norms = norms_of(model, *SAMPLES[:2])
    chosen = [name for name, p in model.named_parameters() if p.requires_grad]
    assert_relative(norms, naive_norms(model.requires_grad_(True), *SAMPLES[:2], chosen=chosen.__contains__), 1e-9)


def test_tied_weights_count_once() -> None:
    names = list(select_parameters(qwen2()))
    assert "lm_head.weight" not in names
    assert len(names) == len({id(p) for p in select_parameters(qwen2()).values()}) == 26


def test_the_last_layers_are_those_of_the_model_not_of_its_trainable_part() -> None:
    model = qwen2_untied()
    model.model.layers[1].requires_grad_(False)
    assert set(select_parameters(model, "last_1")) == {"model.norm.weight", "lm_head.weight"}


def test_parameters_that_a_row_does_not_reach_have_norm_zero() -> None:
    model = qwen2()
    model.idle = nn.Parameter(torch.ones(3))
    assert norms_of(model, *SAMPLES[:2], parameters=lambda name: name == "idle").tolist() == [0.0, 0.0]
    assert torch.equal(norms_of(model, *SAMPLES[:2]), norms_of(qwen2(), *SAMPLES[:2]))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("everything", "unknown parameters='everything'"),
        ("last_", "unknown parameters"),
        ("lora", "'lora'.* selects none of 26"),
        ("last_0", "2 numbered decoder layers"),
        ("last_3", "2 numbered decoder layers"),
        (lambda name: False, "the given predicate selects none"),
    ],
)
def test_choices_of_nothing_are_refused(parameters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norms_of(qwen2(), SAMPLES[0], parameters=parameters)


def test_frozen_choices_are_refused() -> None:
    model = qwen2_untied()
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="the output embedding is frozen"):
        norms_of(model, SAMPLES[0], parameters="head")
    with pytest.raises(ValueError, match="no trainable parameter"):
        norms_of(model.requires_grad_(False), SAMPLES[0])
    with pytest.raises(ValueError, match="get_output_embeddings"):
        norms_of(nn.DataParallel(qwen2()), SAMPLES[0], parameters="head")


# Bad arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
    ],
)
def test_bad_temperatures_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norms_of(qwen2(), SAMPLES[0], **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"), [({"method": "magic"}, "unknown method"), ({"accumulation": "int8"}, "accumulation")]
)
def test_unknown_words_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norms_of(qwen2(), SAMPLES[0], **options)


def test_a_counted_first_token_is_refused() -> None:
    ids, attention, completion = padded(SAMPLES, "left")
    completion[2] = attention[2]
    with pytest.raises(ValueError, match="first token of row 2"):
        sequence_grad_norms(qwen2(), ids, attention, completion)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("short", [1, 2])
def test_tensors_of_different_shapes_are_refused(short: int) -> None:
    batch = list(padded(SAMPLES))
    batch[short] = batch[short][:, :-1]
    with pytest.raises(ValueError, match=r"one shape; got \(5, 8\)"):
        sequence_grad_norms(qwen2(), *batch)


# Low precision ------------------------------------------------------------------------------------------------------


def bfloat16_gradients(model: nn.Module, sample: Sample) -> list[Tensor]:
    """Gradients of the mean NLL (float32 softmax) in the parameters' bfloat16."""
    logits = model(input_ids=torch.tensor([sample.ids])).logits[0].float()
    targets = torch.tensor([sample.ids[t] for t in sample.counted])
    loss = nn.functional.cross_entropy(logits[[t - 1 for t in sample.counted]], targets)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    model = qwen2(torch.bfloat16)
    norms = norms_of(model, *SAMPLES, method="loop")
    assert norms.dtype == torch.float32
    for norm, sample in zip(norms, SAMPLES, strict=True):
        grads = bfloat16_gradients(model, sample)
        assert all(g.dtype == torch.bfloat16 for g in grads)
        wanted = math.sqrt(math.fsum(float(x) ** 2 for g in grads for x in g.flatten()))
        assert norm.item() == pytest.approx(wanted, rel=1e-6)


def test_gradient_dtype_rounds_as_the_official_code_does() -> None:
    model = qwen2(torch.bfloat16)
    norms = norms_of(model, *SAMPLES, accumulation="gradient_dtype")
    for norm, sample in zip(norms, SAMPLES, strict=True):
        total = torch.zeros((), dtype=torch.bfloat16)
        for g in bfloat16_gradients(model, sample):
            total = total + (g * g).sum()
        assert norm.item() == total.sqrt().item()
    assert (norms != norms_of(model, *SAMPLES)).any()


def test_gradient_dtype_is_exact_for_float64() -> None:
    model = qwen2(torch.float64)
    assert_relative(norms_of(model, *SAMPLES, accumulation="gradient_dtype"), naive_norms(model, *SAMPLES), 1e-9)


def test_434_equal_terms_stagnate_at_256_in_bfloat16() -> None:
    ones = [torch.ones(1, dtype=torch.bfloat16) for _ in range(434)]  # the tensors of Qwen2.5-3B
    assert gradient_norm(ones, "gradient_dtype").item() == 16.0
    assert gradient_norm(ones, "float32").item() == pytest.approx(math.sqrt(434), rel=1e-7)


def test_large_matrices_keep_float32_accuracy() -> None:
    grads = [torch.full((2048, 2048), 0.1), torch.full((3,), 1e-3), torch.tensor(2.0)]
    wanted = math.sqrt(2048**2 * float(grads[0][0, 0]) ** 2 + 3e-6 + 4.0)
    assert gradient_norm(grads, "float32").item() == pytest.approx(wanted, rel=1e-6)


def test_float16_models_stay_finite() -> None:
    model = qwen2(torch.float16)
    norms = norms_of(model, *SAMPLES)
    assert norms.dtype == torch.float32
    assert_relative(norms, naive_norms(model, *SAMPLES), 0.02)


def test_masked_vocabulary_gives_finite_norms() -> None:
    model = qwen2()

    def mask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_fill(-1, torch.tensor([33]), -torch.inf)

    model.lm_head.register_forward_hook(mask)
    assert norms_of(model, *SAMPLES).isfinite().all()


# The mode -----------------------------------------------------------------------------------------------------------


def test_scoring_mode_keeps_training_only_where_layers_checkpoint() -> None:
    model = qwen2().train()
    with scoring_mode(model):
        assert not any(module.training for module in model.modules())
    enable_checkpointing(model, use_reentrant=False)
    with scoring_mode(model):
        assert [m for m in model.modules() if m.training] == list(model.model.layers)
    model.eval()
    with scoring_mode(model):
        assert not any(module.training for module in model.modules())
    assert not any(module.training for module in model.modules())


class OldStyle(nn.Module):
    """A model of the older kind: the container checkpoints its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.5)])
        self.gradient_checkpointing = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                self.checkpointed += 1
                hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        return type("Output", (), {"logits": hidden @ self.embedding.weight.T})()


def test_a_container_that_checkpoints_its_layers_goes_on_doing_so() -> None:
    model = OldStyle().train()
    plain = norms_of(model, *SAMPLES, method="loop")
    model.gradient_checkpointing, model.checkpointed = True, 0
    assert torch.equal(norms_of(model, *SAMPLES, method="loop"), plain)
    assert model.checkpointed == 2 * len(SAMPLES)


def test_samples_hold_special_tokens_as_real_ones() -> None:
    assert PAD in SAMPLES[1].completion
    assert EOS in SAMPLES[1].completion[:-1]
