"""What the tests check at run time of the pure maths: shapes and dtypes that are declared, plain types beside them."""

from __future__ import annotations

from typing import Any

import beartype
import jaxtyping
import pytest
import torch
from helpers_checked import jaxtyped
from jaxtyping import Float, Int, TypeCheckError
from torch import Tensor

from vigor import gradnorm, groupmetrics, rollouts, shaping, signals, tokenstats

Sequences = Int[Tensor, " N"]
checked = jaxtyped(typechecker=beartype.beartype)
LONG, SQUARE = torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2)


@checked
def product(x: Float[Tensor, "a b"], y: Float[Tensor, "b c"]) -> Float[Tensor, "a c"]:
    return x @ y


@checked
def counted(rows: Sequences) -> int:
    return len(rows)


@checked
def plain(count: int) -> str:
    return "x" * count if isinstance(count, int) else "no whole number"


def test_shapes_and_dtypes_are_checked() -> None:
    assert product(SQUARE, SQUARE).shape == (2, 2)
    with pytest.raises(TypeCheckError):
        product(SQUARE, torch.zeros(3, 2))
    with pytest.raises(TypeCheckError):
        product(SQUARE, SQUARE.long())


def test_an_alias_of_an_array_is_one() -> None:
    assert counted(LONG) == 3
    with pytest.raises(TypeCheckError):
        counted(LONG.float())


def test_a_function_within_another_is_checked_where_it_declares_arrays() -> None:
    @checked
    def inner(x: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
        return x[0]

    with pytest.raises(TypeCheckError):
        inner(torch.zeros(2, 3))


def test_plain_types_are_checked_until_the_checks_are_off(request: pytest.FixtureRequest) -> None:
    assert plain(2) == "xx"
    wrong: Any = 2.5
    with pytest.raises(beartype.roar.BeartypeCallHintParamViolation):
        plain(wrong)
    request.getfixturevalue("unchecked")
    assert plain(wrong) == "no whole number"
    assert product(SQUARE, SQUARE.double().float()).shape == (2, 2)


@pytest.mark.parametrize("module", [gradnorm.api, groupmetrics, rollouts, shaping, signals, tokenstats])
def test_the_functions_of_the_pure_maths_are_wrapped(module: Any) -> None:
    own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    assert any(hasattr(value, "__wrapped__") for value in own if callable(value)) or any(
        hasattr(value.__init__, "__wrapped__") for value in own if isinstance(value, type)
    )
    assert jaxtyping.jaxtyped is jaxtyped
