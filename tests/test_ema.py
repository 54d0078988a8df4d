"""EMA: the recursion in float64, LoRA, the swap in and out, resume, and the rate of Co-rewarding-II."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import lora, qwen2
from torch import nn

from vigor.ema import EMA, CosineRate

IDS = torch.tensor([[5, 9, 3, 7, 8]])


@torch.no_grad()
def move(model: nn.Module, seed: int) -> None:
    """One made-up optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [qwen2, lora])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_copy_follows_the_recursion(make: type, device: str | None) -> None:
    model, rates = make(), [0.5, 0.01, 0.0, 1e-5, 1.0, 0.3]
    ema = EMA(model, device=device)
    wanted = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    for seed, rate in enumerate(rates):
        move(model, seed)
        ema.update(model, rate)
        for name, p in model.named_parameters():
            if p.requires_grad:
                wanted[name] = rate * p.detach().double() + (1 - rate) * wanted[name]
    assert ema.state_dict().keys() == wanted.keys()
    for name, tensor in ema.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-6)


def test_a_small_rate_moves_the_copy_of_a_bfloat16_model() -> None:
    model = qwen2(torch.bfloat16)
    ema = EMA(model)
    before = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    move(model, 0)
    ema.update(model, 1e-5)
    name = "model.layers.0.mlp.up_proj.weight"
    assert ema.state_dict()[name].dtype == torch.float32
    assert not torch.equal(ema.state_dict()[name], before[name])
    assert torch.equal(before[name].bfloat16(), ema.state_dict()[name].bfloat16()), "the step is no small one"


@pytest.mark.parametrize("make", [qwen2, lora])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_gives_the_averaged_policy_and_back_bit_for_bit(make: type, dtype: torch.dtype) -> None:
    model = make(dtype)
    start = copy.deepcopy(model)
    ema = EMA(model, device="cpu")
    move(model, 1)
    own = values(model)
    with ema.swapped(model):
        assert torch.equal(model(input_ids=IDS).logits, start(input_ids=IDS).logits)
        assert any(not torch.equal(tensor, own[name]) for name, tensor in values(model).items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in values(model).items())


def test_an_error_inside_the_block_restores_the_weights() -> None:
    model = qwen2()
    ema = EMA(model)
    move(model, 2)
    own = values(model)
    with pytest.raises(RuntimeError, match="sampling failed"), ema.swapped(model):
        raise RuntimeError("sampling failed")
    assert all(torch.equal(tensor, own[name]) for name, tensor in values(model).items())


def test_an_optimizer_goes_on_after_a_swap() -> None:
    """The optimizer holds the parameter tensors themselves: they must be the same objects afterwards."""
    one, other = qwen2(), qwen2()
    results = []
    for model, swap in ((one, True), (other, False)):
        optimizer, ema = torch.optim.AdamW(model.parameters(), lr=1e-2), EMA(model)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, 0.1)
            if swap:
                with ema.swapped(model):
                    model(input_ids=IDS)
        results.append(values(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_saved_average_goes_on_as_if_never_interrupted() -> None:
    model = lora()
    ema = EMA(model)
    move(model, 3)
    ema.update(model, 0.2)
    saved = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    resumed = EMA(model)
    resumed.load_state_dict(saved)
    move(model, 4)
    for each in (ema, resumed):
        each.update(model, 0.1)
    for name, tensor in ema.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_under_lora_only_the_adapters_are_copied() -> None:
    names = EMA(lora()).state_dict().keys()
    assert names
    assert all("lora_" in name for name in names)


def test_what_does_not_fit_is_refused() -> None:
    ema = EMA(qwen2())
    with pytest.raises(ValueError, match="not those of the copy"):
        ema.update(lora(), 0.1)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got 1.5"):
        ema.update(qwen2(), 1.5)
    with pytest.raises(ValueError, match="the saved average is of other parameters"):
        ema.load_state_dict({"x": torch.zeros(2)})
    with pytest.raises(ValueError, match="no trainable parameter"):
        EMA(qwen2().requires_grad_(False))
    with pytest.raises(ValueError, match=r"rates lie in \[0, 1\]"):
        CosineRate(start=-0.1)


def test_the_rate_is_co_rewardings() -> None:
    rate = CosineRate()
    assert rate(1, 100) == 0.01
    assert rate(101, 100) == pytest.approx(1e-5, rel=1e-9)
    assert rate(51, 100) == pytest.approx((0.01 + 1e-5) / 2, rel=1e-12)
    for step in (1, 7, 64, 100):
        wanted = 1e-5 + 0.5 * (0.01 - 1e-5) * (1 + math.cos(math.pi * (step - 1) / 100))
        assert rate(step, 100) == pytest.approx(wanted, rel=1e-12)
    assert rate(500, 100) == rate(101, 100)
