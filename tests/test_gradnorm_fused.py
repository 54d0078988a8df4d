"""The fused update equals the two-pass update, or refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import enable_checkpointing, lora, qwen2
from test_gradnorm_batched import FAMILIES, batch, build
from torch import Tensor, nn

from vigor.gradnorm import SelfCheckFailed, fused_grad_norms, scoring_mode, sequence_grad_norms

MODES = ("keep", "retain")
family = pytest.mark.parametrize("name", FAMILIES)
modes = pytest.mark.parametrize("mode", MODES)


def weights(mode: str, shape: torch.Size) -> Tensor:
    """One weight a row for "keep", one a token for "retain"."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    return w[:, :1].expand(shape) if mode == "keep" else w


def two_pass(model: nn.Module, temperature: float, w_BL: Tensor) -> dict[str, Tensor]:
    """Row by row through autograd: the gradient of Σ w log π, by name."""
    ids_BL, attention_BL, completion_BL = batch()
    model.zero_grad()
    with scoring_mode(model):
        for ids_L, real_L, counted_L, w_L in zip(ids_BL, attention_BL.bool(), completion_BL.bool(), w_BL, strict=True):
            if not counted_L.any():
                continue
            ids, counted, w = ids_L[real_L], counted_L[real_L][1:], w_L[real_L][1:]
            logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, :-1]
            wide = torch.promote_types(logits.dtype, torch.float32)
            logps = (logits.to(wide) / temperature).log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
            (logps * w.to(wide))[counted].sum().backward()
    return gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative; a parameter that one of them leaves out counts as zero there."""
    off = norm = 0.0
    for name in got.keys() | wanted.keys():
        a, b = got.get(name), wanted.get(name)
        a = torch.zeros_like(b) if a is None and b is not None else a
        b = torch.zeros_like(a) if b is None and a is not None else b
        assert a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape
        off += (a - b).double().square().sum().item()
        norm += b.double().square().sum().item()
    return (off / norm) ** 0.5


def fused(model: nn.Module, mode: Any, w_BL: Tensor, temperature: float = 0.7, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    result = fused_grad_norms(model, *batch(), mode=mode, temperature=temperature, **options)
    plain = sequence_grad_norms(model, *batch(), method="batched", temperature=temperature)
    torch.testing.assert_close(result.norms_B, plain, rtol=1e-5, atol=0, equal_nan=True)
    (result.token_logps() * w_BL.to(result.logps_BL.dtype)).sum().backward()
    return gradients(model)


@family
@modes
def test_float64(name: str, mode: str) -> None:
    model = build(name)
    w = weights(mode, batch()[0].shape)
    assert difference(fused(model, mode, w), two_pass(model, 0.7, w)) < 1e-6


@pytest.mark.parametrize("name", ["qwen2-tied", "gemma3", "gpt2-tied", "qwen3-moe"])
@modes
def test_float32(name: str, mode: str) -> None:
    model = build(name, torch.float32)
    w = weights(mode, batch()[0].shape)
    assert difference(fused(model, mode, w), two_pass(model, 0.7, w)) < 1e-5


@modes
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 100])
def test_micro_batches_change_nothing(mode: str, micro_batch: int) -> None:
    model = build("qwen2-tied")
    w = weights(mode, batch()[0].shape)
    assert difference(fused(model, mode, w, micro_batch=micro_batch), two_pass(model, 0.7, w)) < 1e-6


@modes
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2-tied"])
def test_gradient_checkpointing_changes_nothing(mode: str, reentrant: bool, name: str) -> None:
    model = build(name)
    w = weights(mode, batch()[0].shape)
    wanted = two_pass(model, 0.7, w)
    enable_checkpointing(model, use_reentrant=reentrant)
    assert difference(fused(model, mode, w), wanted) < 1e-6


@modes
def test_adapters(mode: str) -> None:
    model = lora()
    w = weights(mode, batch()[0].shape)
    assert difference(fused(model, mode, w), two_pass(model, 0.7, w)) < 1e-5


@modes
def test_frozen_parameters_get_no_gradient(mode: str) -> None:
    model = build("qwen2-untied")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name or "lm_head" in name)
    w = weights(mode, batch()[0].shape)
    got = fused(model, mode, w)
    assert set(got) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert difference(got, two_pass(model, 0.7, w)) < 1e-6


@modes
def test_a_model_whose_decoder_is_not_named(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2-tied")
    w = weights(mode, batch()[0].shape)
    monkeypatch.setattr(type(model), "get_decoder", None)
    assert difference(fused(model, mode, w), two_pass(model, 0.7, w)) < 1e-6


@modes
def test_a_module_used_twice(mode: str) -> None:
    model = build("qwen2-untied")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    w = weights(mode, batch()[0].shape)
    assert difference(fused(model, mode, w), two_pass(model, 0.7, w)) < 1e-6


@modes
def test_autocast(mode: str) -> None:
    model = qwen2()
    w = weights(mode, batch()[0].shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused(model, mode, w)
        wanted = two_pass(model, 0.7, w)
    assert difference(got, wanted) < 2e-2


@modes
def test_rows_in_several_backward_passes_and_gradients_that_are_there_already(mode: str) -> None:
    model = build("qwen2-tied")
    w = weights(mode, batch()[0].shape)
    wanted = two_pass(model, 1.0, w)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    result = fused_grad_norms(model, *batch(), mode=mode, micro_batch=2)
    for rows in ([4, 0], [5, 2], [1, 3]):
        (result.token_logps(rows) * w[rows]).sum().backward()
    got = {name: gradient - 1 for name, gradient in gradients(model).items()}
    assert difference(got, wanted) < 1e-6


@modes
def test_rows_that_are_the_same_add_up(mode: str) -> None:
    model = build("qwen2-tied")
    ids, attention, completion = (x[:2].repeat(2, 1) for x in batch())
    w = weights(mode, ids.shape)
    result = fused_grad_norms(model, ids, attention, completion, mode=mode)
    (result.token_logps() * w).sum().backward()
    got = gradients(model)
    summed = w[:2] + w[2:]
    once = fused_grad_norms(model, ids[:2], attention[:2], completion[:2], mode=mode)
    (once.token_logps() * summed).sum().backward()
    assert difference(got, gradients(model)) < 1e-12


def test_keep_refuses_weights_that_differ_within_a_row() -> None:
    model = build("qwen2-tied")
    result = fused_grad_norms(model, *batch(), mode="keep")
    with pytest.raises(RuntimeError, match=r"different weights.*Use 'retain'"):
        (result.token_logps() * weights("retain", batch()[0].shape)).sum().backward()
    assert not gradients(model)


@modes
def test_a_row_cannot_be_used_twice(mode: str) -> None:
    model = build("qwen2-tied")
    result = fused_grad_norms(model, *batch(), mode=mode)
    result.token_logps([0]).sum().backward()
    with pytest.raises(RuntimeError, match="row 0 has had its backward pass"):
        result.token_logps([0]).sum().backward()
    result.release()
    with pytest.raises(RuntimeError, match=r"release\(\)"):
        result.token_logps([1]).sum().backward()


@modes
def test_the_log_probabilities_are_those_of_the_norms(mode: str) -> None:
    model = qwen2()
    result = fused_grad_norms(model, *batch(), mode=mode, temperature=0.7)
    norms, logps = sequence_grad_norms(model, *batch(), method="loop", temperature=0.7, return_token_logps=True)
    torch.testing.assert_close(result.logps_BL, logps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.token_logps([3, 1]), result.logps_BL[[3, 1]], rtol=0, atol=0)
    torch.testing.assert_close(result.norms_B, norms, rtol=1e-5, atol=0, equal_nan=True)


class _Detour(nn.Module):
    """A model whose update is wrong only in direction: a square matrix's gradient comes back transposed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def test_the_self_check_compares_the_gradient_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from vigor.gradnorm.batched import Pass

    model = _Detour(build("qwen2-tied"))
    weighted = Pass.weighted

    def transposed(self: Pass, parameter: nn.Parameter, w_B: Tensor) -> Tensor | None:
        gradient = weighted(self, parameter, w_B)
        square = gradient is not None and gradient.ndim == 2 and gradient.shape[0] == gradient.shape[1]
        return gradient.T if square and gradient is not None else gradient

    monkeypatch.setattr(Pass, "weighted", transposed)
    with pytest.raises(SelfCheckFailed, match="batched gradient update"):
        fused_grad_norms(model, *batch(), mode="keep")


@modes
def test_a_step_with_it_is_the_two_pass_step(mode: str) -> None:
    """Also for what an optimizer does with parameters that have no gradient."""
    model = build("qwen3-moe")
    other = copy.deepcopy(model)
    w = weights(mode, batch()[0].shape)
    for m, gradient in ((model, fused(model, mode, w)), (other, two_pass(other, 0.7, w))):
        for name, parameter in m.named_parameters():
            parameter.grad = gradient.get(name)
        torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1).step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="choose 'keep' or 'retain'"):
        fused_grad_norms(qwen2(), *batch(), mode="fast")  # type: ignore[arg-type]
