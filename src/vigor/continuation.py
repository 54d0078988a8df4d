"""How likely a text of our own is after a context of the policy's: log π(continuation | context), token by token.

Rewards put a reference answer in the place of the model's own. Where the answer's opener ends inside a token of the
completion (tokenizers merge across such boundaries: "{7" may be one token), the context keeps every sampled token that
ends at or before the cut, and the remainder of the opener is encoded together with the reference. Tokens that hold a
character of the scored text are the continuation; those before them that hold none go to the context.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vigor.gradnorm import scoring_mode
from vigor.rollouts import Rollouts, strip_padding
from vigor.signals import PolicyPass, token_stats

_ANCHOR = "\n"


class ContinuationScorer:
    """Scores continuations; values without gradient are kept, so that rewards and settings of a batch share them."""

    def __init__(self, model: nn.Module, *, temperature: float = 1.0, micro_batch: int = 16) -> None:
        """`temperature` divides the logits; `micro_batch` is the rows of one forward pass.

        Raises:
            ValueError: either is not positive.
        """
        if not (temperature > 0 and micro_batch > 0):
            raise ValueError(
                f"ContinuationScorer: temperature ({temperature}) and micro_batch ({micro_batch}) must be positive."
            )
        self.model = model
        self.temperature = temperature
        self.micro_batch = micro_batch
        self._kept: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def logps(
        self,
        contexts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        requires_grad: bool = False,
    ) -> list[Tensor]:
        """log π(continuation_j | context, continuation_<j) of every token, nats.

        Args:
            contexts: token ids, at least one a row, since something must predict the first continuation token.
            continuations: token ids, one list a context, of any length; an empty one gives an empty tensor.
            requires_grad: keeps the graph of all rows at once; nothing is then taken from or added to the cache.

        Returns:
            A (T_ref,) tensor a row on the model's device, float32 (float64 for a float64 model). Rows are batched by
            length and dropout is off. Without gradient the numbers are `vigor.signals.token_stats`'s; with it the
            log-softmax is float32.

        Raises:
            ValueError: lists of different lengths, or an empty context.
            FloatingPointError: the policy gives NaN.
        """
        if len(contexts) != len(continuations):
            raise ValueError(f"logps: {len(contexts)} contexts but {len(continuations)} continuations.")
        if empty := [i for i, context in enumerate(contexts) if not len(context)]:
            raise ValueError(f"logps: the context of row {empty[0]} is empty; give it at least one token, such as BOS.")
        rows = [(tuple(c), tuple(a)) for c, a in zip(contexts, continuations, strict=True)]
        if requires_grad:
            order = sorted(set(rows), key=lambda row: len(row[0]) + len(row[1]))
            found = dict(zip(order, self._with_graph(order), strict=True))
            return [found[row] for row in rows]
        if new := [row for row in dict.fromkeys(rows) if row not in self._kept]:
            self._kept.update(zip(new, self._without_graph(new), strict=True))
        return [self._kept[row] for row in rows]

    def _without_graph(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Tensor]:
        ids, attended, counted = self._padded(rows)
        stats = token_stats(
            self.model,
            ids,
            attended,
            counted,
            wanted=("logps",),
            temperature=self.temperature,
            micro_batch=self.micro_batch,
        )
        return self._checked([stats.logps_BL[i, len(c) : len(c) + len(a)] for i, (c, a) in enumerate(rows)])

    def _with_graph(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Tensor]:
        found: list[Tensor] = []
        with torch.enable_grad(), scoring_mode(self.model):
            for start in range(0, len(rows), self.micro_batch):
                batch = rows[start : start + self.micro_batch]
                ids, attended, counted = self._padded(batch)
                logits = self.model(input_ids=ids, attention_mask=attended, use_cache=False).logits
                at = counted[:, 1:].bool()
                logits_NV, targets_N = logits[:, :-1][at], ids[:, 1:][at]
                wide = torch.promote_types(logits_NV.dtype, torch.float32)
                logps_NV = (logits_NV.to(wide) / self.temperature).log_softmax(-1)
                logps_N = logps_NV.gather(-1, targets_N[:, None]).squeeze(-1)
                found += logps_N.split([len(a) for _, a in batch])
        return self._checked(found)

    def _padded(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L) ids, attention mask and mask of the continuation, right-padded."""
        device = next(self.model.parameters()).device
        width = max(len(c) + len(a) for c, a in rows)
        ids, attended, counted = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
        for i, (c, a) in enumerate(rows):
            ids[i, : len(c) + len(a)] = torch.tensor([*c, *a])
            attended[i, : len(c) + len(a)] = 1
            counted[i, len(c) : len(c) + len(a)] = 1
        return ids.to(device), attended.to(device), counted.to(device)

    def _checked(self, found: list[Tensor]) -> list[Tensor]:
        for i, logps in enumerate(found):
            if logps.isnan().any():
                raise FloatingPointError(
                    f"logps: the policy gives NaN for continuation {i} of {len(found)} ({len(logps)} tokens). It has "
                    "probably diverged: look at its weights, lower learning_rate, or train in float32 or bfloat16."
                )
        return found


