"""Small random models, padded batches and naive float64 references for the tests of the pure maths."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 37
PAD, EOS = 0, 1

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}


def _built(make: Callable[[], nn.Module], dtype: torch.dtype) -> Any:
    """The same random values on each call and everywhere, so that no gradient vanishes by initialisation."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def qwen2(dtype: torch.dtype = torch.float32, *, tied: bool = True) -> Qwen2ForCausalLM:
    return _built(lambda: Qwen2ForCausalLM(Qwen2Config(**_SMALL, tie_word_embeddings=tied)), dtype)


def qwen2_untied(dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    return qwen2(dtype, tied=False)


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return _built(lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, tie_word_embeddings=False)), dtype)


def qwen3(dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    return _built(lambda: Qwen3ForCausalLM(Qwen3Config(**_SMALL, head_dim=8, tie_word_embeddings=True)), dtype)


def gpt2(dtype: torch.dtype = torch.float32, *, dropout: float = 0.3, **changes: int) -> GPT2LMHeadModel:
    """Learned absolute positions: a left-padded row read in place is another sequence."""
    size = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **changes}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return _built(lambda: GPT2LMHeadModel(GPT2Config(**size, **drop, bos_token_id=EOS, eos_token_id=EOS)), dtype)


def opt(dtype: torch.dtype = torch.float32) -> OPTForCausalLM:
    """Its decoder layers apply dropout themselves, and its decoder drops whole layers, in train mode."""
    size = {"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "layerdrop": 0.5}
    config = OPTConfig(**size, **more, dropout=0.5, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=EOS)
    return _built(lambda: OPTForCausalLM(config), dtype)


def lora(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Qwen2 under LoRA with dropout 0.5; only the adapters are trainable."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj", "v_proj", "down_proj"])
    return _built(lambda: get_peft_model(qwen2(), config), dtype)


ZOO: dict[str, Callable[..., Any]] = {
    "qwen2-tied": qwen2,
    "qwen2-untied": qwen2_untied,
    "llama": llama,
    "qwen3": qwen3,
    "gpt2": gpt2,
    "lora": lora,
}


def enable_checkpointing(model: nn.Module, **options: Any) -> None:
    with warnings.catch_warnings():  # transformers 5.23 renames the method; older ones have this name only
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)


@contextmanager
def counted_forwards(model: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Collects the shape of the input of each forward pass."""
    shapes: list[tuple[int, ...]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


@dataclass(frozen=True)
class Sample:
    """One sequence; `counted` are the indices in prompt + completion that the loss counts."""

    prompt: list[int]
    completion: list[int]
    holes: tuple[int, ...] = ()
    """Indices in the completion that are attended to but not counted, such as a tool's output."""

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.completion

    @property
    def counted(self) -> list[int]:
        return [len(self.prompt) + i for i in range(len(self.completion)) if i not in self.holes]


SAMPLES = (
    Sample([5, 9, 3], [7, 8, 30, 2, EOS]),
    Sample([4], [PAD, 6, EOS, PAD, 11, 12, 36]),  # PAD and EOS as real tokens in the middle
    Sample([21, 22, 23, 24, 25], [17]),
    Sample([5, 9], [7, 8, 9, 10, 11, 12], holes=(1, 2, 4)),
    Sample([2, 2, 2], [2, 2, 2, 2]),
)

Side = Literal["left", "right", "mixed"]
SIDES: tuple[Side, ...] = ("left", "right", "mixed")


def padded(
    samples: Sequence[Sample], side: Side = "right", *, extra: int = 0, pad: int = PAD
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and completion_mask; "mixed" pads prompts on the left and completions on the right."""
    prompt_width = max(len(s.prompt) for s in samples) + extra
    width = max(len(s.ids) for s in samples) + extra
    if side == "mixed":
        width = prompt_width + max(len(s.completion) for s in samples) + extra
    ids = torch.full((len(samples), width), pad)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for b, sample in enumerate(samples):
        start = {"left": width - len(sample.ids), "right": 0, "mixed": prompt_width - len(sample.prompt)}[side]
        ids[b, start : start + len(sample.ids)] = torch.tensor(sample.ids)
        attention[b, start : start + len(sample.ids)] = 1
        completion[b, [start + i for i in sample.counted]] = 1
    return ids, attention, completion


def naive_logps(model: nn.Module, sample: Sample, temperature: float = 1.0) -> list[Tensor]:
    """The (V,) float64 log-probabilities from which each counted token was sampled, one token at a time."""
    logits = model(input_ids=torch.tensor([sample.ids])).logits[0]
    rows = [logits[t - 1].double() / temperature for t in sample.counted]
    return [z - z.logsumexp(0) for z in rows]


def naive_norm(
    model: nn.Module, sample: Sample, temperature: float = 1.0, chosen: Callable[[str], bool] = lambda name: True
) -> float:
    """‖∇ mean NLL‖ in float64 from the definition, on a copy of the model."""
    model = copy.deepcopy(model).double().eval()
    logps = naive_logps(model, sample, temperature)
    loss = torch.zeros((), dtype=torch.float64)
    for logp, t in zip(logps, sample.counted, strict=True):
        loss = loss - logp[sample.ids[t]]
    (loss / len(logps)).backward()
    squares = [
        float(value) ** 2
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and chosen(name)
        for value in parameter.grad.flatten()
    ]
    return math.sqrt(math.fsum(squares))
