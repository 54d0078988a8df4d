"""The batched method equals the loop to 1e-9 in float64, with transformers' internal float32 in float64 too.

Norms, rotary embeddings, softmaxes and routers of transformers compute in float32 whatever the model's dtype, so two
ways to one number agree to 1e-7 only. Here such casts go to float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import SAMPLES, SIDES, Side, enable_checkpointing, padded, qwen2
from peft import LoraConfig, get_peft_model
from test_gradnorm_batched import both, build, relative
from torch import Tensor

from vigor.gradnorm import sequence_grad_norms

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
FAMILIES = ["qwen2-tied", "qwen2-untied", "qwen3", "llama-biases", "gemma2", "gemma3", "mistral", "mixtral", "olmo2"]
FAMILIES += ["phi3", "gpt2-tied", "gpt2-untied", "gpt-neox", "qwen3-moe"]


def redirect_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends what asks for float32 to float64."""
    to, softmax = Tensor.to, torch.nn.functional.softmax

    def wide(x: Any) -> Any:
        return torch.float64 if x is torch.float32 else x

    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(
        Tensor, "to", lambda self, *args, **named: to(self, *map(wide, args), **{k: wide(v) for k, v in named.items()})
    )
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda *args, **named: softmax(*args, **{k: wide(v) for k, v in named.items()})
    )


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    redirect_float32(monkeypatch)


def adapted(*, dora: bool) -> Any:
    config = LoraConfig(r=3, lora_alpha=7, use_dora=dora, target_modules=TARGETS)
    model = get_peft_model(qwen2(), config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    assert relative(*both(build(name))) < 1e-9


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapters(dora: bool, checkpointed: bool) -> None:
    model = adapted(dora=dora).train()
    if checkpointed:
        enable_checkpointing(model, use_reentrant=False)
        model.enable_input_require_grads()
    assert relative(*both(model)) < 1e-9


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["qwen2-tied", "gemma3", "gpt2-tied", "mixtral"])
def test_gradient_checkpointing(name: str) -> None:
    model = build(name)
    enable_checkpointing(model, use_reentrant=False)
    assert relative(*both(model)) < 1e-9


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["qwen2-tied", "llama-biases", "gpt2-tied"])
@pytest.mark.parametrize("side", SIDES)
def test_padding(name: str, side: Side) -> None:
    model = build(name)
    batched, loop = (
        sequence_grad_norms(model, *padded(SAMPLES, side, extra=5), method=method, self_check=False)
        for method in ("batched", "loop")
    )
    assert isinstance(batched, Tensor) and isinstance(loop, Tensor)
    assert relative(batched, loop) < 1e-9


def test_without_the_redirection_gemma_differs_by_float32_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests above would show nothing that those of test_gradnorm_batched.py do not."""
    model = build("gemma2")
    assert relative(*both(model)) > 1e-9
    redirect_float32(monkeypatch)
    assert relative(*both(model)) < 1e-12
