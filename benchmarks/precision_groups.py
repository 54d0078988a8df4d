"""The models and groups of benchmarks/precision.py.

Weights are rounded to bfloat16 first, as released checkpoints are, so that every variant has the same model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from vigor.lab.decode import complete
from vigor.lab.tasks import make_rows
from vigor.lab.world import load

GROUP = 8


@dataclass(frozen=True)
class Group:
    """Token ids of a prompt and of its completions."""

    prompt: list[int]
    completions: list[list[int]]

    @property
    def roots(self) -> list[float]:
        """√T of each completion."""
        return [math.sqrt(len(completion)) for completion in self.completions]


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with its parameters in `dtype`; buffers stay as they are, as rotary frequencies do in bf16 models."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def lab(task: str, split: str, n: int, seed: int) -> tuple[nn.Module, list[Group]]:
    """Groups sampled from the lab's base at temperature 1, for the first n questions of a split."""
    model, tokenizer = load("lab")
    model = cast(cast(model, torch.bfloat16), torch.float32)
    prompts = [row["prompt"] for row in make_rows(task, split, n)]
    sampled = complete(
        model, tokenizer, prompts, n_samples=GROUP, max_new_tokens=72, temperature=1.0,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    groups = [
        Group(ids, [list(c.token_ids) for c in completions[1:]])
        for ids, completions in zip(encoded, sampled, strict=True)
    ]
    return model, groups


def random_qwen2(
    width: int, layers: int, vocabulary: int, tied: bool, n: int, seed: int
) -> tuple[nn.Module, list[Group]]:
    """A random Qwen2 and random completions: 24 to 96 tokens out of 8 to 1,024 different ones, so that norms differ."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        intermediate_size=width * 11 // 4,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    groups = []
    for _ in range(n):
        lengths, kinds = draw(24, 97, GROUP).tolist(), (2 ** draw(3, 11, GROUP)).tolist()
        alphabets = [draw(3, vocabulary, kind) for kind in kinds]
        rows = [a[draw(0, len(a), length)].tolist() for a, length in zip(alphabets, lengths, strict=True)]
        groups.append(Group(draw(3, vocabulary, 8).tolist(), rows))
    return cast(cast(model, torch.bfloat16), torch.float32), groups


Setting = Callable[[int, int], tuple[nn.Module, list[Group]]]
SETTINGS: dict[str, Setting] = {
    "lab:math train": lambda n, seed: lab("lab:math", "train", n, seed),
    "lab:math test": lambda n, seed: lab("lab:math", "test", n, seed),
    "lab:math-hard test": lambda n, seed: lab("lab:math-hard", "test", n, seed),
    "lab:code test": lambda n, seed: lab("lab:code", "test", n, seed),
    "Qwen2 512 × 8 layers, random": lambda n, seed: random_qwen2(512, 8, 8000, True, n, seed),
    "Qwen2 128 × 28 layers, random": lambda n, seed: random_qwen2(128, 28, 8000, False, n, seed),
}
"""By name: from the number of groups and the seed to a float32 model of bfloat16 values and its groups."""
