r"""Finding \boxed{...} answers."""

from __future__ import annotations

_OPENER = "\\boxed{"


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces balance; None where there is none."""
    end = len(text)
    while (start := text.rfind(_OPENER, 0, end)) >= 0:
        depth = 1
        for i in range(start + len(_OPENER), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + len(_OPENER) : i]
        end = start
    return None
