"""How much of the order of gradient norms survives float rounding, by dtype and by the way the squares are summed.

    python benchmarks/precision.py --groups 16 --out docs/results/precision     # about 20 minutes on one core

Groups of eight completions: sampled from the lab's base at temperature 1, and random tokens under random Qwen2 models.
All weights are rounded to bfloat16 first, as released checkpoints are, so that every variant has the same model and
what is measured is arithmetic alone. The reference is the loop in float64, with the conversions to float32 that
transformers makes inside (norms, rotary angles) turned into conversions to float64.

Errors are relative to the reference. A pair of a group counts as flipped where the two norms stand the other way round,
and as tied where they are equal, if the reference tells them apart (identical completions it does not). "With √T" is
VIGOR's score; its rewards are the ranks in the group.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any, get_args

import torch
from precision_groups import SETTINGS, Group, cast
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from vigor.gradnorm import sequence_grad_norms
from vigor.gradnorm.api import Method
from vigor.gradnorm.loop import gradient_norm
from vigor.rollouts import Rollouts
from vigor.runfolder import environment
from vigor.shaping import rank

PADDED = ("bf16, official sums", "bf16, float32 sums", "fp32, autocast, float32 sums", "fp32, loop")
"""The variants under which one completion is padded in several ways."""
PADDINGS = ((0, 0), (1, 0), (0, 1), (5, 3), (16, 0), (0, 16), (13, 29))
"""Padding tokens left and right of a row, for the effect of padding on one completion."""


# Statistics -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """How a group's order came out: of `pairs` that the reference tells apart, how many flipped and how many tied."""

    pairs: int
    flips: int
    ties: int
    tau: float
    """Kendall's tau-b; NaN where one of the two has no order at all."""


def order(exact: Sequence[float], measured: Sequence[float]) -> Order:
    """Compares two lists of numbers for the same rows, pair by pair."""
    signs = [
        (sign(exact[i] - exact[j]), sign(measured[i] - measured[j])) for i, j in combinations(range(len(exact)), 2)
    ]
    told = [(x, y) for x, y in signs if x]
    agreement = sum(x * y for x, y in signs)
    untied = math.sqrt(len(told) * sum(y != 0 for _, y in signs))
    flips, ties = sum(x == -y for x, y in told), sum(y == 0 for _, y in told)
    return Order(len(told), flips, ties, agreement / untied if untied else math.nan)


def sign(x: float) -> int:
    """-1, 0 or 1."""
    return (x > 0) - (x < 0)


def changed_rewards(exact: Sequence[float], measured: Sequence[float]) -> int:
    """Rows of a group whose reward, the rank of minus the score, is not that of the exact scores."""
    right, got = (rank(-torch.tensor([scores], dtype=torch.float64))[0] for scores in (exact, measured))
    return int(((right - got).abs() > 1e-9).sum())


def summary(groups: Sequence[Measured]) -> dict[str, float]:
    """Every number of a table row; shares lie in [0, 1], tau is the mean over the groups that have one."""
    errors = [m / e - 1 for g in groups for e, m in zip(g.exact, g.norms, strict=True)]
    plain = [order(g.exact, g.norms) for g in groups]
    scaled = [order(g.exact_scores, g.scores) for g in groups]
    changed = [changed_rewards(g.exact_scores, g.scores) for g in groups]
    result = {
        "median_error": median(map(abs, errors)),
        "max_error": max(map(abs, errors)),
        "bias": fmean(errors),
    }
    for suffix, orders in (("", plain), ("_sqrt_t", scaled)):
        pairs = sum(o.pairs for o in orders)
        result[f"flips{suffix}"] = sum(o.flips for o in orders) / pairs
        result[f"ties{suffix}"] = sum(o.ties for o in orders) / pairs
        result[f"tau{suffix}"] = fmean(o.tau for o in orders if not math.isnan(o.tau))
    result["changed_rewards"] = sum(changed) / len(errors)
    result["changed_groups"] = sum(c > 0 for c in changed) / len(groups)
    return result


