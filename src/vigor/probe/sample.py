"""Groups of completions, sampled as training samples them: the whole distribution at one temperature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vigor.data import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Group:
    """The completions of one prompt."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    """With the EOS where it stopped by itself."""
    texts: list[str]
    truncated: list[bool]


def sample_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    num_generations: int,
    max_completion_length: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> Iterator[Group]:
    """`num_generations` completions of each prompt, from the seed alone: no global random state is touched.

    `batch_size` counts completions; whole groups are sampled together.
    """
    import torch
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_completion_length,
        num_return_sequences=num_generations,
        pad_token_id=pad,
        eos_token_id=ends or None,
    )
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    step = max(1, batch_size // num_generations)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(encoded), step):
            part = encoded[start : start + step]
            longest = max(map(len, part))
            ids = torch.tensor([[pad] * (longest - len(row)) + row for row in part], device=model.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in part], device=model.device)
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
            for i, prompt_ids in enumerate(part):
                own = [_until_end(row, ends) for row in made[i * num_generations : (i + 1) * num_generations]]
                yield Group(
                    prompt_ids,
                    own,
                    tokenizer.batch_decode(own, skip_special_tokens=True),
                    [not row or row[-1] not in ends for row in own],
                )


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    at = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: at + 1]
