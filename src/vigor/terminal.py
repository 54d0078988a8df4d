"""Text on its way to a terminal: what came from a file, a flag or a model cannot move the cursor or set the title."""

from __future__ import annotations

import argparse
import re
import sys
from typing import NoReturn

REFUSED = 2
"""Exit status of a command that was given what cannot work: flags, settings, files, folders."""
LINES, COLUMNS = 40, 800
"""The longest message and its longest line; what is longer loses its middle."""

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and newline, DEL, and C1, which opens sequences without an ESC
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # marks of direction, which reorder what is read; line separators
    "\ud800-\udfff]"  # half a surrogate pair, which no stream can encode
)


def printable(text: object) -> str:
    r"""The text with control characters, marks of direction and half surrogates written out, as `\x1b` and `\u202e`.

    Newlines and tabs stay, so that a message keeps its lines.
    """
    return _UNPRINTABLE.sub(lambda found: _written(ord(found[0])), str(text))


def one_screen(text: str) -> str:
    """The text in at most `LINES` lines of `COLUMNS` characters; the beginnings and the ends stay."""
    lines = [line if len(line) <= COLUMNS else _without_middle(line) for line in text.splitlines()]
    if len(lines) > LINES:
        cut = len(lines) - LINES + 1
        lines[LINES // 2 : LINES // 2 + cut] = [f"  … {cut} more lines …"]
    return "\n".join(lines)


def refuse(command: str, error: object) -> int:
    """Says on stderr why a command cannot go on, on one screen; returns its exit status."""
    print(f"vigor {command}: {one_screen(printable(error))}", file=sys.stderr)
    return REFUSED


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are printable and fit a screen."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2 and the message."""
        super().error(one_screen(printable(message)))


def _written(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _without_middle(line: str) -> str:
    kept = COLUMNS // 2
    return f"{line[:kept]} … {len(line) - 2 * kept:,} characters … {line[-kept:]}"