# Variants -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way of computing the norms."""

    name: str
    weights: torch.dtype
    method: str = "loop"
    autocast: bool = False
    accumulation: str = "float32"
    padded: bool = False
    """Row by row with the batch's padding in place, as the official code does."""
    projections: int | None = None
    """Of the sketch; each group has a seed of its own."""


@dataclass(frozen=True)
class Measured:
    """One group under one variant: norms, and norms times √T, beside the exact ones."""

    exact: list[float]
    norms: list[float]
    exact_scores: list[float]
    scores: list[float]


def variants() -> list[Variant]:
    """All of them; the sketch where the library has one."""
    half, single, own = torch.bfloat16, torch.float32, "gradient_dtype"
    rows = [
        Variant("bf16, autocast, official sums, padded", half, autocast=True, accumulation=own, padded=True),
        Variant("bf16, autocast, official sums", half, autocast=True, accumulation=own),
        Variant("bf16, official sums", half, accumulation=own),
        Variant("bf16, float32 sums", half),
        Variant("bf16, batched", half, "batched"),
        Variant("fp32, autocast, official sums", single, autocast=True, accumulation=own),
        Variant("fp32, autocast, float32 sums", single, autocast=True),
        Variant("fp32, autocast, batched", single, "batched", autocast=True),
        Variant("fp32, official sums", single, accumulation=own),
        Variant("fp32, loop", single),
        Variant("fp32, batched", single, "batched"),
    ]
    if "sketch" in get_args(Method):
        rows += [Variant("bf16, sketch, 32 projections", half, "sketch", projections=32)]
        rows += [Variant(f"fp32, sketch, {k} projections", single, "sketch", projections=k) for k in (8, 32, 128)]
    return rows


class Widened(TorchFunctionMode):
    """Conversions to float32 become conversions to float64.

    transformers computes norms and rotary angles in float32 whatever the model's dtype; a float64 reference must not.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        return func(*map(self.wide, args), **{key: self.wide(x) for key, x in (kwargs or {}).items()})

    @staticmethod
    def wide(x: Any) -> Any:
        return torch.float64 if x is torch.float32 else x


def exact_norms(model64: nn.Module, group: Group) -> list[float]:
    """The reference, for a model whose parameters are float64."""
    with Widened():
        return stripped_norms(model64, group, method="loop", accumulation="float32")


def stripped_norms(model: nn.Module, group: Group, **options: Any) -> list[float]:
    """The library's norms of the group's rows."""
    rows = Rollouts.from_token_ids(
        [group.prompt] * len(group.completions), group.completions, group_size=len(group.completions), pad_token_id=0
    )
    masks = rows.attention_mask_BL, rows.completion_mask_BL
    return sequence_grad_norms(model, rows.input_ids_BL, *masks, self_check=False, **options).tolist()


def padded_norm(
    model: nn.Module, prompt: list[int], completion: list[int], left: int, right: int, accumulation: Any
) -> float:
    """The norm of one row with so much padding on its sides."""
    ids = torch.tensor([[0] * left + prompt + completion + [0] * right])
    attention = torch.zeros_like(ids)
    end = ids.shape[1] - right
    attention[:, left:end] = 1
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[
        0, end - len(completion) - 1 : end - 1
    ]
    logps_T = logits.float().log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])
    return gradient_norm(list(torch.autograd.grad(-logps_T.mean(), list(model.parameters()))), accumulation).item()


def autocast(on: bool) -> Any:
    """bfloat16 autocast, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


