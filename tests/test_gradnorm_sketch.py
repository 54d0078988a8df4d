"""The sketch: estimates of the norms without bias, the same for a completion wherever it stands."""

from __future__ import annotations

import pytest
import torch
from models import lora, qwen2
from test_gradnorm_batched import FAMILIES, Mixer, batch, build, relative
from torch import Tensor, nn

from vigor.gradnorm import SelfCheckFailed, UnsupportedModule, sequence_grad_norms


def sketch(model: nn.Module, *, rows: tuple[Tensor, Tensor, Tensor] | None = None, **options: int) -> Tensor:
    norms = sequence_grad_norms(model, *(rows or batch()), method="sketch", self_check=False, **options)
    assert isinstance(norms, Tensor)
    return norms


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-moe", "gpt2-tied"])
def test_squares_are_unbiased(name: str) -> None:
    """Over 120 seeds the mean square is the exact one, within four of its own standard errors."""
    model = build(name)
    exact = sequence_grad_norms(model, *batch(), method="batched", self_check=False)
    assert isinstance(exact, Tensor)
    squares = torch.stack([sketch(model, projections=4, seed=seed)[:5].square() for seed in range(120)])
    error = (squares.mean(0) - exact[:5].square()).abs()
    assert (error < 4 * squares.std(0) / 120**0.5).all()
    assert (squares.std(0) > 0.01 * exact[:5].square()).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_many_projections_come_near(name: str) -> None:
    model = build(name)
    exact = sequence_grad_norms(model, *batch(), method="batched", self_check=False)
    assert isinstance(exact, Tensor)
    assert relative(sketch(model, projections=4096)[:5], exact[:5]) < 0.03


def test_more_projections_are_nearer() -> None:
    model = build("qwen2-tied")
    exact = sequence_grad_norms(model, *batch(), method="batched")
    assert isinstance(exact, Tensor)
    errors = []
    for projections in (1, 16, 256):
        off = [(sketch(model, projections=projections, seed=s) / exact - 1)[:5].square().mean() for s in range(20)]
        errors.append(torch.stack(off).mean().sqrt().item())
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]  # each is a quarter of the one before, in expectation


def test_the_seed_decides() -> None:
    model = build("qwen2-tied")
    torch.testing.assert_close(sketch(model, seed=3), sketch(model, seed=3), rtol=0, atol=0, equal_nan=True)
    assert relative(sketch(model, seed=3)[:5], sketch(model, seed=4)[:5]) > 1e-3


def test_a_completion_has_one_estimate_wherever_it_stands() -> None:
    model = build("qwen2-tied")
    alone = torch.cat([sketch(model, rows=tuple(x[b : b + 1] for x in batch())) for b in range(5)])  # type: ignore[arg-type]
    assert relative(sketch(model)[:5], alone) < 1e-6
    assert relative(sketch(model, micro_batch=2)[:5], alone) < 1e-6
    reversed_rows = tuple(x.flip(0) for x in batch())
    assert relative(sketch(model, rows=reversed_rows).flip(0)[:5], alone) < 1e-6  # type: ignore[arg-type]


def test_adapters_and_frozen_parameters() -> None:
    model = lora()
    exact = sequence_grad_norms(model, *batch(), method="batched")
    assert isinstance(exact, Tensor)
    assert relative(sketch(model, projections=4096)[:5], exact[:5]) < 0.03


def test_a_matrix_used_twice_counts_its_sum() -> None:
    model = build("qwen2-untied")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    exact = sequence_grad_norms(model, *batch(), method="batched")
    assert isinstance(exact, Tensor)
    assert relative(sketch(model, projections=4096)[:5], exact[:5]) < 0.03


def test_the_self_check_compares_the_exact_norm() -> None:
    """An estimate cannot pass a test of exactness; the pass that it is made from must."""
    model = qwen2()
    norms = sequence_grad_norms(model, *batch(), method="sketch", projections=1)
    assert isinstance(norms, Tensor) and norms[:5].isfinite().all()
    with pytest.raises(SelfCheckFailed, match="mixes the sequences"):
        sequence_grad_norms(Mixer(), *batch(), method="sketch")


class _Odd(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight = inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.clone().mul_(2))


def test_what_the_batched_method_refuses_is_refused() -> None:
    model = build("qwen2-untied")
    model.model.layers[0].mlp.up_proj = _Odd(model.model.layers[0].mlp.up_proj)
    with pytest.raises(UnsupportedModule, match="up_proj"):
        sketch(model)


@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="projections must be at least 1, got 0"):
        sketch(qwen2(), projections=0)
    with pytest.raises(ValueError, match="method='sketch' never forms"):
        sequence_grad_norms(qwen2(), *batch(), method="sketch", accumulation="gradient_dtype")
