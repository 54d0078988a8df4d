"""The child that runs the tests, in a sandbox of its own: the candidate's functions are calls over a socket.

The comparisons happen here, on plain data that this process made itself. A test passes when its source runs to its end
here; the candidate, in another process of another sandbox, can only answer the calls.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from . import wire


class _Gone(BaseException):
    """The candidate's process ended. Not an Exception: tests that expect one must not take it for an answer."""


def judge(payload: dict[str, Any], connection: socket.socket) -> dict[str, Any]:
    """Run the tests one after the other.

    ``payload``: ``setup`` (source that runs first), ``entry`` (names of the candidate's functions) and ``tests``
    (sources). Returns ``passed`` (one boolean a test), and of the first that did not pass ``kind`` (``failed`` for an
    assertion, else ``error``) and ``problem`` (one line).
    """
    gone = False

    def remote(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal gone
            request = {"name": name, "args": [wire.encode(arg) for arg in args], "kwargs": wire.encode(kwargs)}
            try:
                wire.send(connection, request)
                reply = wire.receive(connection)
            except (EOFError, ConnectionError):
                gone = True
                raise _Gone(f"the program ended before {name} returned") from None
            if "raised" in reply:
                raise wire.exception_from(str(reply["raised"][0]), str(reply["raised"][1]))
            return wire.decode(reply["value"])

        return call

    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(payload["setup"], "setup.py", "exec"), namespace)
    except BaseException as error:
        reason = f"the tests' set-up: {type(error).__name__}: {error}"[:1000]
        return {"passed": [False] * len(payload["tests"]), "kind": "error", "problem": reason}
    for name in payload["entry"]:
        namespace[name.rpartition(".")[2]] = remote(name)
    passed: list[bool] = []
    kind: str | None = None
    problem: str | None = None
    for source in payload["tests"]:
        found: BaseException | None = None
        try:
            exec(compile(source, "tests.py", "exec"), namespace)
        except BaseException as error:
            found = error
        passed.append(found is None and not gone)
        if problem is None and not passed[-1]:
            kind = "failed" if isinstance(found, AssertionError) else "error"
            problem = "the program ended" if found is None else f"{type(found).__name__}: {found}"[:1000]
    return {"passed": passed, "kind": kind, "problem": problem}
