"""Rows of the common table: signals of the policy itself (family F1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from statistics import stdev
from types import SimpleNamespace
from typing import Any

import torch
from models import EOS, VOCABULARY, Sample, naive_logps
from rewards_table import (
    TEMPERATURE,
    Completion,
    Row,
    average_ranks,
    by_row,
    in_groups,
    mean,
    slow_logps,
    slow_norm,
    slow_tokens,
)
from torch import nn


def slow_vigor(model: nn.Module, completion: Completion) -> float:
    return -math.sqrt(len(completion.sample.counted)) * slow_norm(model, completion)


def entropies(model: nn.Module, completion: Completion) -> list[float]:
    return [-math.fsum(math.exp(x) * x for x in logp.tolist()) for logp in slow_logps(model, completion)]


def slow_focal_entropy(model: nn.Module, completion: Completion) -> float:
    return slow_vigor(model, completion) * (mean(entropies(model, completion)) + 1e-6) ** -0.5


def slow_focal_p_norm(model: nn.Module, completion: Completion) -> float:
    mean_prob = mean([math.exp(x) for x in slow_tokens(model, completion)])
    return slow_vigor(model, completion) * (max(1 - mean_prob, 1e-6) ** 0.1 if mean_prob > 0.05 else 1.0)


def slow_focal_target(model: nn.Module, completion: Completion) -> float:
    base = mean(entropies(model, completion)) + 1e-6
    return slow_vigor(model, completion) * (base**-2 if base < 2.9 else 1.0)


@cache
def slow_head(model: nn.Module, completion: Completion) -> float:
    """‖Σ_t δ_t h_tᵀ‖/T from a copy of the model whose output matrix is its own."""
    model = copy.deepcopy(model).double().eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    sample = completion.sample
    logps = naive_logps(model, sample, TEMPERATURE)
    nll = -sum(logp[sample.ids[t]] for logp, t in zip(logps, sample.counted, strict=True)) / len(logps)
    (gradient,) = torch.autograd.grad(nll, [model.lm_head.weight])
    return -math.sqrt(len(logps)) * math.sqrt(math.fsum(x**2 for x in gradient.flatten().tolist()))


def slow_logit_gradient(model: nn.Module, completion: Completion) -> float:
    """From the definition: the gradient of the mean NLL with respect to each logit."""
    squares, sample = [], completion.sample
    distributions = slow_logps(model, completion)
    for logp, t in zip(distributions, sample.counted, strict=True):
        for v, x in enumerate(logp.tolist()):
            squares.append(((math.exp(x) - (v == sample.ids[t])) / len(distributions)) ** 2)
    return -math.sqrt(len(distributions)) * math.sqrt(math.fsum(squares))


def slow_self_certainty(model: nn.Module, completion: Completion) -> float:
    return mean([mean([-math.log(VOCABULARY) - x for x in logp.tolist()]) for logp in slow_logps(model, completion)])


@torch.no_grad()
def slow_legacy_shift(model: nn.Module, completion: Completion) -> float:
    """The distributions at the counted tokens' own positions, as in the open-r1 code."""
    sample = completion.sample
    logits = copy.deepcopy(model).double().eval()(input_ids=torch.tensor([sample.ids])).logits[0] / TEMPERATURE
    certainties = [math.log(math.fsum(math.exp(z) for z in row)) - mean(row) for row in logits.tolist()]
    return mean([certainties[t] for t in sample.counted]) - math.log(VOCABULARY)


def slow_sar(model: nn.Module, completion: Completion) -> float:
    sample = completion.sample
    start = [EOS] if not completion.prompt else [EOS, 30, 31]
    alone = Completion(Sample(start, sample.completion, sample.holes), completion.text)
    given, without = (math.exp(-mean(slow_tokens(model, c))) for c in (completion, alone))
    return max((without - given) / (without + 1e-9), -1.0)


TOKENIZER = SimpleNamespace(bos_token_id=None, eos_token_id=EOS)
"""All that `sar` asks of a tokenizer where prompts are plain text."""

PerToken = Callable[[list[float], int], float]
"""(a token's log-probabilities, the token's id) -> a number."""


