"""The statistics of benchmarks/precision.py against brute force, and the study itself on a small setting."""

from __future__ import annotations

import importlib
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from models import SAMPLES, llama, naive_logps, qwen2
from torch.utils._python_dispatch import TorchDispatchMode

from vigor.gradnorm.api import Method

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def precision(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("precision")


# Statistics -----------------------------------------------------------------------------------------------------------


def brute_force(x: list[float], y: list[float]) -> tuple[int, int, int, float]:
    """Pairs, flips, ties, and tau-b by its textbook form with the sizes of the sets of equal values."""
    pairs = flips = ties = concordant = discordant = 0
    for i in range(len(x)):
        for j in range(i):
            if x[i] != x[j]:
                pairs += 1
                ties += y[i] == y[j]
                if y[i] != y[j]:
                    same = (x[i] > x[j]) == (y[i] > y[j])
                    concordant += same
                    discordant += not same
                    flips += not same
    n0 = len(x) * (len(x) - 1) // 2
    n1, n2 = (sum(n * (n - 1) // 2 for n in Counter(values).values()) for values in (x, y))
    if n1 == n0 or n2 == n0:
        return pairs, flips, ties, math.nan
    return pairs, flips, ties, (concordant - discordant) / math.sqrt((n0 - n1) * (n0 - n2))


def test_order_equals_brute_force(precision: Any) -> None:
    rng = random.Random(0)
    undefined = 0
    for _ in range(300):
        n, kinds = rng.randint(2, 8), rng.randint(1, 6)
        x, y = ([float(rng.randrange(kinds)) for _ in range(n)] for _ in range(2))
        got, (pairs, flips, ties, tau) = precision.order(x, y), brute_force(x, y)
        assert (got.pairs, got.flips, got.ties) == (pairs, flips, ties)
        assert got.tau == pytest.approx(tau, abs=1e-12, nan_ok=True)
        undefined += math.isnan(tau)
    assert 0 < undefined < 150


def test_order_golden(precision: Any) -> None:
    # 10 pairs less 2 that x ties; of the 8, y flips 5 and ties 1: (2 - 5) / √(8 · 9).
    got = precision.order([12, 2, 1, 12, 2], [1, 4, 7, 1, 0])
    assert (got.pairs, got.flips, got.ties) == (8, 6, 0)
    assert got.tau == pytest.approx(-0.47140452079103173, abs=1e-12)
    assert precision.order([1, 2, 3, 4], [1, 3, 2, 4]).tau == pytest.approx(2 / 3)


def test_changed_rewards(precision: Any) -> None:
    assert precision.changed_rewards([1, 2, 3, 4], [10, 20, 30, 40]) == 0
    assert precision.changed_rewards([1, 2, 3, 4], [1, 3, 2, 4]) == 2
    assert precision.changed_rewards([1, 2, 3, 4], [1, 2.5, 2.5, 4]) == 2  # tied now: both get the mean rank
    assert precision.changed_rewards([1, 2, 3, 4], [4, 1, 2, 3]) == 4


def test_summary(precision: Any) -> None:
    groups = [
        precision.Measured([1.0, 2.0, 4.0], [1.1, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 2.0]),
        precision.Measured([1.0, 1.0, 2.0], [1.0, 1.0, 0.5], [5.0, 5.0, 5.0], [5.0, 5.0, 5.0]),
    ]
    got = precision.summary(groups)
    assert got["median_error"] == pytest.approx((0.0 + 0.1) / 2)
    assert got["max_error"] == pytest.approx(0.75)
    assert got["bias"] == pytest.approx((0.1 - 0.25 - 0.75) / 6)
    assert got["flips"] == pytest.approx(2 / 5) and got["ties"] == 0
    assert got["tau"] == pytest.approx((1 - 1) / 2)
    assert got["flips_sqrt_t"] == 0 and got["ties_sqrt_t"] == pytest.approx(1 / 3)
    assert got["tau_sqrt_t"] == pytest.approx(2 / math.sqrt(6))  # the second group has no order at all
    assert got["changed_rewards"] == pytest.approx(2 / 6) and got["changed_groups"] == 0.5


# The pieces -----------------------------------------------------------------------------------------------------------


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of what operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {x.dtype for x in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(x)}
        return result


@pytest.mark.parametrize("make", [qwen2, llama])
def test_the_reference_is_float64_throughout(precision: Any, make: Any) -> None:
    model = precision.cast(make(), torch.float64)
    group = precision.Group(SAMPLES[0].prompt, [SAMPLES[0].completion])
    with Dtypes() as plain:
        near = precision.stripped_norms(model, group, method="loop", accumulation="float32")
    with Dtypes() as widened:
        exact = precision.exact_norms(model, group)
    # Rotary frequencies are a float32 buffer; what it is compared with is what is computed from it.
    assert torch.float32 in plain.seen and torch.float32 not in widened.seen
    assert near != exact and near == pytest.approx(exact, rel=1e-6)


def test_casting_keeps_buffers_and_ties(precision: Any) -> None:
    model = qwen2()
    half = precision.cast(model, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.buffers()} == {torch.float32}
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    back = precision.cast(half, torch.float32)
    assert torch.equal(back.lm_head.weight, model.lm_head.weight.bfloat16().float())


@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 3)])
def test_padding_in_place_is_the_same_norm(precision: Any, left: int, right: int) -> None:
    model, sample = qwen2(), SAMPLES[0]
    got = precision.padded_norm(model, sample.prompt, sample.completion, left, right, "float32")
    (wanted,) = precision.stripped_norms(model, precision.Group(sample.prompt, [sample.completion]), method="loop")
    assert got == pytest.approx(wanted, rel=1e-5)


