"""Settings of a YAML file, held against the types that they are declared with, before anything computes with them."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from dataclasses import fields
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vigor.reading import kind

_UNUSABLE = re.compile("[\x00\ud800-\udfff]")


def fit(config: dict[str, Any], classes: Iterable[type]) -> dict[str, Any]:
    """The settings in the types of the dataclasses that declare them.

    A single value stands for a list of one, a whole number for a float, a number for text, and null, where a setting
    cannot be that, for its default. A text is left to the parser of the command line where the setting is a number, a
    truth value or a choice. Names that no class has are left alone.

    Raises:
        ValueError: a value that its setting cannot take, one that is not among its choices, or a text that no path,
            token or message can hold.
    """
    hints: dict[str, Any] = {}
    choices: dict[str, Any] = {}
    for each in classes:
        hints.update(get_type_hints(each))
        choices.update({field.name: field.metadata.get("choices") for field in fields(each)})
    fitted = {}
    for name, value in config.items():
        try:
            fitted[name] = _fit(value, hints[name]) if name in hints else value
        except TypeError as error:
            if value is None:
                continue
            raise ValueError(
                f"{name}: {_shown(value)} is {kind(value)}, expected {_described(hints[name])}."
            ) from error
        allowed = choices.get(name)
        if allowed and fitted[name] is not None and fitted[name] not in allowed:
            raise ValueError(f"--{name} {fitted[name]}: choose {', '.join(map(str, allowed))}.")
    check_texts(fitted)
    return fitted


def check_texts(settings: dict[str, Any]) -> None:
    """Raises ValueError for a setting with a NUL character or half a surrogate pair in it, at any depth."""
    for name, value in settings.items():
        stack = [value]
        while stack:
            here = stack.pop()
            if isinstance(here, dict):
                stack += [*here.keys(), *here.values()]
            elif isinstance(here, list | tuple | set):
                stack += here
            elif isinstance(here, str) and (found := _UNUSABLE.search(here)):
                what = "a NUL character" if found[0] == "\x00" else "half a surrogate pair"
                raise ValueError(f"{name}: {_shown(here)} has {what} at character {found.start()}: remove it.")


def _fit(value: Any, hint: Any) -> Any:
    """The value as the hint wants it; TypeError if it cannot be that."""
    if get_origin(hint) in (Union, types.UnionType):
        for exact in (True, False):
            for each in get_args(hint):
                if exact and isinstance(value, str) and each is not str:
                    continue
                try:
                    return _fit(value, each)
                except TypeError:
                    continue
        raise TypeError
    if hint is Any or hint is object:
        return value
    if hint is None or hint is type(None):
        if value is None:
            return None
        raise TypeError
    if get_origin(hint) is list or hint is list:
        (inner,) = get_args(hint) or (Any,)
        return [_item(item, inner) for item in (value if isinstance(value, list) else [value])]
    if get_origin(hint) is dict or hint is dict:
        if isinstance(value, dict):
            return value
        raise TypeError
    if get_origin(hint) is Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        if isinstance(value, str) or value in get_args(hint):
            return value
        raise TypeError
    return _scalar(value, hint)


def _item(value: Any, hint: Any) -> Any:
    """An item of a list: the parser does not look into lists, so that its text must become a number here."""
    if hint in (int, float) and isinstance(value, str):
        try:
            return hint(value)
        except ValueError as error:
            raise TypeError from error
    return _fit(value, hint)


def _scalar(value: Any, hint: Any) -> Any:
    if isinstance(value, bool):
        if hint is bool:
            return value
    elif isinstance(value, str):
        return value
    elif hint is str and isinstance(value, int | float):
        return str(value)
    elif hint is int and isinstance(value, int) and abs(value) < 2**63:
        return value
    elif hint is float and isinstance(value, int | float) and abs(value) < 2**1023:
        return float(value) if isinstance(value, int) and abs(value) >= 2**53 else value
    elif hint is float and isinstance(value, float):
        return value  # infinite or NaN: the settings' own checks name their ranges
    raise TypeError


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_described, get_args(hint))))
    if get_origin(hint) is list:
        return "a list"
    if get_origin(hint) is dict:
        return "a mapping"
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    names = {bool: "true or false", int: "a whole number of 64 bits", float: "a number", str: "text", dict: "a mapping",
             list: "a list", type(None): "null", None: "null"}  # fmt: skip
    return names.get(hint, str(getattr(hint, "__name__", hint)))


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**50 else "a number of more than 50 digits"
    return text if len(text) <= 80 else f"{text[:80]}…"
