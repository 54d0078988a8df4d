"""A disk that takes no more: whichever library writes, an OSError that names the file; and room, looked for first."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REFUSALS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO})
"""Numbers of errors after which nothing more can be written: full, over quota, read-only, too large, broken."""
STDOUT = "standard output"
"""Its name in errors."""
_RUST = re.compile(r"\(os error (\d+)\)")
_TORCH = re.compile(r"(?:inline_container\.cc:\d+\] \. |basic_ios::clear: )([^\n]*)")


class FullError(ValueError):
    """There is too little room for what will certainly be written."""


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turns the error of a failed write into an OSError with its number, its reason and the file.

    Native libraries raise exceptions of their own: safetensors and tokenizers with the system's number in the text,
    torch without (EIO stands for it, with torch's words as the reason). Any other error passes as it is.

    Args:
        path: what is being written, where the error itself names no file.
    """
    try:
        yield
    except Exception as error:
        found = _written(error, str(path))
        if found is None or found is error:
            raise
        raise found from error


def _written(error: Exception, path: str) -> OSError | None:
    """The error as an OSError that names a file; None if it is not one of a write."""
    if isinstance(error, OSError) and error.errno is not None:
        return error if error.filename is not None else OSError(error.errno, os.strerror(error.errno), path)
    if found := _RUST.search(str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])), path)
    if found := _TORCH.search(str(error)):
        return OSError(errno.EIO, f"a write failed ({found[1]})", path)
    return None


def free_below(path: str | Path) -> str:
    """How much is free on the disk of a file, which may not be there yet: "12 MiB are free there"."""
    there = next(each for each in (Path(path), *Path(path).absolute().parents) if each.exists())
    return f"{shutil.disk_usage(there).free / 2**20:,.0f} MiB are free there"


def refuse_full(folder: Path, needed: int, what: str) -> None:
    """Raises FullError if less is free on the folder's disk than certainly will be written.

    Args:
        folder: exists.
        needed: bytes.
        what: they are for.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FullError(
            f"{folder} has {free / 2**20:,.1f} MiB of free space, and {what} take at least {needed / 2**20:,.1f} MiB. "
            "Make space on that disk, or name a folder on another one with --output_dir."
        )
