"""Reports whose charts are built and put on the page as ever, but not drawn: to draw the 19 takes longer than a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pytest

EMPTY = {"svg": b'<svg xmlns="http://www.w3.org/2000/svg"><defs /></svg>', "png": b"\x89PNG\r\n\x1a\n"}


@contextmanager
def empty_charts() -> Iterator[None]:
    """Every figure is saved as an empty picture."""
    from matplotlib.figure import Figure

    def savefig(self: Figure, file: BinaryIO, *, format: str, **_: Any) -> None:
        file.write(EMPTY[format])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield
