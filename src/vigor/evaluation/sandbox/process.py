"""One sandbox as the parent sees it: bubblewrap, the control socket, and process 1 inside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from vigor.evaluation.sandbox import bubblewrap, seccomp
from vigor.evaluation.sandbox.programs import SandboxUnavailable

_START_LIMIT_S = 60.0


@dataclass(frozen=True)
class _Process:
    bwrap: subprocess.Popen[bytes]
    control: socket.socket
    first: int
    """A handle (pidfd) of process 1 of the sandbox."""
    stderr: IO[bytes]


class Lost(Exception):
    """The sandbox's process 1 has ended or does not answer."""


class Zygote:
    """One sandbox, which can be started again after it was lost or spent."""

    def __init__(self) -> None:
        self._process: _Process | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def request(self, message: dict[str, Any], descriptors: Sequence[int]) -> socket.socket:
        """Send a request with its descriptors; the reply is for the caller to wait for on the returned socket."""
        assert self._process is not None
        try:
            socket.send_fds(self._process.control, [json.dumps(message).encode()], list(descriptors))
        except OSError as error:
            raise Lost(str(error)) from error
        return self._process.control

    def reply(self) -> dict[str, Any]:
        """The reply to the last request. Raises Lost where the sandbox has ended."""
        assert self._process is not None
        try:
            message = self._process.control.recv(65536)
        except OSError as error:
            raise Lost(str(error)) from error
        if not message:
            raise Lost("process 1 has ended")
        return json.loads(message)

    def start(self) -> None:
        """Start the sandbox unless it runs. Raises SandboxUnavailable with bubblewrap's own words and the remedy."""
        if self._process is not None:
            return
        bwrap = bubblewrap.find()
        filter_file = tempfile.TemporaryFile()  # noqa: SIM115  # bubblewrap reads it through its descriptor
        try:
            filter_file.write(seccomp.program())
        except ValueError as error:
            raise SandboxUnavailable(str(error)) from error
        filter_file.seek(0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        info_read, info_write = os.pipe()
        stderr = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the sandbox
        passed = (theirs.fileno(), filter_file.fileno(), info_write)
        process = subprocess.Popen(
            bubblewrap.command(bwrap, *passed),
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env=bubblewrap.ENVIRONMENT,
            pass_fds=passed,
            start_new_session=True,
        )
        theirs.close()
        os.close(info_write)
        filter_file.close()
        with open(info_read, "rb") as info:
            named = info.read()
        ours.settimeout(_START_LIMIT_S)
        try:
            first = os.pidfd_open(json.loads(named)["child-pid"])
        except (ValueError, OSError):
            first = -1
        self._process = _Process(process, ours, first, stderr)
        self._finalizer = weakref.finalize(self, _end, self._process, os.getpid())
        try:
            if first == -1 or self.reply() != {"ready": True}:
                raise Lost("it did not start")
        except Lost as error:
            process.wait(_START_LIMIT_S)
            stderr.seek(0)
            written = stderr.read().decode(errors="replace").strip()[-2000:]
            self.close()
            raise SandboxUnavailable(
                f"bubblewrap could not make a sandbox ({error}); it wrote:\n{written or '(nothing)'}\n"
                f"{bubblewrap.REMEDY}"
            ) from error
        ours.settimeout(None)

    def close(self) -> None:
        """End everything in the sandbox and wait until it is gone."""
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = self._process = None


def _end(process: _Process, owner: int) -> None:
    if os.getpid() != owner:
        return
    if process.first != -1:
        with contextlib.suppress(ProcessLookupError):
            # The kernel ends a pid namespace with its process 1 and reaps that one last.
            signal.pidfd_send_signal(process.first, signal.SIGKILL)
        os.close(process.first)
    else:
        process.bwrap.kill()
    process.bwrap.wait()
    process.control.close()
    process.stderr.close()
