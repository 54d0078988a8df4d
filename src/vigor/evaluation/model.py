"""The model under evaluation: what it is, by content, and how it is loaded into a back-end of the harness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vigor.evaluation.suites import EvalError

BACKENDS = ("hf", "vllm")

_CONTENT = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Files of a model's folder that decide what it writes."""
_OTHER = {"trainer_state.json", "training_args.bin", "optimizer.bin", "scheduler.bin"}
_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")


@dataclass(frozen=True)
class Model:
    """A model that has not been loaded yet."""

    name: str
    """As the user wrote it."""
    path: str
    """Folder or hub name of the weights; of the base where there is an adapter."""
    adapter: str | None
    """Folder of a PEFT adapter."""
    revision: str | None
    key: str
    """SHA-256 over configuration, tokenizer and weights, or the hub's commit."""
    max_length: int | None
    """Tokens of its context; None where its configuration does not say."""
    tokenizer: Any


def identify(name: str, revision: str | None = None) -> Model:
    """What a name stands for: "lab", "lab-misaligned", a folder, a run folder of `vigor train`, or a hub name.

    Reads configuration and tokenizer, and every byte of a folder's weights. Raises EvalError where there is no model.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = _folder(name)
    adapter = None
    if (Path(path) / "adapter_config.json").is_file():
        adapter = path
        settings = json.loads((Path(path) / "adapter_config.json").read_text("utf-8"))
        path = _folder(settings["base_model_name_or_path"])
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise EvalError(
            f"MODEL {name}: no model with a tokenizer can be loaded from there. Give a folder that holds both, a hub "
            f"name with the network at hand, or lab. ({str(error).splitlines()[0]})"
        ) from error
    text = config.get_text_config()
    lengths = [vars(text)[key] for key in _LENGTHS if key in vars(text)]
    keys = [_digest(Path(path)) if Path(path).is_dir() else f"{path}@{config._commit_hash}"]
    keys += [_digest(Path(adapter))] if adapter is not None else []
    return Model(name, path, adapter, revision, "+".join(keys), lengths[0] if lengths else None, tokenizer)


def load(
    model: Model, backend: str, *, batch_size: str, dtype: str, device: str | None, more: Mapping[str, Any], seed: int
) -> Any:
    """The model in lm-evaluation-harness's back-end; ``more`` are the back-end's own arguments.

    Raises EvalError where the back-end is not installed.
    """
    import torch
    from lm_eval.api.registry import get_model

    arguments: dict[str, Any] = {"pretrained": model.path, "dtype": dtype, "batch_size": _size(batch_size)}
    if model.revision is not None:
        arguments["revision"] = model.revision
    if model.adapter is not None:
        arguments["peft" if backend == "hf" else "lora_local_path"] = model.adapter
    if backend == "hf":
        # The back-end's own default is cuda, also where there is none.
        arguments["device"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
    else:
        arguments["seed"] = seed
    loaded = get_model(backend)(**{**arguments, **more})
    if backend == "hf":
        _forget_sampling(loaded.model)
    return loaded


def check_backend(backend: str) -> None:
    """Raises EvalError where the back-end's package is not installed."""
    import importlib.util

    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise EvalError("--backend vllm: vLLM is not installed. Install it with pip install 'vigor-rl[vllm]'.")


def _folder(name: str) -> str:
    from vigor.lab.world import NAMES, model_path

    if name in NAMES:
        return str(model_path(name))
    inner = Path(name) / "model"
    at_top = any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json"))
    return str(inner) if not at_top and inner.is_dir() else name


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted({path for pattern in _CONTENT for path in folder.glob(pattern)}):
        if path.name not in _OTHER:
            content = hashlib.sha256()
            with path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    content.update(block)
            total.update(f"{path.name} {content.hexdigest()}\n".encode())
    return total.hexdigest()


def _forget_sampling(model: Any) -> None:
    """Leave only the special tokens of the generation settings that came with the weights.

    Some models bring a repetition penalty or a length, which transformers would mix into the task's own decoding.
    """
    from transformers import GenerationConfig

    old = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id
    )


def _size(batch_size: str) -> int | str:
    return batch_size if batch_size.startswith("auto") else int(batch_size)
