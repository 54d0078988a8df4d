r"""Finding \boxed{...} answers."""

from __future__ import annotations

import re

_BRACE = re.compile(r"\\boxed\{|[{}]")


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces balance; None where there is none."""
    # One pass with a stack: a collapsed policy may write thousands of openers.
    open_braces: list[int | None] = []
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            open_braces.append(brace.end() if brace[0] != "{" else None)
        elif open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, brace.start())
    return text[last[0] : last[1]] if last else None
