"""The base models that ship with the package, found by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMES = ("lab", "lab-misaligned")


def model_path(name: str = "lab") -> Path:
    """Folder of a shipped base, in the layout of `transformers`; its README.md is the card.

    Raises ValueError for an unknown name, FileNotFoundError where the package was installed without the model.
    """
    if name not in NAMES:
        raise ValueError(f"unknown lab model {name!r}: choose one of {', '.join(NAMES)}")
    folder = Path(__file__).parent / "assets" / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors: reinstall vigor-rl, "
            f"or make it with `python -m vigor.lab.build --world {name} --out {folder}`"
        )
    return folder


def load(name: str = "lab") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a shipped base by the plain Auto classes: fp32, on the CPU, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_path(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
