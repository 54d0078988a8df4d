"""Small models, tokenizers and trainers for the tests of the engine, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from vigor.config import VigorConfig
from vigor.lab.tokenizer import save_tokenizer
from vigor.trainer import VigorTrainer

PROMPTS = ("Q:3+4\nA:", "Q:12+7\nA:", "Q:5*3\nA:", "Q:9-4\nA:")
CHAT_TEMPLATE = (
    "{% for message in messages %}Q:{{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def lab_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """A fresh lab tokenizer."""
    with TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = chat_template
    return tokenizer


@cache
def vocabulary_size() -> int:
    return len(lab_tokenizer())


def tiny_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": vocabulary_size(),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.1,
    }
    return LlamaConfig(**{**settings, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A 2-layer Llama with random weights: the same for the same seed, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**changes))


def save_tiny(folder: Path, chat_template: str | None = None) -> Path:
    """A folder with a tiny model and the lab tokenizer, loadable by the Auto classes."""
    tiny_model().save_pretrained(folder)
    lab_tokenizer(chat_template).save_pretrained(folder)
    return folder


def config(folder: Path, **changes: Any) -> VigorConfig:
    """Two prompts of four completions, one optimizer step, everything fast and deterministic."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "max_steps": 1,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "shuffle_dataset": False,
    }
    return VigorConfig(**{**settings, **changes})


def dataset(prompts: Sequence[Any] = PROMPTS, **columns: Sequence[Any]) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts), **{name: list(values) for name, values in columns.items()}})


def trainer(
    folder: Path,
    reward_funcs: Any = "vigor",
    *,
    model: Any = None,
    data: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    completions: Sequence[Sequence[int]] | None = None,
    peft_config: Any = None,
    **changes: Any,
) -> VigorTrainer:
    """A VigorTrainer on CPU; `completions` replaces sampling by these token ids, one list a row."""
    made = VigorTrainer(
        tiny_model() if model is None else model,
        reward_funcs,
        config(folder, **changes),
        train_dataset=dataset() if data is None else data,
        processing_class=lab_tokenizer() if tokenizer is None else tokenizer,
        peft_config=peft_config,
    )
    if completions is not None:
        inject(made, completions)
    return made


def inject(made: VigorTrainer, completions: Sequence[Sequence[int]]) -> None:
    """Replaces sampling: each process takes its rows of `completions`."""

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        first = made.accelerator.process_index * len(prompt_ids)
        return [list(ids) for ids in completions[first : first + len(prompt_ids)]], None

    made._generate_single_turn = generate


def table(folder: Path, step: int = 1) -> pd.DataFrame:
    """What the trainer wrote of the completions of a step."""
    return pd.read_parquet(folder / "completions" / f"completions_{step:05d}.parquet")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def spy(made: VigorTrainer, method: str, on_call: Callable[..., None]) -> None:
    """Calls `on_call(result, *args)` after each call of a trainer's method."""
    inner = getattr(made, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        on_call(result, *args)
        return result

    setattr(made, method, wrapped)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def naive_score(
    model: torch.nn.Module, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0
) -> float:
    """-√T ‖∇ mean NLL‖ of one completion from the definition, in the precision of a model in eval mode."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    loss = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :])
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    squares = sum(float(g.double().square().sum()) for g in gradients if g is not None)
    return -((len(completion) * squares) ** 0.5)
