"""The child that runs one candidate: as a script, or as a module whose functions answer calls over a socket.

Whatever it sends is an answer to a call and nothing more: it holds no test, no expected value and no verdict.
"""

from __future__ import annotations

import atexit
import inspect
import io
import linecache
import os
import socket
import sys
import threading
import traceback
import types
from typing import Any

from . import wire


def run(payload: dict[str, Any], connection: socket.socket | None) -> int:
    """Run the candidate and return its exit status.

    ``payload``: ``code``, and ``files`` (name to text, written into the working directory first). Without a
    connection the code is a script, ``__name__ == "__main__"``; with one it is a module that then answers calls.
    """
    _standard_streams()
    for name, text in payload["files"].items():
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
    module = types.ModuleType("__main__" if connection is None else "solution")
    sys.modules[module.__name__] = module
    sys.argv = ["program.py"]
    sys.path.insert(0, "")
    linecache.cache["program.py"] = (len(payload["code"]), None, payload["code"].splitlines(True), "program.py")
    try:
        exec(compile(payload["code"], "program.py", "exec"), module.__dict__)
        if connection is not None:
            _answer_calls(module, connection)
        status = 0
    except SystemExit as stop:
        status = _exit_status(stop)
    except BaseException:
        traceback.print_exc()
        status = 1
    return _finish(status)


def _standard_streams() -> None:
    """Text streams on descriptors 0 to 2, which belong to this program alone."""
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(open(0, "rb", closefd=False), encoding="utf-8", errors="replace")  # type: ignore[misc]  # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = io.TextIOWrapper(
            open(number, "wb", closefd=False),  # noqa: SIM115  # lives as long as the process
            encoding="utf-8",
            errors="backslashreplace",
            line_buffering=number == 2,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _answer_calls(module: types.ModuleType, connection: socket.socket) -> None:
    while True:
        try:
            request = wire.receive(connection)
        except EOFError:
            return
        try:
            function = _find(module, request["name"])
            value = function(*map(wire.decode, request["args"]), **wire.decode(request["kwargs"]))
            reply = {"value": wire.encode(value, stands=True)}
        except SystemExit:
            raise
        except BaseException as error:
            reply = {"raised": [type(error).__name__, str(error)[:1000]]}
        try:
            wire.send(connection, reply)
        except ValueError as error:
            wire.send(connection, {"raised": ["ValueError", str(error)]})
        except ConnectionError:
            return


def _find(module: types.ModuleType, name: str) -> Any:
    """``f``, or ``Class.method`` of a new instance of the class."""
    found: Any = module
    for part in name.split("."):
        if inspect.isclass(found):
            found = found()
        if not hasattr(found, part):
            raise NameError(f"the program defines no {name!r}")
        found = getattr(found, part)
    return found


def _exit_status(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def _finish(status: int) -> int:
    """What the interpreter does at its end: wait for threads, run exit handlers, flush."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does at the end of its children
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        return status or 1
    return status
