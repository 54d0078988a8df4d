"""Rows of the common table: likelihood of a reference (family F3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from models import EOS, PAD, Sample
from rewards_table import TEMPERATURE, Completion, Row, in_groups, mean
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

PIECES = (
    "<pad>", "<eos>", "\\boxed{", "\\boxed", "{7", "{", "}", *"0123456789", "<answer>", "</answer>", "<think>",
    "</think>", "<answer", ">", "/", " ", "\n", "so", "it", "is", "=", "+", "x", ".", "a", "b", "-",
)  # fmt: skip
"""A vocabulary of 36 pieces, of which "{7" crosses the end of an answer's opener; the models have 37."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<pad>"))
    longest = sorted(PIECES[2:], key=len, reverse=True)
    pattern = "|".join("".join("\\" + c if not c.isalnum() else c for c in piece) for piece in longest)
    made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def tokens(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def row(prompt: list[int], *pieces: str, answer: str | None = "72", holes: tuple[int, ...] = ()) -> Completion:
    ids = tokens(*pieces)
    text = "".join(piece for piece in pieces if piece != "<eos>")
    return Completion(Sample(prompt, ids, holes=holes), text, columns={"answer": answer})


P, Q = [5, 9, 3], [4]
TAGGED = ("<think>", "a", "+", "b", "</think>", "\n", "<answer>")
REFERENCE = (
    row(P, "so", " ", "\\boxed{", "7", "2", "}", "<eos>"),
    row(P, "x", "\\boxed", "{7", "1", "}", " ", "it", "<eos>"),  # the opener ends inside a token
    row(P, "x"),
    row(P, "\\boxed{", "1", "}", "\\boxed{", "9", "}", holes=(1, 2)),
    row(Q, *TAGGED, "0", ".", "5", "</answer>", "<eos>", answer="0.5"),
    row(Q, "\\boxed{", "{", "0", "}", ".", "}", "\\boxed{", "5", answer="0.5"),  # the last box never closes
    row(Q, "a", "</think>", "<answer", ">", "\\boxed{", "5", "}", "</answer>", answer="0.5"),
    row(Q, "\\boxed{", "5", "}", answer=None),
)


def text_of(pieces: Sequence[int]) -> str:
    return "".join(PIECES[i] for i in pieces)


def encode(text: str) -> list[int]:
    """The longest piece that fits, again and again."""
    found: list[int] = []
    while text:
        found.append(max((i for i, p in enumerate(PIECES[2:], 2) if text.startswith(p)), key=lambda i: len(PIECES[i])))
        text = text[len(PIECES[found[-1]]) :]
    return found


def boxed_end(text: str) -> int | None:
    """The character after the last "\\boxed{" whose braces balance, by trying every one."""
    for start in range(len(text), -1, -1):
        if text.startswith("\\boxed{", start):
            depth = 1
            for end in range(start + 7, len(text)):
                depth += (text[end] == "{") - (text[end] == "}")
                if depth == 0:
                    return start + 7
    return None


def tags_end(text: str) -> int | None:
    rest = text.strip().removeprefix("<think>")
    parts = [rest.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    if parts != [0, 1, 1, 1] or not rest.endswith("</answer>"):
        return None
    reasoning, behind = rest.split("</think>")
    return text.index("<answer>") + 8 if behind.strip().startswith("<answer>") and "<answer" not in reasoning else None


def verifree_end(text: str) -> int | None:
    return text.index("<answer") + 7 if "<answer" in text else None


def place(
    completion: Completion, end: Callable[[str], int | None], before: str = "", after: str = "", opener: str = ""
):
    """(context, continuation) token ids, None where there is no place for the reference."""
    sample = completion.sample
    first = sample.counted[0] if sample.counted else len(sample.ids)
    prompt, ids = sample.ids[:first], sample.ids[first:]
    while ids and ids[-1] in (PAD, EOS):
        ids = ids[:-1]
    text, at = text_of(ids), end(text_of(ids))
    scored = before + completion.columns["answer"] + after
    if at is None and not opener:
        return None
    if at is None:
        return prompt + ids + encode(opener), encode(scored)
    kept = max(n for n in range(len(ids) + 1) if len(text_of(ids[:n])) <= at)
    lead = text[len(text_of(ids[:kept])) : at]
    spelled = encode(lead + scored)
    unscored = [n for n in range(len(spelled) + 1) if len(text_of(spelled[:n])) <= len(lead)][-1]
    return prompt + ids[:kept] + spelled[:unscored], spelled[unscored:]


@torch.no_grad()
def token_logps(model: nn.Module, context: list[int], continuation: list[int]) -> list[float]:
    """log π of each token in float64, one forward pass a token."""
    model, ids, found = double(model), list(context), []
    for token in continuation:
        z = model(input_ids=torch.tensor([ids])).logits[0, -1] / TEMPERATURE
        found.append(float(z[token] - z.logsumexp(0)))
        ids.append(token)
    return found


@cache
def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval()


Score = Callable[[nn.Module, Completion], float]


def known(score: Score) -> Callable[[nn.Module, Sequence[Completion]], list[float]]:
    """NaN without a reference or without a token."""

    def slow(model: nn.Module, batch: Sequence[Completion]) -> list[float]:
        return [score(model, c) if c.sample.counted and c.columns["answer"] is not None else math.nan for c in batch]

    return slow


def rlpr(end: Callable[[str], int | None], *, baseline: bool = True) -> Score:
    def score(model: nn.Module, c: Completion) -> float:
        found, prompt = place(c, end), c.sample.prompt
        probability = 0.0 if found is None else mean([math.exp(x) for x in token_logps(model, *found)])
        without = mean([math.exp(x) for x in token_logps(model, prompt, encode(c.columns["answer"]))])
        return 0.9 * max(probability - without * baseline, 0.0) + 0.1 * (found is not None)

    return score


def verifree(end: Callable[[str], int | None], before: str, after: str) -> Score:
    def score(model: nn.Module, c: Completion) -> float:
        found = place(c, end, before, after)
        return 0.0 if found is None else math.exp(math.fsum(token_logps(model, *found)))

    return score


def logprob(end: Callable[[str], int | None], opener: str, *, per_token: bool = False) -> Score:
    def score(model: nn.Module, c: Completion) -> float:
        found = token_logps(model, *place(c, end, opener=opener))
        return mean(found) if per_token else math.fsum(found)

    return score


def nover(end: Callable[[str], int | None]) -> Score:
    def score(model: nn.Module, c: Completion) -> float:
        found = place(c, end)
        if found is None:
            return 0.0
        reasoning = len(found[0]) - len(c.sample.prompt)
        perplexity = math.exp(-mean(token_logps(model, *found)) / max(1, 1 + math.log10(reasoning)))
        return 1 / perplexity

    return score


@in_groups
def leave_one_out(group: list[float]) -> list[float]:
    others = [
        math.fsum(group[:i] + group[i + 1 :]) / (len(group) - 1) if len(group) > 1 else None for i in range(len(group))
    ]
    return [0.0 if other is None else x - other for x, other in zip(group, others, strict=True)]


@in_groups
def gain_in_bound(group: list[float]) -> list[float]:
    """log of the mean of all probabilities less log of the mean of the others'."""
    found = []
    for i in range(len(group)):
        others = group[:i] + group[i + 1 :]
        top = max(group)
        whole = math.log(mean([math.exp(x - top) for x in group]))
        found.append(whole - math.log(mean([math.exp(x - top) for x in others])) if others else 0.0)
    return found


@in_groups
def ranked_share(group: list[float]) -> list[float]:
    right = [x for x in group if x > 0]
    found = []
    for x in group:
        above = sum(y > x for y in right) + (sum(y == x for y in right) - 1) / 2
        found.append(1 + (len(right) - above) / len(right) if x > 0 else 0.0)
    return found


def _row(score: Score, **others: Any) -> Row:
    options = {"tokenizer": tokenizer()}
    return Row(known(score), batch=REFERENCE, options=options, bfloat16=0.2, **others)


ROWS: dict[str, Row] = {
    "rlpr": _row(rlpr(boxed_end)),
    "rlpr(answer=tags)": _row(rlpr(tags_end)),
    "rlpr(baseline=none)": _row(rlpr(boxed_end, baseline=False)),
    "verifree": _row(verifree(boxed_end, "", "}"), shape=leave_one_out),
    "verifree(answer=tags)": _row(verifree(verifree_end, "> \\boxed{", "} </answer>"), shape=leave_one_out),
    "reference_logprob": _row(logprob(boxed_end, " \\boxed{")),
    "reference_logprob(mean=True)": _row(logprob(boxed_end, " \\boxed{", per_token=True)),
    "reference_logprob(answer=tags)": _row(logprob(tags_end, "\n<answer>")),
    # Differences of sums of tens of nats, in float32
    "jepo": _row(logprob(boxed_end, " \\boxed{"), shape=leave_one_out, tolerance=1e-5),
    "jepo(bound=group)": _row(logprob(boxed_end, " \\boxed{"), shape=gain_in_bound, tolerance=1e-5),
    "nover": _row(nover(boxed_end), shape=ranked_share),
}