def scorer_of(policy: PolicyPass) -> ContinuationScorer:
    """The scorer that all rewards of a batch share: at the policy's temperature, with its micro-batch."""
    return policy.keep(
        "continuation_scorer",
        lambda: ContinuationScorer(policy.model, temperature=policy.temperature, micro_batch=policy.micro_batch),
    )


def prompt_and_completion(rollouts: Rollouts) -> list[tuple[list[int], list[int]]]:
    """Token ids of each row's prompt and completion; the completion starts at the first counted token.

    What an environment or a tool wrote in the middle is part of the completion. A row without a counted token is all
    prompt.
    """
    rows = strip_padding(rollouts.input_ids_BL, rollouts.attention_mask_BL, rollouts.completion_mask_BL)
    found = []
    for row in rows:
        first = int(row.completion_L.int().argmax()) if row.completion_L.any() else len(row.ids_L)
        ids = row.ids_L.tolist()
        found.append((ids[:first], ids[first:]))
    return found


def plain(tokenizer: Any, ids: Sequence[int]) -> tuple[list[int], str]:
    """Token ids without the special tokens at their end, and their text, in which other special tokens are spelled."""
    special = set(tokenizer.all_special_ids)
    end = len(ids)
    while end and ids[end - 1] in special:
        end -= 1
    return list(ids[:end]), _decode(tokenizer, ids[:end])


def token_cut(tokenizer: Any, ids: Sequence[int], at: int) -> tuple[int, str]:
    """(n, remainder): the first n tokens hold the first characters of the text, the remainder those up to `at`.

    n is the largest number of tokens that decode to a prefix of the text that ends at character `at` or before it, so
    the remainder is not empty where a token crosses `at`.
    """
    text = _decode(tokenizer, ids)
    n = bisect_right(range(len(ids) + 1), at, key=lambda n: len(_decode(tokenizer, ids[:n]))) - 1
    # Half a character decodes to replacement signs, in number as it happens: such a prefix is none, or looks too long.
    n = min(n + 4, len(ids))
    while len(part := _decode(tokenizer, ids[:n])) > at or not text.startswith(part):
        n -= 1
    return n, text[len(part) : at]


def splice(
    tokenizer: Any, prompt: Sequence[int], completion: Sequence[int], at: int, text: str, *, unscored: str = ""
) -> tuple[list[int], list[int]]:
    """(context, continuation): the completion up to character `at` of its text, then `unscored`, then `text`.

    Args:
        tokenizer: a transformers tokenizer backed by the `tokenizers` library, whose tokens know their characters.
        prompt: token ids.
        completion: token ids without special tokens at the end; `at` counts characters of their decoded text.
        at: where the completion is cut.
        text: whose tokens are the continuation.
        unscored: what stands between the two and belongs to the context.

    Raises:
        ValueError: a tokenizer that is not backed by the `tokenizers` library.
    """
    n, remainder = token_cut(tokenizer, completion, at)
    lead = remainder + unscored
    tokens = _encode(tokenizer, lead + text)
    first = next((i for i, (_, end) in enumerate(tokens) if end > len(lead)), len(tokens))
    ids = [token for token, _ in tokens]
    return [*prompt, *completion[:n], *ids[:first]], ids[first:]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _encode(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """(token id, end of its characters) of a text that goes on from another, so that no word-start sign is added."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} does not say which characters a token holds: rewards that place "
            "a reference after the reasoning need one backed by the `tokenizers` library."
        )

    def encoded(text: str) -> list[tuple[int, int, int]]:
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(i, start, end) for i, (start, end) in zip(made["input_ids"], made["offset_mapping"], strict=True)]

    # Behind a line break no tokenizer adds the sign for the start of a text; one that merges it with what follows is
    # asked again without.
    anchored = encoded(_ANCHOR + text)
    if any(start < len(_ANCHOR) < end for _, start, end in anchored):
        return [(i, end) for i, _, end in encoded(text)]
    return [(i, end - len(_ANCHOR)) for i, start, end in anchored if start >= len(_ANCHOR)]
