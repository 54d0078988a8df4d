"""Every chosen signal of every completion, a batch of like lengths at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from vigor.data import encode_prompt
from vigor.rewards import METHODS, get
from vigor.rewards.base import Reward, unshaped
from vigor.rollouts import Rollouts
from vigor.scoring.rows import Sample
from vigor.signals import PolicyPass

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

WINDOW = 32
"""Batches that are sorted by length together; also what a killed run may lose."""


def check_signals(names: Sequence[str], columns: Iterable[str] | None = None) -> list[Reward]:
    """The rewards of these names, fit for completions that exist already.

    Args:
        names: specs as for `vigor.rewards.get`.
        columns: what the rows have; None checks no columns.

    Raises:
        ValueError: an unknown name, one given twice, one that needs what only a training has (a teacher, a paired
            prompt), or a column that is missing.
    """
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--signals names {', '.join(repeated)} more than once.")
    if not names:
        raise ValueError(f"name at least one signal of: {', '.join(METHODS)}.")
    rewards = [get(name) for name in names]
    for reward in rewards:
        if reward.teacher is not None or "twin" in reward.needs:
            raise ValueError(
                f"signal {reward.name!r} needs completions that only a training samples (a teacher's, or those of "
                "another wording of the prompt): leave it out."
            )
        for column in reward.columns:
            if columns is not None and column not in columns:
                raise ValueError(
                    f"signal {reward.name!r} reads the column {column!r}, which not every row has. Add it, name it "
                    "with --answer_column, or leave the signal out."
                )
    return rewards


def score_completions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Sample],
    signals: Sequence[str],
    *,
    temperature: float = 1.0,
    batch_size: int = 16,
    window: int = WINDOW,
) -> Iterator[tuple[Sample, list[dict[str, float]]]]:
    """Scores of each row's completions by each signal, in the order of the rows, a window of them in memory.

    A score is what a reward computes of one completion before it is shaped within its group: higher is better, and NaN
    says that the signal has no opinion. Signals that compare completions (`majority_vote`, `empo`) compare those of a
    row, and of neighbouring rows with the same prompt. A completion's text is tokenised again and closed by an EOS
    (unless the row says that it was truncated), which need not give the tokens that were sampled. Neither batches nor
    windows change a score beyond float rounding.

    Args:
        model: causal language model; the scores are those under this model.
        tokenizer: its tokenizer.
        rows: prompts and completions.
        signals: names of `vigor methods`, with options as in "vigor(parameters=lora)".
        temperature: divides the logits: that of sampling.
        batch_size: completions scored together.
        window: batches sorted by length together.

    Yields:
        (row, one dictionary of signal -> score for each of its completions).

    Raises:
        ValueError: see `check_signals`; a temperature, batch size or window that is not positive.
        FloatingPointError: the model gives a completion that has tokens a score of NaN or infinity.
    """
    if not (temperature > 0 and batch_size > 0 and window > 0):
        raise ValueError(
            f"score_completions: temperature ({temperature}), batch_size ({batch_size}) and window ({window}) must be "
            "positive."
        )
    rewards = check_signals(signals)
    comparing = [reward for reward in rewards if "group" in reward.needs]
    alone = [reward for reward in rewards if "group" not in reward.needs]
    units = _groups(rows) if comparing else ([row] for row in rows)
    for part in _windows(units, batch_size * window):
        samples = [sample for group in part for sample in group]
        flat = [(sample, text) for sample in samples for text in sample.completions]
        found: list[dict[str, float]] = [{} for _ in flat]
        rollouts = rollouts_of(tokenizer, flat, group_size=1, device=next(model.parameters()).device)
        order = sorted(range(len(flat)), key=lambda b: int(rollouts.attention_mask_BL[b].sum()))
        for start in range(0, len(order) if alone else 0, batch_size):
            chosen = order[start : start + batch_size]
            batch = rollouts_of(tokenizer, [flat[b] for b in chosen], group_size=1, device=rollouts.input_ids_BL.device)
            for b, scores in zip(chosen, _scores(model, tokenizer, batch, alone, temperature), strict=True):
                found[b].update(scores)
        first = 0
        for group in part if comparing else []:
            size = sum(len(sample.completions) for sample in group)
            whole = rollouts_of(
                tokenizer, flat[first : first + size], group_size=size, device=rollouts.input_ids_BL.device
            )
            for b, scores in enumerate(_scores(model, tokenizer, whole, comparing, temperature), start=first):
                found[b].update(scores)
            first += size
        done = iter(found)
        for sample in samples:
            scores_of_row = list(islice(done, len(sample.completions)))
            yield sample, [{reward.name: scores[reward.name] for reward in rewards} for scores in scores_of_row]


def rollouts_of(
    tokenizer: PreTrainedTokenizerBase, flat: Sequence[tuple[Sample, str]], *, group_size: int, device: Any
) -> Rollouts:
    """(row, completion) pairs as rollouts: prompt, completion, EOS."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    prompts: dict[int, list[int]] = {}
    for sample, _ in flat:
        if id(sample) not in prompts:
            prompts[id(sample)] = encode_prompt(tokenizer, sample.prompt)
    ids = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], *([] if sample.truncated else eos)]
        for sample, text in flat
    ]
    names = dict.fromkeys(name for sample, _ in flat for name in sample.columns)
    return Rollouts.from_token_ids(
        [prompts[id(sample)] for sample, _ in flat],
        ids,
        group_size=group_size,
        pad_token_id=pad,
        device=device,
        prompts=[sample.prompt for sample, _ in flat],
        completions=[text for _, text in flat],
        columns={name: [sample.columns.get(name) for sample, _ in flat] for name in names},
        truncated_B=torch.tensor([sample.truncated for sample, _ in flat], device=device),
    )


def _scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Rollouts,
    rewards: Sequence[Reward],
    temperature: float,
) -> list[dict[str, float]]:
    """One dictionary a row, from one pass over the policy."""
    policy = PolicyPass(
        model,
        rollouts,
        temperature=temperature,
        micro_batch=len(rollouts),
        tokenizer=tokenizer,
        needs=frozenset().union(*(reward.needs for reward in rewards)),
    )
    # Unshaped, a reward is its score, and calling it refuses what is not finite.
    columns = {reward.name: replace(reward, shape=unshaped)(rollouts, policy).tolist() for reward in rewards}
    return [{name: values[b] for name, values in columns.items()} for b in range(len(rollouts))]


def _groups(rows: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Neighbouring rows with the same prompt."""
    group: list[Sample] = []
    for sample in rows:
        if group and sample.prompt != group[0].prompt:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _windows(groups: Iterable[list[Sample]], size: int) -> Iterator[list[list[Sample]]]:
    """Whole groups, until they hold `size` completions."""
    part: list[list[Sample]] = []
    held = 0
    for group in groups:
        part.append(group)
        held += sum(len(sample.completions) for sample in group)
        if held >= size:
            yield part
            part, held = [], 0
    if part:
        yield part