def measure(
    model: nn.Module, groups: Sequence[Group], exact: Sequence[list[float]], variant: Variant
) -> list[Measured]:
    """The groups under one variant; `model` has the variant's weights."""
    prompt_width = max(len(g.prompt) for g in groups)
    width = max(len(c) for g in groups for c in g.completions)
    results = []
    for seed, (group, reference) in enumerate(zip(groups, exact, strict=True)):
        options: dict[str, Any] = (
            {} if variant.projections is None else {"projections": variant.projections, "seed": seed}
        )
        with autocast(variant.autocast):
            if variant.padded:
                left = prompt_width - len(group.prompt)
                norms = [
                    padded_norm(model, group.prompt, c, left, width - len(c), variant.accumulation)
                    for c in group.completions
                ]
            else:
                options |= {"method": variant.method, "accumulation": variant.accumulation}
                norms = stripped_norms(model, group, **options)
        # The official code multiplies by √T in the gradients' dtype too.
        dtype = variant.weights if variant.accumulation == "gradient_dtype" else torch.float32
        scores = torch.tensor(norms, dtype=dtype) * torch.tensor(group.roots, dtype=dtype)
        results.append(Measured(reference, norms, times(reference, group.roots), scores.double().tolist()))
    return results


def padding_effect(model: nn.Module, groups: Sequence[Group], variant: Variant) -> dict[str, float]:
    """Norms of each group's first completion under all PADDINGS: spread (max/min - 1), and share of unequal pairs."""
    spreads, unequal = [], []
    for group in groups:
        with autocast(variant.autocast):
            norms = [
                padded_norm(model, group.prompt, group.completions[0], *sides, variant.accumulation)
                for sides in PADDINGS
            ]
        spreads.append(max(norms) / min(norms) - 1)
        unequal += [x != y for x, y in combinations(norms, 2)]
    return {"median_spread": median(spreads), "max_spread": max(spreads), "unequal": fmean(unequal)}


def quantities(model: nn.Module, group: Group) -> dict[str, list[float]]:
    """Cheaper numbers for the same rows, which are not the norm over all parameters; float32.

    "output head" is the norm over that matrix alone as a forward pass gives it, hidden states held fixed.
    """
    numbers: dict[str, list[float]] = {"mean NLL": [], "output head": []}
    matrix = model.get_output_embeddings()
    for completion in group.completions:
        ids = torch.tensor([group.prompt + completion])
        with torch.no_grad():
            hidden_Th = model.get_decoder()(ids, use_cache=False).last_hidden_state[0, len(group.prompt) - 1 : -1]
        logps_TV = matrix(hidden_Th).log_softmax(-1)
        nll = -logps_TV.gather(-1, torch.tensor(completion)[:, None]).mean()
        numbers["mean NLL"].append(nll.item())
        numbers["output head"].append(gradient_norm(list(torch.autograd.grad(nll, [matrix.weight])), "float32").item())
    for k in (1, 2):
        numbers[f"last_{k}"] = stripped_norms(model, group, method="loop", parameters=f"last_{k}")
    return numbers


def quantity_orders(
    model: nn.Module, groups: Sequence[Group], exact: Sequence[list[float]]
) -> dict[str, dict[str, float]]:
    """Mean tau-b of each quantity with the norm, and of each times √T with VIGOR's score."""
    found = [quantities(model, group) for group in groups]
    results = {}
    for name in found[0]:
        plain = [order(e, q[name]) for e, q in zip(exact, found, strict=True)]
        scaled = [
            order(times(e, g.roots), times(q[name], g.roots)) for e, q, g in zip(exact, found, groups, strict=True)
        ]
        results[name] = {
            "tau": fmean(o.tau for o in plain if not math.isnan(o.tau)),
            "tau_sqrt_t": fmean(o.tau for o in scaled if not math.isnan(o.tau)),
        }
    return results


