"""The probe: sample groups, score them by every signal in one pass, and put the statistics together."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vigor.probe import statistics as st
from vigor.probe.forecast import forecast
from vigor.probe.sample import Group, sample_groups
from vigor.rewards import get
from vigor.rewards.accuracy import final_answer
from vigor.rewards.agreement import boxed_answer, cluster
from vigor.rewards.base import Reward, unshaped
from vigor.rewards.math_equal import MathVerifier
from vigor.rollouts import Rollouts
from vigor.signals import PolicyPass

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIGNALS = ("vigor", "logprob", "self_certainty", "entropy")
NOISE_PROMPTS = 8
"""Prompts whose completions are scored a second time, in another precision."""


def probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    signals: Sequence[str] = SIGNALS,
    *,
    num_generations: int = 16,
    max_completion_length: int = 512,
    temperature: float = 1.0,
    batch_size: int = 64,
    noise_prompts: int = NOISE_PROMPTS,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Samples groups on the prompts and says what the signals make of them. Nothing is trained.

    Args:
        model: the policy, in eval mode.
        tokenizer: its tokenizer.
        rows: each with `prompt`, with `answer` where it is known (None where not), and with any other columns.
        signals: names of `vigor methods`.
        num_generations: completions of a prompt, 2 or more.
        max_completion_length: tokens.
        temperature: of sampling and scoring.
        batch_size: completions sampled and scored together (whole groups).
        noise_prompts: how many prompts to score again in another precision; 0 leaves it out.
        seed: of the samples.
        progress: whether to draw a bar.

    Returns:
        What `vigor probe --out` writes: plain numbers, NaN as None.

    Raises:
        ValueError: fewer than 2 completions a prompt, no prompts, or an unknown signal.
        FloatingPointError: the model gives a completion a score that is not finite.
    """
    if num_generations < 2 or not rows:
        raise ValueError(
            f"probe: {len(rows)} prompts with {num_generations} completions each leave nothing to compare; give at "
            "least one prompt and 2 completions."
        )
    rewards = [replace(get(name), shape=unshaped) for name in signals]
    sampled = sample_groups(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        num_generations=num_generations,
        max_completion_length=max_completion_length,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
    )
    groups: list[Group] = []
    scores: dict[str, list[Tensor]] = {reward.name: [] for reward in rewards}
    entropies = []
    with closing(tqdm(total=len(rows), unit="prompt", disable=not progress)) as bar:
        step = max(1, batch_size // num_generations)
        for group in sampled:
            groups.append(group)
            bar.update()
            if len(groups) % step and len(groups) < len(rows):
                continue
            at = range((len(groups) - 1) // step * step, len(groups))
            policy = _policy(model, tokenizer, [rows[i] for i in at], [groups[i] for i in at], rewards, temperature)
            for reward in rewards:
                scores[reward.name] += reward(policy.rollouts, policy).double().cpu().split(num_generations)
            stats = policy.token_stats("entropy")
            entropies.append(stats.mean(stats.entropy_BL).double().cpu())
    stacked = {name: torch.stack(parts) for name, parts in scores.items()}
    again = _in_other_precision(model, tokenizer, rows, groups, rewards, temperature, step, noise_prompts)
    right_PG = _right(rows, groups)
    clusters = st.number([cluster([boxed_answer(text) for text in group.texts]) for group in groups])
    facts = {
        "prompts": len(rows),
        "labelled_prompts": int((~right_PG.isnan()).any(1).sum()),
        "num_generations": num_generations,
        "max_completion_length": max_completion_length,
        "temperature": temperature,
        "seed": seed,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "noise_dtype": _other_dtype(model) if noise_prompts else None,
    }
    report = summarise(stacked, again, right_PG, clusters, _lengths(groups), facts)
    report["samples"]["entropy"] = float(torch.cat(entropies).nanmean())
    report["samples"]["truncated"] = sum(sum(g.truncated) for g in groups) / (len(groups) * num_generations)
    return _plain(report)


def summarise(
    scores: Mapping[str, Tensor],
    again: Mapping[str, Tensor],
    right_PG: Tensor,
    clusters_PG: Tensor,
    lengths_PG: Tensor,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The report from what was sampled; pure.

    Args:
        scores: (P, G) by signal.
        again: the same for the first prompts in another precision; empty where that was not asked for.
        right_PG: 1, 0, or NaN where the answer is not known.
        clusters_PG: equal numbers for equal answers, -1 for none.
        lengths_PG: tokens.
        facts: what to carry along.
    """
    group = right_PG.shape[1]
    member_PG, crowd_PG = st.majority_member(clusters_PG), st.crowd(clusters_PG)
    known_PG = torch.where(right_PG.isnan().all(), member_PG, right_PG)
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64) if k < group} | {group})
    labelled = bool((~right_PG.isnan()).any())
    found = {}
    for name, scores_PG in scores.items():
        rival = st.auc(scores_PG, right_PG, crowd_PG)
        majority = st.auc(scores_PG, member_PG, crowd_PG)
        ties = st.tie_rate(scores_PG)
        flips = st.flips(scores_PG[: len(again[name])], again[name]) if name in again else math.nan
        plain = st.auc(scores_PG, right_PG)
        found[name] = {
            "auc": plain,
            "rival_auc": rival,
            "prompts_needed": {"auc": plain.prompts_needed(), "rival_auc": rival.prompts_needed()},
            "majority_auc": st.auc(scores_PG, member_PG),
            "majority_rival_auc": majority,
            "best_of": st.best_of(scores_PG, right_PG),
            "best_of_majority": st.best_of(scores_PG, member_PG),
            "length_tau": st.mean(st.kendall(scores_PG, lengths_PG)),
            "length_tau_partial": st.mean(st.partial_kendall(scores_PG, lengths_PG, known_PG)),
            "tie_rate": ties,
            "spread": st.spread(scores_PG),
            "flip_rate": flips,
            "forecast": forecast(name, rival, majority, ties, flips),
        }
    names = list(scores)
    return {
        "facts": dict(facts),
        "samples": {
            "accuracy": st.mean(right_PG.nanmean(1)),
            "pass_at_k": {str(k): st.pass_at_k(right_PG, k) for k in ks} if labelled else {},
            "majority_at_k": {str(k): st.majority_at_k(clusters_PG, right_PG, k) for k in ks} if labelled else {},
            "answered": float((clusters_PG >= 0).double().mean()),
            "majority_share": st.mean((crowd_PG * (clusters_PG >= 0)).amax(1) / group),
            "distinct_answers": float((clusters_PG.amax(1) + 1).double().mean()),
            "length": float(lengths_PG.double().mean()),
        },
        "agreement": {a: {b: st.mean(st.kendall(scores[a], scores[b])).value for b in names} for a in names},
        "signals": found,
    }


def _policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    groups: Sequence[Group],
    rewards: Sequence[Reward],
    temperature: float,
) -> PolicyPass:
    """One pass over whole groups that serves all signals."""
    size = len(groups[0].completion_ids)
    flat = [(row, group, i) for row, group in zip(rows, groups, strict=True) for i in range(size)]
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    rollouts = Rollouts.from_token_ids(
        [group.prompt_ids for _, group, _ in flat],
        [group.completion_ids[i] for _, group, i in flat],
        group_size=size,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        device=model.device,
        prompts=[row["prompt"] for row, _, _ in flat],
        completions=[group.texts[i] for _, group, i in flat],
        columns={name: [row.get(name) for row, _, _ in flat] for name in names},
        truncated_B=torch.tensor([group.truncated[i] for _, group, i in flat], device=model.device),
    )
    needs = frozenset({"token_stats", "entropy"}).union(*(reward.needs for reward in rewards))
    return PolicyPass(
        model, rollouts, temperature=temperature, micro_batch=len(rollouts), tokenizer=tokenizer, needs=needs
    )


def _in_other_precision(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    groups: Sequence[Group],
    rewards: Sequence[Reward],
    temperature: float,
    step: int,
    prompts: int,
) -> dict[str, Tensor]:
    """Scores of the first prompts by signals that read the policy, under a copy of it in another precision."""
    chosen = [reward for reward in rewards if reward.needs & {"grad_norm", "token_stats"}]
    if not prompts or not chosen:
        return {}
    other = copy.deepcopy(model).to(getattr(torch, _other_dtype(model)))
    found: dict[str, list[Tensor]] = {reward.name: [] for reward in chosen}
    for start in range(0, min(prompts, len(groups)), step):
        at = slice(start, min(start + step, prompts, len(groups)))
        policy = _policy(other, tokenizer, rows[at], groups[at], chosen, temperature)
        for reward in chosen:
            size = policy.rollouts.group_size
            found[reward.name] += reward(policy.rollouts, policy).double().cpu().split(size)
    return {name: torch.stack(parts) for name, parts in found.items()}


def _other_dtype(model: PreTrainedModel) -> str:
    """float32 beside a model in a narrower type; bfloat16, that of most trainings, beside one in float32."""
    return "bfloat16" if next(model.parameters()).dtype in (torch.float32, torch.float64) else "float32"


def _right(rows: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> Tensor:
    """(P, G) 1 for right, 0 for wrong, NaN where no answer is known."""
    verifier = MathVerifier(timeout_s=5.0)
    values = []
    for row, group in zip(rows, groups, strict=True):
        answer = final_answer(row.get("answer"))
        found = verifier.verify(group.texts, [answer] * len(group.texts))
        values.append([math.nan if value is None else value for value in found])
    return torch.tensor(values, dtype=torch.float64)


def _lengths(groups: Sequence[Group]) -> Tensor:
    return torch.tensor([[len(ids) for ids in group.completion_ids] for group in groups], dtype=torch.float64)


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, NaN as None."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | None) else _plain(asdict(value))
