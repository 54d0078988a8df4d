"""Candidate and tests as two processes of one machine without a sandbox between them; what the weaker backends run.

``python -c "from vigor_sandbox.pair import main; main()"`` reads two lines of JSON from standard input, the candidate's
payload and then the tests', and prints one line, the verdict. The candidate is forked off before the tests are read,
so they are not in its memory; and this process is closed to tracing, so an ordinary user's candidate cannot look for
them. A candidate with root's capabilities can.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import Any

from . import judge, limits, program


def main() -> None:
    limits.close_to_others()
    candidate = json.loads(_line())
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ours.close()
            code = _child(candidate, theirs)
        finally:
            os._exit(code)
    theirs.close()
    verdict = judge.judge(json.loads(_line()), ours)
    ours.close()
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has not yet made its own session
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    sys.stdout.write(json.dumps(verdict) + "\n")


def _child(candidate: dict[str, Any], connection: socket.socket) -> int:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    limits.apply(candidate["timeout_s"], candidate["memory_bytes"], None)
    return program.run(candidate, connection)


def _line() -> bytes:
    # Byte by byte: a buffered reader would take the tests into memory before the candidate is forked off.
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            raise EOFError("standard input ended before both lines were there")
        line += part
    return bytes(line)
