"""The answer in a completion: strict, in the form asked for, and flexible, the last thing that could be it."""

from __future__ import annotations

import ast
import re
from typing import Any

from vigor.rewards.boxed import last_boxed

Row = dict[str, Any]

_HASHES = re.compile(r"^\s*####\s*(\S.*?)\s*$", re.MULTILINE)
_DOLLARS = re.compile(  # \$ is an amount of money, not a delimiter
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?")
_ANNOUNCED = re.compile(r"(?i:answer)\s*(?i:is|:)\s*:?\s*(.+)")
_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_ANSWER_TAGS = re.compile(r"\[ANSWER\](.*?)\[/ANSWER\]", re.DOTALL)


def strict_math(text: str) -> str | None:
    r"""The last ``\boxed{…}``; in its absence the last line ``#### …``, which is how GSM8K writes its answers."""
    boxed = (last_boxed(text) or "").strip()
    if boxed:
        return boxed
    lines = _HASHES.findall(text)
    return str(lines[-1]) if lines else None


def flexible_math(text: str) -> str | None:
    """The strict answer; in its absence the last expression between dollars or the last number, whichever ends later.

    What stands on the last line that announces an answer ("the answer is …") comes first.
    """
    strict = strict_math(text)
    if strict is not None:
        return strict
    announced = _ANNOUNCED.findall(text)
    return (_last_expression(announced[-1]) if announced else None) or _last_expression(text)


def program(text: str) -> str:
    """The last fenced block, also one that was never closed; the whole text where there is none."""
    blocks = _BLOCK.findall(text)
    return str(blocks[-1]) if blocks else text


def humaneval_completion(row: Row, text: str) -> str:
    """What continues the prompt: the whole function again, or its body.

    A body ends where a line of prose begins: at the first that is not indented.
    """
    code = program(text)
    if re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(row['entry_point'])}\b", code, re.MULTILINE):
        return "\n" + code
    kept = []
    for line in code.split("\n"):
        if line.strip() and not line[0].isspace():
            break
        kept.append(line)
    return "\n".join(kept)


def strict_value(row: Row, text: str) -> str | None:
    """CRUXEval: what stands after the last ``f(input) ==``, to the end of its line."""
    call = f"f({row['input']})"
    at = text.rfind(call)
    while at >= 0:
        rest = text[at + len(call) :].lstrip(" ")
        if rest.startswith("=="):
            return _tidy_value(rest[2:])
        at = text.rfind(call, 0, at)
    return None


def flexible_value(row: Row, text: str) -> str | None:
    r"""The strict value; in its absence ``[ANSWER]``, ``\boxed{…}``, the last fenced block, or the last line."""
    strict = strict_value(row, text)
    if strict is not None:
        return strict
    tagged = _ANSWER_TAGS.findall(text)
    found = tagged[-1] if tagged else last_boxed(text) or (_BLOCK.findall(text) or [""])[-1]
    lines = [line for line in (found.strip() or text).split("\n") if line.strip(" `")]
    return _tidy_value(lines[-1].rpartition(" == ")[2]) if lines else None


def _last_expression(text: str) -> str | None:
    """The last expression between dollars, or the last number outside of one, whichever ends later."""
    found = [(m.end(), next(part for part in m.groups() if part is not None)) for m in _DOLLARS.finditer(text)]
    inside = found[-1][0] if found else 0
    found += [(m.end(), m[0].replace(",", "")) for m in _NUMBER.finditer(text, inside)]
    return max(found)[1].strip() if found else None


def _tidy_value(text: str) -> str | None:
    """The first line without fences and tags; without what follows a value that is complete before it."""
    line = text.strip().split("\n")[0].partition("[/ANSWER]")[0].strip().strip("`").strip()
    for candidate in (line, line.rstrip("`.,; "), line.partition(" #")[0].strip()):
        try:
            ast.parse(candidate.strip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
        return candidate or None
    return line or None
