"""Files that a command reads back: regular, UTF-8, of the shape that was written; else refused with file and place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

MAX_VALUES = 100_000
"""In one YAML file; through its aliases a short one may stand for more than fits into memory."""
NUMBER = (int, float)

Shape = Any
"""A type or tuple of types; [shape] for a list; {str: shape} for a mapping; {"key": shape, …} for named entries, "key?"
where an entry may be missing. A bool is no number, and a number is finite."""


class ReadError(ValueError):
    """A file is not what it should be. The message names it, the place in it, and what was expected."""


def read_text(path: Path) -> str:
    """The text of a regular file.

    Raises:
        FileNotFoundError: there is none.
        ReadError: it is a folder, pipe or device, cannot be read, or is not UTF-8.
    """
    if not path.is_file():
        if path.exists():
            raise ReadError(f"{path} is no regular file.")
        raise FileNotFoundError(f"{path} is missing.")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ReadError(f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8.") from error
    except OSError as error:
        raise ReadError(f"{path} cannot be read ({error.strerror}).") from error


def read_json(path: Path, shape: Shape = object) -> Any:
    """The value in a JSON file, of this shape.

    Raises:
        FileNotFoundError, ReadError: as `read_text`; and not JSON, or of another shape.
    """
    value = parse_json(read_text(path), str(path))
    check(value, shape, str(path))
    return value


def parse_json(text: str, where: str) -> Any:
    """The value that a JSON text stands for; ReadError with `where` and the line if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ReadError(f"{where}:{error.lineno}: invalid JSON ({error.msg} at column {error.colno}).") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting
        raise ReadError(f"{where}: invalid JSON ({error}).") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping of names to values in a YAML file; empty for an empty file.

    Raises:
        FileNotFoundError, ReadError: as `read_text`; and not YAML, no mapping, a name that is no text or stands there
            twice, or more than `MAX_VALUES` values, aliases counted as often as they are used.
    """
    text = read_text(path)
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ReadError(f"{path} is not YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ReadError(f"{path} must hold a mapping of settings, it holds {kind(value)}.")
    if strange := [key for key in value if not isinstance(key, str)]:
        raise ReadError(f"{path}: the setting {strange[0]!r} is {kind(strange[0])}, expected a name.")
    if _more_than(value, MAX_VALUES):
        raise ReadError(f"{path} holds more than {MAX_VALUES:,} values, or itself.")
    return value


def read_value(flag: str, written: str) -> Any:
    """What a value on the command line says, read as YAML: a number, a truth value, a list, or the text itself.

    Raises:
        ReadError: it is no YAML.
    """
    try:
        return yaml.safe_load(written)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ReadError(f"--{flag} {written!r}: the value cannot be read ({error}).") from error


def check(value: Any, shape: Shape, where: str) -> None:
    """Raises ReadError, with the place in the value, if it is not of the shape."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            raise ReadError(f"{where} is {kind(value)}, expected a list.")
        for i, item in enumerate(value):
            check(item, shape[0], f"{where}[{i}]")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ReadError(f"{where} is {kind(value)}, expected an object.")
        for key, entry in shape.items():
            if key is str:
                for name, item in value.items():
                    check(item, entry, f"{where}: {_short(name)}")
            elif key.removesuffix("?") in value:
                check(value[key.removesuffix("?")], entry, f"{where}: {key.removesuffix('?')}")
            elif not key.endswith("?"):
                raise ReadError(f"{where} has no entry {key!r}.")
    else:
        types = shape if isinstance(shape, tuple) else (shape,)
        fits = isinstance(value, types) and (object in types or not isinstance(value, bool) or bool in types)
        if not fits or (isinstance(value, float) and object not in types and not math.isfinite(value)):
            wanted = " or ".join(dict.fromkeys(_NAMES[each] for each in types))
            raise ReadError(f"{where} is {kind(value)}, expected {wanted}.")


def kind(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}"
    for each in (bool, *_NAMES):
        if each is not object and isinstance(value, each):
            return _NAMES[each]
    return f"of type {type(value).__name__}"


_NAMES: dict[Any, str] = {
    bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object",
    type(None): "null", object: "anything",
}  # fmt: skip


def _short(name: Any) -> str:
    text = str(name)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _more_than(value: Any, limit: int) -> bool:
    """Whether a walk through the value meets more than so many values, each as often as it is reached."""
    left, stack = limit, [value]
    while stack and left >= 0:
        here = stack.pop()
        left -= 1
        if isinstance(here, dict):
            stack += here.values()
        elif isinstance(here, list | tuple | set):
            stack += here
    return left < 0


class _Loader(yaml.SafeLoader):
    """Refuses a mapping in which a name stands twice, of which YAML's own loader keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in the base class."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    told = f"{key.value!r} stands there twice"
                    raise yaml.constructor.ConstructorError(None, None, told, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)
