"""A model's sizes from its config alone: parameters, those trained, and the shape that operations are counted from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from vigor.flops import MODELS, Shape, shape_of


@dataclass(frozen=True)
class Model:
    """What the planner knows of a model."""

    name: str
    shape: Shape
    parameters: int
    trainable: int
    layer: int
    """Parameters of the largest decoder layer."""
    outer: int
    """Parameters beside the decoder layers: embedding, head, last norm."""
    rank: int
    """Of LoRA adapters; 0 where all parameters are trained."""
    skeleton: Any = field(repr=False, compare=False)
    """The model on the meta device: modules and shapes without numbers."""


def read_model(name: str, *, trust_remote_code: bool = False, peft_config: Any = None) -> Model:
    """Counts a model, without loading its weights.

    Args:
        name: folder or hub name, of which only config.json is read; the Qwen2.5 base models of the recipes are known
            without a network.
        trust_remote_code: as in transformers.
        peft_config: adapter to attach, if any.

    Raises:
        OSError, ValueError: the config cannot be read, or is none of a causal language model.
    """
    config = read_config(name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        sizes = [_count(module) for module in _layers(skeleton)]
        outer = _count(skeleton) - sum(sizes)
        if peft_config is not None:
            from peft import get_peft_model

            skeleton = get_peft_model(skeleton, peft_config)
    return Model(
        name=name,
        shape=shape_of(config),
        parameters=_count(skeleton),
        trainable=sum(p.numel() for p in skeleton.parameters() if p.requires_grad),
        layer=max(sizes, default=0),
        outer=outer,
        rank=0 if peft_config is None else int(peft_config.r),
        skeleton=skeleton,
    )


def read_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder or hub name, or of a model that is known."""
    known = name.removeprefix("Qwen/")
    if known in MODELS and not Path(name).exists():
        s = MODELS[known]
        return Qwen2Config(
            vocab_size=s.vocabulary,
            hidden_size=s.hidden,
            intermediate_size=s.intermediate,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.kv_heads,
            max_position_embeddings=32_768,
            tie_word_embeddings=s.tied,
        )
    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def _layers(skeleton: nn.Module) -> list[nn.Module]:
    """The decoder layers: the longest list of modules."""
    lists = [list(module) for module in skeleton.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
