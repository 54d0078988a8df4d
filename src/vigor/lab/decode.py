"""Greedy decoding and sampling for many short prompts at once, without touching any global random state.

All completions of a prompt share one prefill, greedy and sampled rows run side by side, and rows that have stopped
leave the batch: on a CPU that is several times faster than `generate`, and it reads the entropies off on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Dropping rows copies the key-value cache: worth it once this share of the rows has stopped.
_DROP_SHARE = 0.15


@dataclass(frozen=True)
class Completion:
    """One completion: its text without special tokens, and its token ids, with the EOS where it stopped by itself.

    ``entropy`` is the sum over its tokens of the entropy of the next-token distribution at the sampling temperature,
    in nats.
    """

    text: str
    token_ids: tuple[int, ...]
    entropy: float


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    n_samples: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[Completion]]:
    """For each prompt one greedy completion, then ``n_samples`` sampled from the whole distribution.

    ``generator`` lives on the model's device. The model is used in the mode it is in.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    width, device = n_samples + 1, model.device
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(len(ids) for ids in encoded)
    input_ids_PL = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in encoded], device=device)
    mask_PL = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded], device=device)
    positions_PL = (mask_PL.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=input_ids_PL, attention_mask=mask_PL, position_ids=positions_PL, use_cache=True)
    cache = output.past_key_values
    cache.batch_repeat_interleave(width)
    logits_BV = output.logits[:, -1].repeat_interleave(width, 0)
    mask_BL = mask_PL.repeat_interleave(width, 0)
    position_B = (positions_PL[:, -1] + 1).repeat_interleave(width)
    row_B = torch.arange(len(prompts) * width, device=device)

    tokens = torch.full((len(row_B), max_new_tokens), pad, device=device)
    length = torch.zeros(len(row_B), dtype=torch.long, device=device)
    entropy = torch.zeros(len(row_B), device=device)
    stopped = torch.zeros(len(row_B), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        logps_BV = (logits_BV.float() / temperature).log_softmax(-1)
        probs_BV = logps_BV.exp()
        next_B = torch.multinomial(probs_BV, 1, generator=generator)[:, 0]
        next_B = torch.where(row_B % width == 0, logps_BV.argmax(-1), next_B)
        live = ~stopped[row_B]
        tokens[row_B[live], step] = next_B[live]
        length[row_B[live]] += 1
        entropy[row_B[live]] -= (probs_BV * logps_BV).sum(-1)[live]
        stopped[row_B[live]] = next_B[live] == eos
        live = ~stopped[row_B]
        n_live = int(live.sum())
        if n_live == 0 or step == max_new_tokens - 1:
            break
        if n_live < (1 - _DROP_SHARE) * len(row_B):
            keep = live.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            next_B, row_B, position_B, mask_BL = next_B[keep], row_B[keep], position_B[keep], mask_BL[keep]
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(row_B), 1)], dim=1)
        output = model(
            input_ids=next_B[:, None],
            attention_mask=mask_BL,
            position_ids=position_B[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits_BV, cache, position_B = output.logits[:, -1], output.past_key_values, position_B + 1

    ids = [tuple(row[:n]) for row, n in zip(tokens.tolist(), length.tolist(), strict=True)]
    texts = tokenizer.batch_decode([list(row) for row in ids], skip_special_tokens=True)
    rows = [Completion(text, row, h) for text, row, h in zip(texts, ids, entropy.tolist(), strict=True)]
    return [rows[start : start + width] for start in range(0, len(rows), width)]