def token_mean(value: PerToken) -> Callable[[nn.Module, Completion], float]:
    def slow(model: nn.Module, completion: Completion) -> float:
        sample = completion.sample
        distributions = slow_logps(model, completion)
        pairs = zip(distributions, sample.counted, strict=True)
        return mean([value(logp.tolist(), sample.ids[t]) for logp, t in pairs])

    return slow


def two_largest(logp: list[float]) -> float:
    first, second = sorted(logp, reverse=True)[:2]
    return math.exp(first) - math.exp(second)


@in_groups
def zscores(group: list[float]) -> list[float]:
    spread = stdev(group) if len(set(group)) > 1 else 0.0
    return [(x - mean(group)) / (spread + 1e-4) for x in group]


@in_groups
def against_the_others(group: list[float]) -> list[float]:
    return [x - mean(group[:i] + group[i + 1 :]) if len(group) > 1 else 0.0 for i, x in enumerate(group)]


@in_groups
def ranks_unless_alike(group: list[float]) -> list[float]:
    ranks = [2 * (sum(y < x for y in group) + (sum(y == x for y in group) - 1) / 2) / (len(group) - 1) - 1
             for x in group] if len(group) > 1 else [0.0]  # fmt: skip
    return ranks if len(group) > 1 and stdev(group) / abs(mean(group)) >= 0.3 else [0.0] * len(group)


def ranked(slow: Callable[[nn.Module, Completion], float], **others: Any) -> Row:
    return Row(by_row(slow), shape=average_ranks, **{"bfloat16": 0.1, **others})


ROWS = {
    "vigor": ranked(slow_vigor),
    "vigor(min_spread=0.3)": Row(by_row(slow_vigor), shape=ranks_unless_alike, bfloat16=0.1),
    "vigor_no_sqrt": ranked(lambda model, completion: -slow_norm(model, completion)),
    "vigor_zscore": Row(by_row(slow_vigor), shape=zscores, tolerance=1e-5, bfloat16=0.1),
    "vigor_raw": Row(by_row(slow_vigor), bfloat16=0.1),
    "vigor_focal": ranked(slow_focal_entropy),
    "vigor_focal(metric=p_norm, exponent=0.1, target=0.05)": ranked(slow_focal_p_norm),
    "vigor_focal(exponent=-2, target=2.9)": ranked(slow_focal_target),
    "head_grad_norm": ranked(slow_head),
    "logit_grad_norm": ranked(slow_logit_gradient),
    "self_certainty": Row(by_row(slow_self_certainty), bfloat16=0.1),
    "self_certainty(legacy_shift=True)": Row(by_row(slow_legacy_shift), bfloat16=0.1),
    "entropy": Row(by_row(lambda model, completion: -mean(entropies(model, completion))), bfloat16=0.1),
    "em_rl_token": Row(
        by_row(lambda model, completion: -math.fsum(entropies(model, completion))),
        shape=against_the_others,
        tolerance=1e-5,
        bfloat16=0.1,
    ),
    "em_rl_sequence": Row(
        by_row(lambda model, completion: math.fsum(slow_tokens(model, completion))),
        shape=against_the_others,
        tolerance=1e-5,
        bfloat16=0.1,
    ),
    "sar": Row(by_row(slow_sar), options={"tokenizer": TOKENIZER}, bfloat16=0.2),
    "logprob": ranked(lambda model, completion: mean(slow_tokens(model, completion))),
    "logprob_sum": ranked(lambda model, completion: math.fsum(slow_tokens(model, completion))),
    "logprob_min": ranked(lambda model, completion: min(slow_tokens(model, completion))),
    "mean_prob": ranked(token_mean(lambda logp, token: math.exp(logp[token]))),
    "max_prob": ranked(token_mean(lambda logp, token: math.exp(max(logp)))),
    "margin": ranked(token_mean(lambda logp, token: two_largest(logp)), bfloat16=0.3),
    "collision": ranked(token_mean(lambda logp, token: math.fsum(math.exp(2 * x) for x in logp))),
    "token_rank": ranked(token_mean(lambda logp, token: -math.log(1 + sum(x > logp[token] for x in logp)))),
}
