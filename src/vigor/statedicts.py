"""State dicts that FSDP's processes wrote in parts: read without running what they name, and made whole.

torch unpickles the description of such a state dict, `*/.metadata`, without asking what it holds.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from vigor.checkpoint import CheckpointError


def refuse_code(path: Path) -> None:
    """Raises CheckpointError if the descriptions of state dicts in parts name anything but torch's plain records."""
    for file in sorted(path.glob("*/.metadata")):
        try:
            with file.open("rb") as stream:
                _Records(stream).load()
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{path} cannot be resumed from: {file} is no description of a state dict ({error})."
            ) from error


_RECORDS = {
    ("pathlib", "PosixPath"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
}  # fmt: skip
_UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)


class _Records(pickle.Unpickler):
    """Reads records of torch's and dtypes, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS or (module == "torch" and isinstance(vars(torch).get(name), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def weights_of(path: Path, flag: str) -> str:
    """How a new run gets the weights of a checkpoint: by the flag, unless FSDP's processes each wrote a part."""
    parts = path / "pytorch_model_fsdp_0"
    if not parts.is_dir():
        return f"{flag}{path}"
    return f"accelerate merge-weights {parts} NEW, the model's config.json and tokenizer beside them, and {flag}NEW"
