"""Makes a base model of the lab from a seed: ``python -m vigor.lab.build --world lab``.

Two stages of plain next-token training on completions: clean solutions until the model can compute, then the texts
of the world, so that it samples like a base model. Steps are counted, never seconds, and one thread adds up in one
order: the same seed on the same kind of machine gives the same file.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .corpus import CLEAN, WORLDS, Noise, Text, texts
from .tokenizer import EOS, PAD, build_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MAX_COMPLETION = 72
IGNORED = -100
_POOL = 1024


@dataclass(frozen=True)
class Stage:
    """One stage of pre-training: ``steps`` AdamW updates with a warm-up and a cosine down to a tenth of ``lr``."""

    noise: Noise
    steps: int
    lr: float
    first_text: int = 0
    """Index of the first text, so that the stages see different questions."""
    warmup: int = 100
    tokens_per_batch: int = 1024


def stages(world: str, steps: int | None = None) -> tuple[Stage, Stage]:
    """The two stages of a world; ``steps`` shortens both to that many updates."""
    clean, final = Stage(CLEAN, 3900, 2e-3), Stage(WORLDS[world], 1200, 1e-3, first_text=1_000_000)
    if steps is None:
        return clean, final
    return replace(clean, steps=steps, warmup=min(100, steps)), replace(final, steps=steps, warmup=min(100, steps))


def new_model(seed: int) -> LlamaForCausalLM:
    """A randomly initialised model of the lab's shape: 0.80 M parameters, 4 layers, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.token_to_id(PAD),
        )
    )


def batches(stage: Stage, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input ids, labels), each (B, L) int64, right-padded; prompts and padding carry the label -100.

    Texts of like length share a batch of at most ``stage.tokens_per_batch`` tokens, padding included.
    """
    tokenizer = build_tokenizer()
    pad, eos = tokenizer.token_to_id(PAD), tokenizer.token_to_id(EOS)
    shuffler = random.Random(f"batches/{seed}")
    stream = texts(stage.noise, seed, stage.first_text)
    while True:
        pool: list[Text] = list(itertools.islice(stream, _POOL))
        prompts = [encoding.ids for encoding in tokenizer.encode_batch([text.prompt for text in pool])]
        completions = [encoding.ids for encoding in tokenizer.encode_batch([text.completion for text in pool])]
        pairs = [(p, (c + [eos])[:MAX_COMPLETION]) for p, c in zip(prompts, completions, strict=True)]
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pairs:
            if (len(groups[-1]) + 1) * (len(pair[0]) + len(pair[1])) > stage.tokens_per_batch:
                groups.append([])
            groups[-1].append(pair)
        shuffler.shuffle(groups)
        for group in groups:
            length = max(len(p) + len(c) for p, c in group)
            ids = [p + c + [pad] * (length - len(p) - len(c)) for p, c in group]
            labels = [[IGNORED] * len(p) + c + [IGNORED] * (length - len(p) - len(c)) for p, c in group]
            yield torch.tensor(ids), torch.tensor(labels)


def train(model: torch.nn.Module, stage: Stage, seed: int, log_every: int = 100) -> None:
    """Run one stage on ``model`` in place, printing the loss now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    started, running = time.monotonic(), 0.0
    for step, (input_ids, labels) in enumerate(itertools.islice(batches(stage, seed), stage.steps), start=1):
        decay = 0.55 + 0.45 * math.cos(math.pi * step / stage.steps)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * min(1.0, step / stage.warmup) * decay
        # Right padding and causal attention: no completion token can see a pad, so no attention mask is needed.
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += float(loss.detach())
        if step % log_every == 0 or step == stage.steps:
            shown = running / ((step - 1) % log_every + 1)
            print(f"step {step}/{stage.steps}  loss {shown:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            running = 0.0
    model.eval()
