"""Norms under adapters, over quantised bases, with Liger's modules, and over long sequences: exact, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import SAMPLES, Sample, gpt2, lora, naive_logps, padded, qwen2, qwen2_untied
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from vigor.gradnorm import UnsupportedModule, select_parameters, sequence_grad_norms

BATCH = padded(SAMPLES, "mixed")


def wanted(model: nn.Module, chosen: set[str]) -> Tensor:
    """The norms from the definition, all parameters differentiable, squares summed in float64."""
    model = copy.deepcopy(model).requires_grad_(True).eval()
    norms = []
    for sample in SAMPLES:
        model.zero_grad()
        loss = torch.stack(
            [-logp[sample.ids[t]] for logp, t in zip(naive_logps(model, sample), sample.counted, strict=True)]
        )
        loss.mean().backward()
        gradients = [p.grad for name, p in model.named_parameters() if name in chosen and p.grad is not None]
        norms.append(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
    return torch.stack(norms)


# Frozen bases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["batched", "loop"])
@pytest.mark.parametrize("parameters", ["base", "all-linear"])
def test_a_frozen_bases_norm_is_that_of_full_fine_tuning(parameters: str, method: Any) -> None:
    model = lora()
    names = set(select_parameters(model, parameters))
    found = sequence_grad_norms(model, *BATCH, parameters=parameters, method=method)
    assert torch.allclose(found.double(), wanted(model, names), rtol=1e-5)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(select_parameters(model))
    assert all(p.grad is None for p in model.parameters())


def test_adapters_that_change_nothing_leave_the_whole_norm_to_the_base() -> None:
    """With B = 0, as LoRA begins, the base's norm is that of the model without adapters."""
    base = qwen2_untied()
    expected = sequence_grad_norms(base, *BATCH)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear"))
    assert torch.allclose(sequence_grad_norms(model, *BATCH, parameters="base"), expected, rtol=1e-5)
    assert len(select_parameters(model, "base")) == len(list(base.parameters()))


def test_all_linear_are_the_layers_that_peft_adapts_by_that_name() -> None:
    for base in (qwen2(), qwen2_untied(), gpt2()):
        plain = set(select_parameters(base, "all-linear"))
        transposed = base.config.model_type == "gpt2"
        config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=transposed)
        model = get_peft_model(copy.deepcopy(base), config)
        adapted = {name.replace("base_model.model.", "").replace(".base_layer", "") for name in
                   select_parameters(model, "all-linear")}  # fmt: skip
        layers = {name.split(".lora_")[0].removeprefix("base_model.model.") + ".weight"
                  for name, _ in model.named_parameters() if ".lora_" in name}  # fmt: skip
        assert plain == adapted == layers
        assert not any("head" in name or "wte" in name for name in plain)


def test_modules_to_save_belong_to_the_adapter() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(qwen2_untied(), config)
    base, trained = select_parameters(model, "base"), select_parameters(model)
    assert not base.keys() & trained.keys()
    assert any("lm_head" in name for name in base)
    assert any("lm_head" in name for name in trained)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_an_adapters_dropout_is_off_while_it_is_scored(options: dict[str, bool]) -> None:
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5, init_lora_weights=False, **options
    )
    torch.manual_seed(0)
    model = get_peft_model(qwen2(), config).train()
    first = sequence_grad_norms(model, *BATCH, method="batched")
    assert torch.equal(first, sequence_grad_norms(model, *BATCH, method="batched"))
    assert torch.allclose(first.double(), wanted(model, set(select_parameters(model))), rtol=1e-5)
    assert model.training
    assert all(module.training for module in model.modules() if isinstance(module, nn.Dropout))


# Quantised bases ------------------------------------------------------------------------------------------------------


class _Dequantised(torch.autograd.Function):
    """As bitsandbytes does it: the weight is unpacked inside, and only the input gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scale)
        return x @ ((packed.to(x.dtype) - 128) * scale).T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        packed, scale = ctx.saved_tensors
        return g @ ((packed.to(g.dtype) - 128) * scale), None, None


class Linear8bit(nn.Linear):
    """A stand-in for a linear layer of bitsandbytes: 8-bit numbers and one scale."""

    @classmethod
    def of(cls, layer: nn.Linear) -> Linear8bit:
        made = cls(layer.in_features, layer.out_features, bias=False)
        made.scale = float(layer.weight.detach().abs().max()) / 127
        packed = (layer.weight.detach() / made.scale + 128).round().to(torch.uint8)
        made.weight = nn.Parameter(packed, requires_grad=False)
        made.bias = layer.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        y = _Dequantised.apply(x, self.weight, torch.tensor(self.scale))
        return y if self.bias is None else y + self.bias


def quantised() -> nn.Module:
    """Qwen2 with every projection in 8 bits, under LoRA."""
    base = qwen2_untied().requires_grad_(False)
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name.endswith("proj"):
                setattr(module, name, Linear8bit.of(child))
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(base, config)


def test_adapters_on_a_quantised_base_have_the_loops_norm() -> None:
    model = quantised()
    assert torch.allclose(
        sequence_grad_norms(model, *BATCH, method="batched"),
        sequence_grad_norms(model, *BATCH, method="loop"),
        rtol=1e-5,
    )


@pytest.mark.parametrize("parameters", ["base", "all-linear"])
def test_a_quantised_weight_has_no_norm(parameters: str) -> None:
    with pytest.raises(ValueError, match=r"q_proj.*weight \(Linear8bit\) is quantised to torch.uint8"):
        sequence_grad_norms(quantised(), *BATCH, parameters=parameters)


# Liger ----------------------------------------------------------------------------------------------------------------


class LigerRMSNorm(nn.Module):
    """A stand-in for Liger's module of that name."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


def test_ligers_norms_are_refused_by_name_and_left_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LigerRMSNorm, "__module__", "liger_kernel.transformers.rms_norm")
    model = qwen2()
    model.model.norm = LigerRMSNorm(model.model.norm.weight)
    message = r"model.norm \(LigerRMSNorm\) runs a kernel of Liger's.*use_liger_kernel=False"
    with pytest.raises(UnsupportedModule, match=message):
        sequence_grad_norms(model, *BATCH, method="batched")
    fresh = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=message):
        found = sequence_grad_norms(fresh, *BATCH)
    assert torch.equal(found, sequence_grad_norms(model, *BATCH, method="loop"))


# Long sequences -------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most numbers that any operation's result had of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("tied", [True, False])
def test_long_sequences_need_no_square_of_their_length(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the logits of all their tokens: from `WHOLE_LOGITS` on the vocabulary is taken in slices."""
    for bound in ("WHOLE_LOGITS", "SLICE_LOGITS"):
        monkeypatch.setattr(f"vigor.gradnorm.vocabulary.{bound}", 1 << 20)
    T = V = 4096
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "num_key_value_heads": 1, "max_position_embeddings": T}
    config = Qwen2Config(vocab_size=V, **size, **ends, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    ids = torch.randint(2, V, (1, T)).tolist()[0]
    batch = padded([Sample(ids[:16], ids[16:])])
    with Largest() as seen:
        found = sequence_grad_norms(model, *batch, method="batched", self_check=False)
    assert seen.numbers < T * T / 2
    assert torch.allclose(found, sequence_grad_norms(model, *batch, method="loop"), rtol=1e-4)