def test_scores_of_official_sums_are_rounded_as_the_norms_are(precision: Any) -> None:
    group = precision.Group(SAMPLES[0].prompt, [s.completion for s in SAMPLES])
    model = precision.cast(qwen2(), torch.bfloat16)
    official, ours = (
        precision.measure(model, [group], [[1.0] * len(SAMPLES)], precision.Variant("", torch.bfloat16, accumulation=a))
        for a in ("gradient_dtype", "float32")
    )
    for numbers, rounded in ((official[0].norms, True), (official[0].scores, True), (ours[0].scores, False)):
        x = torch.tensor(numbers)
        assert torch.equal(x, x.bfloat16().float()) is rounded


def test_the_sketch_is_measured_where_the_library_has_one(precision: Any) -> None:
    methods = {variant.method for variant in precision.variants()}
    assert methods == {"loop", "batched"} | ({"sketch"} & set(get_args(Method)))
    assert set(precision.PADDED) <= {variant.name for variant in precision.variants()}


def test_random_groups_differ_and_repeat(precision: Any) -> None:
    source = importlib.import_module("precision_groups")
    model, groups = source.random_qwen2(64, 2, 200, False, 2, seed=3)
    again, same = source.random_qwen2(64, 2, 200, False, 2, seed=3)
    assert groups == same and groups[0] != groups[1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
    assert len({len(c) for c in groups[0].completions}) > 1 and len(groups[0].completions) == source.GROUP


def test_other_quantities(precision: Any) -> None:
    model, group = qwen2(tied=False), precision.Group(SAMPLES[0].prompt, [SAMPLES[0].completion])
    got = precision.quantities(model, group)
    assert set(got) == {"mean NLL", "output head", "last_1", "last_2"}
    nll = -torch.stack([z[t] for z, t in zip(naive_logps(model, SAMPLES[0]), SAMPLES[0].completion, strict=True)])
    assert got["mean NLL"] == pytest.approx([nll.mean().item()], rel=1e-5)
    # The head's own gradient does not depend on how the hidden states came about.
    assert got["output head"] == pytest.approx(
        precision.stripped_norms(model, group, method="loop", parameters="head"), rel=1e-5
    )
    assert got["last_1"][0] < got["last_2"][0] < precision.stripped_norms(model, group, method="loop")[0]


# The study ------------------------------------------------------------------------------------------------------------


def test_the_study_runs(precision: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precision.main(["--groups", "1", "--settings", "lab:math test", "--seed", "1", "--out", str(tmp_path / "p")])
    report = json.loads((tmp_path / "p.json").read_text("utf-8"))
    (result,) = report["results"].values()
    rows = result["variants"]
    assert rows["fp32, loop"]["max_error"] < 1e-4 < rows["bf16, float32 sums"]["max_error"] < 0.5
    assert rows["fp32, batched"]["tau"] == rows["fp32, loop"]["tau"] == 1
    assert rows["fp32, loop"]["changed_rewards"] == 0
    assert result["padding"]["fp32, loop"]["max_spread"] < 1e-3
    assert -1 <= result["quantities"]["mean NLL"]["tau"] < 1
    text = (tmp_path / "p.md").read_text("utf-8")
    assert all(f"| {name} |" in text for name in rows) and "seed 1" in text
    assert "## lab:math test" in capsys.readouterr().out
