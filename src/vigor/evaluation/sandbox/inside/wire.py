"""How the tests and the candidate talk: plain data in length-prefixed JSON frames over a socket.

Nothing but data passes. An object whose ``__eq__`` always says yes, a patched method, a callable: none of them can be
written down here, so none reaches the process that compares. Subclasses of the built-in types arrive as those types; of
any other object that the candidate returns, such as a match of `re`, only whether it is true arrives.
"""

from __future__ import annotations

import builtins
import datetime
import decimal
import fractions
import functools
import itertools
import json
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

MAX_FRAME_BYTES = 16 * 2**20
MAX_ITERATOR_ITEMS = 100_000
_EXACT_INTEGER = 2**53
_HEADER = struct.Struct(">I")


class Stand:
    """Stands for an object of the candidate: true or false as it was, and equal to nothing but itself."""

    def __init__(self, truth: bool) -> None:
        self._truth = truth

    def __bool__(self) -> bool:
        return self._truth


def encode(value: Any, stands: bool = False) -> Any:
    """``value`` as JSON data that `decode` reads; with ``stands``, other objects become a `Stand`.

    Raises TypeError for other objects without ``stands``, ValueError for too long an iterator.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | float):
        # Of a subclass the content counts, not what its methods say.
        return str.__str__(value) if isinstance(value, str) else float.__float__(value)
    if isinstance(value, int):
        # Python refuses to read long decimal numbers, and JSON readers elsewhere round them.
        return int.__int__(value) if -_EXACT_INTEGER < value < _EXACT_INTEGER else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(item, stands) for item in value]
    for kind, name, parts in _CONTAINERS:
        if isinstance(value, kind):
            return {name: parts(value, functools.partial(encode, stands=stands))}
    if isinstance(value, Iterator):
        items = list(itertools.islice(value, MAX_ITERATOR_ITEMS + 1))
        if len(items) > MAX_ITERATOR_ITEMS:
            raise ValueError(f"an iterator of more than {MAX_ITERATOR_ITEMS} items does not pass between the processes")
        return {"iterator": [encode(item, stands) for item in items]}
    if type(value).__module__ == "numpy" and value.ndim == 0:
        return encode(value.item(), stands)
    if stands:
        return {"stand": bool(value)}
    raise TypeError(f"a value of type {type(value).__qualname__} does not pass between the processes")


def decode(data: Any) -> Any:
    """The value that `encode` wrote down. Raises ValueError or TypeError for anything else."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("a reply that is no value")
    ((name, parts),) = data.items()
    if name not in _BUILDERS:
        raise ValueError(f"a reply of the unknown kind {name!r}")
    return _BUILDERS[name](parts)


_Encode = Callable[[Any], Any]


def _items(value: Any, enc: _Encode) -> list[Any]:
    return [enc(item) for item in value]


def _pairs(value: Any, enc: _Encode) -> list[Any]:
    return [[enc(key), enc(item)] for key, item in value.items()]


def _hex(value: Any, enc: _Encode) -> str:
    return str(value.hex())


_CONTAINERS: list[tuple[Any, str, Callable[[Any, _Encode], Any]]] = [
    (tuple, "tuple", _items),
    (dict, "dict", _pairs),
    (set, "set", _items),
    (frozenset, "frozenset", _items),
    (deque, "deque", _items),
    (type({}.keys()), "keys", _items),
    (type({}.values()), "iterator", _items),
    (type({}.items()), "items", lambda value, enc: [[enc(key), enc(item)] for key, item in value]),
    (bytes, "bytes", _hex),
    (bytearray, "bytearray", _hex),
    (complex, "complex", lambda value, enc: [value.real, value.imag]),
    (range, "range", lambda value, enc: [enc(value.start), enc(value.stop), enc(value.step)]),
    (fractions.Fraction, "fraction", lambda value, enc: [enc(value.numerator), enc(value.denominator)]),
    (decimal.Decimal, "decimal", lambda value, enc: str(value)),
    (datetime.datetime, "datetime", lambda value, enc: value.isoformat()),
    (datetime.date, "date", lambda value, enc: value.isoformat()),
]

_BUILDERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "tuple": lambda parts: tuple(map(decode, parts)),
    "dict": lambda parts: {decode(key): decode(item) for key, item in parts},
    "set": lambda parts: set(map(decode, parts)),
    "frozenset": lambda parts: frozenset(map(decode, parts)),
    "deque": lambda parts: deque(map(decode, parts)),
    "keys": lambda parts: dict.fromkeys(map(decode, parts)).keys(),
    "items": lambda parts: {decode(key): decode(item) for key, item in parts}.items(),
    "iterator": lambda parts: iter([decode(item) for item in parts]),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*map(decode, parts)),
    "fraction": lambda parts: fractions.Fraction(*map(decode, parts)),
    "decimal": decimal.Decimal,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "stand": lambda truth: Stand(truth is True),
}


def exception_from(name: str, message: str) -> Exception:
    """The built-in exception of that name; RuntimeError for any other."""
    kind = vars(builtins).get(name)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
        return kind(message)
    return RuntimeError(f"{name}: {message}")


def send(connection: socket.socket, message: Any) -> None:
    """Send one frame. Raises ValueError where it is over `MAX_FRAME_BYTES`."""
    text = json.dumps(message).encode("ascii")
    if len(text) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(text)} bytes; at most {MAX_FRAME_BYTES} pass between the processes")
    connection.sendall(_HEADER.pack(len(text)) + text)


def receive(connection: socket.socket) -> Any:
    """The next frame. Raises EOFError where the other side is gone, ValueError for a frame that cannot be read."""
    (length,) = _HEADER.unpack(_exactly(connection, _HEADER.size))
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {length} bytes; at most {MAX_FRAME_BYTES} pass between the processes")
    return json.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        try:
            part = connection.recv(min(length - len(parts), 2**20))
        except ConnectionError as error:
            raise EOFError("the other side is gone") from error
        if not part:
            raise EOFError("the other side is gone")
        parts += part
    return bytes(parts)