def times(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Entry by entry."""
    return [a * b for a, b in zip(x, y, strict=True)]


def study(model: nn.Module, groups: Sequence[Group], n_padding: int) -> dict[str, Any]:
    """All variants on one setting, and the effect of padding on the first `n_padding` groups."""
    exact = [exact_norms(cast(model, torch.float64), group) for group in groups]
    models = {dtype: cast(model, dtype) for dtype in (torch.bfloat16, torch.float32)}
    rows, padding = {}, {}
    for variant in variants():
        rows[variant.name] = summary(measure(models[variant.weights], groups, exact, variant))
        if variant.name in PADDED:
            padding[variant.name] = padding_effect(models[variant.weights], groups[:n_padding], variant)
    scores = [times(e, g.roots) for e, g in zip(exact, groups, strict=True)]
    return {
        "groups": len(groups),
        "group_size": len(groups[0].completions),
        "tensors": len(list(model.parameters())),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": fmean(len(c) for g in groups for c in g.completions),
        "cv": fmean(pstdev(e) / fmean(e) for e in exact),
        "cv_sqrt_t": fmean(pstdev(s) / fmean(s) for s in scores),
        "variants": rows,
        "padding": padding,
        "quantities": quantity_orders(models[torch.float32], groups, exact),
    }


# Report ---------------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Markdown lines: for each setting the variants, then the effect of padding."""
    for name, result in results.items():
        yield f"## {name}"
        yield ""
        yield (
            f"{result['groups']} groups of {result['group_size']}, {result['tokens']:.0f} tokens a completion on "
            f"average; model of {result['tensors']} tensors, {result['parameters'] / 1e6:.1f} M parameters. Norms vary "
            f"by {100 * result['cv']:.0f} % within a group, with √T by {100 * result['cv_sqrt_t']:.0f} %."
        )
        yield ""
        yield (
            "| variant | median error | max error | bias | flipped | tied | tau-b | with √T: flipped | tied | tau-b | "
            "rewards changed |"
        )
        yield "|---|" + "---:|" * 10
        for variant, r in result["variants"].items():
            cells = [error(r["median_error"]), error(r["max_error"]), error(r["bias"])]
            for suffix in ("", "_sqrt_t"):
                cells += [share(r["flips" + suffix]), share(r["ties" + suffix]), f"{r['tau' + suffix]:.4f}"]
            yield f"| {variant} | " + " | ".join([*cells, share(r["changed_rewards"])]) + " |"
        yield ""
        yield "| one completion, different padding | median spread | max spread | pairs that differ |"
        yield "|---|---:|---:|---:|"
        for variant, r in result["padding"].items():
            yield f"| {variant} | {error(r['median_spread'])} | {error(r['max_spread'])} | {share(r['unequal'])} |"
        yield ""
        yield "| another quantity | tau-b with the norm | both with √T |"
        yield "|---|---:|---:|"
        for quantity, r in result["quantities"].items():
            yield f"| {quantity} | {r['tau']:.2f} | {r['tau_sqrt_t']:.2f} |"
        yield ""


def error(x: float) -> str:
    """A relative error, such as 1.2e-03."""
    return "0" if x == 0 else f"{x:.1e}"


def share(x: float) -> str:
    """Percent."""
    return f"{100 * x:.1f} %"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", type=int, default=8, help="groups of eight a setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--seed", type=int, default=0, help="of the samples, the random weights and the random tokens")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix: .md and .json are written")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    torch.set_num_threads(1)

    results = {}
    for name in args.settings:
        model, groups = SETTINGS[name](args.groups, args.seed)
        results[name] = study(model, groups, n_padding=min(8, len(groups)))
        print("\n".join(tables({name: results[name]})), flush=True)
    facts = environment()
    lines = [
        "# Precision of gradient norms",
        "",
        f"Made by `python {facts['command']}` on {facts['date'][:10]}: seed {args.seed}, {facts['cpu_count']} CPU "
        f"cores, one thread, torch {facts['packages']['torch']}, transformers {facts['packages']['transformers']}.",
        "",
        *(__doc__ or "").strip().splitlines()[4:],
        "",
        "Variants: dtype of the weights; bfloat16 autocast or not; sums in float32 and wider or, as in the official "
        "code, in the gradients' dtype; padded: the batch's padding left in place, as there, otherwise stripped. "
        f"Padding of one completion: {len(PADDINGS)} paddings of 0 to 16 tokens on the left and 0 to 29 on the right. "
        "Other quantities, in float32: the mean NLL, the norm over the output head alone as a forward pass gives it "
        "(hidden states held fixed), and the norm over the last layers (`parameters=`).",
        "",
        *tables(results),
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n", "utf-8")
    report = {"environment": facts, "groups": args.groups, "seed": args.seed, "results": results}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
