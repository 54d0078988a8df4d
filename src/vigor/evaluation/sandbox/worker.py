"""One worker: a sandbox for programs and, for those with tests, a second one for the tests; both are reused.

The verdict on tests comes out of a pipe that only the second sandbox holds. The two share nothing but a socket, made
anew for each program, over which the tests call and the program answers with plain data.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any, cast

from vigor.evaluation.sandbox.process import Lost, Zygote
from vigor.evaluation.sandbox.programs import (
    Limits,
    Outcome,
    Program,
    Status,
    judge_output,
    script_status,
)

_GRACE_S = 10.0
_VERDICT_BYTES = 2**20


class Worker:
    """Runs one program at a time."""

    def __init__(self) -> None:
        self._program, self._judge = Zygote(), Zygote()

    def run(self, program: Program, limits: Limits) -> Outcome:
        """Run one program. Raises SandboxUnavailable where no sandbox can be started."""
        for _ in range(2):
            try:
                return self._run(program, limits)
            except Lost:
                # Once more in new sandboxes: what ended the old ones may have been an earlier program's doing.
                self.close()
            except BaseException:
                self.close()
                raise
        return Outcome("error", "", "", 0.0, (False,) * len(program.tests), "it ended the sandbox twice")

    def close(self) -> None:
        self._program.close()
        self._judge.close()

    def _run(self, program: Program, limits: Limits) -> Outcome:
        self._program.start()
        if program.tests:
            self._judge.start()
        run = _Run(limits)
        try:
            run.begin(self._program, self._judge if program.tests else None, program)
            run.pump()
        finally:
            run.close()
        for zygote, reply in run.replies.items():
            if reply["spent"]:
                zygote.close()
        return _outcome(program, run.replies[self._program], run)


class _Run:
    """The descriptors of one program in flight, and what came out of them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.replies: dict[Zygote, dict[str, Any]] = {}
        self.outputs: dict[int, bytearray] = {}
        self.stdout = self.stderr = self.verdict = -1
        self.over_output = False
        self._controls: dict[int, Zygote] = {}
        self._sockets: dict[Zygote, socket.socket] = {}
        self._ours: set[int] = set()

    def begin(self, candidate: Zygote, judge: Zygote | None, program: Program) -> None:
        theirs: list[int] = []
        try:
            self.stdout, self.stderr = self._pipe(theirs), self._pipe(theirs)
            standard = [_memory_file(program.stdin.encode()), theirs[0], theirs[1]]
            theirs.append(standard[0])
            payload = _memory_file(json.dumps({"code": program.code, "files": dict(program.files)}).encode())
            theirs.append(payload)
            calls: list[int] = []
            if judge is not None:
                calls = [end.detach() for end in socket.socketpair()]
                theirs += calls
            self._ask(candidate, "program", 0.0, [payload, *standard, *calls[:1]])
            if judge is not None:
                nothing = os.open(os.devnull, os.O_RDWR)
                theirs.append(nothing)
                tests = {"setup": program.setup, "entry": program.entry, "tests": program.tests}
                theirs.append(_memory_file(json.dumps(tests).encode()))
                payload = theirs[-1]
                self.verdict = self._pipe(theirs)
                # Half a second more than the candidate has, so that the slow one is the one that is named.
                self._ask(judge, "judge", 0.5, [payload, nothing, nothing, nothing, calls[1], theirs[-1]])
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    def pump(self) -> None:
        """Read what comes until every sandbox has replied. Raises Lost where one does not."""
        deadline = time.monotonic() + self.limits.timeout_s + _GRACE_S
        poll = select.poll()
        for descriptor in [*self.outputs, *self._controls]:
            poll.register(descriptor, select.POLLIN)
        open_outputs = set(self.outputs)
        while len(self.replies) < len(self._controls) or open_outputs:
            events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not events:
                raise Lost("no reply")
            for descriptor, _ in events:
                if descriptor in self._controls:
                    zygote = self._controls[descriptor]
                    self.replies[zygote] = zygote.reply()
                    poll.unregister(descriptor)
                elif not self._read(descriptor):
                    poll.unregister(descriptor)
                    open_outputs.discard(descriptor)

    def text(self, descriptor: int) -> str:
        return self.outputs[descriptor].decode(errors="replace")

    def close(self) -> None:
        for descriptor in self._ours:
            os.close(descriptor)
        self._ours.clear()

    def _read(self, descriptor: int) -> bool:
        part = os.read(descriptor, 2**16)
        output = self.outputs[descriptor]
        room = (_VERDICT_BYTES if descriptor == self.verdict else self.limits.output_bytes) - len(output)
        output += part[: max(room, 0)]
        if len(part) > room and not self.over_output:
            self.over_output = True
            for zygote, control in self._sockets.items():
                if zygote not in self.replies:
                    try:
                        control.send(b'{"stop": true}')
                    except OSError as error:
                        raise Lost(str(error)) from error
        return bool(part)

    def _pipe(self, theirs: list[int]) -> int:
        ours, end = os.pipe()
        theirs.append(end)
        self._ours.add(ours)
        self.outputs[ours] = bytearray()
        return ours

    def _ask(self, zygote: Zygote, role: str, extra_s: float, descriptors: Sequence[int]) -> None:
        message = {
            "role": role,
            "timeout_s": self.limits.timeout_s + extra_s,
            "memory_bytes": self.limits.memory_bytes,
            "tasks": self.limits.tasks,
        }
        control = zygote.request(message, descriptors)
        self._controls[control.fileno()] = zygote
        self._sockets[zygote] = control


def _memory_file(content: bytes) -> int:
    descriptor = os.memfd_create("vigor", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _outcome(program: Program, reply: dict[str, Any], run: _Run) -> Outcome:
    stdout, stderr = run.text(run.stdout), run.text(run.stderr)
    passed_tests: tuple[bool, ...] = ()
    status, detail = script_status(reply["code"], stderr)
    if program.tests:
        status, detail, passed_tests = _verdict(program, run, status, detail)
    if run.over_output:
        status, detail = "output_limit", f"more than {run.limits.output_bytes} bytes"
    elif reply["reason"] is not None:
        status, detail = cast(Status, reply["reason"]), ""
    status = judge_output(program, status, stdout)
    return Outcome(status, stdout, stderr, reply["seconds"], passed_tests, detail)


def _verdict(program: Program, run: _Run, exit_status: Status, detail: str) -> tuple[Status, str, tuple[bool, ...]]:
    """Status, detail and one boolean a test, from the verdict of the tests' own sandbox."""
    text = run.text(run.verdict)
    if not text:
        judge = next(reply for zygote, reply in run.replies.items() if zygote is not next(iter(run._sockets)))
        nothing = (False,) * len(program.tests)
        if judge["reason"] is not None:
            return cast(Status, judge["reason"]), "while the tests ran", nothing
        return "error", "the tests gave no verdict", nothing
    return read_verdict(program, json.loads(text), exit_status, detail)


def read_verdict(
    program: Program, verdict: dict[str, Any], exit_status: Status, detail: str
) -> tuple[Status, str, tuple[bool, ...]]:
    """The same from a verdict as `inside.judge` gives it; ``exit_status`` and ``detail`` are the program's own end."""
    passed_tests = tuple(verdict["passed"])
    if len(passed_tests) == len(program.tests) and all(passed is True for passed in passed_tests):
        return "passed", "", passed_tests
    if exit_status != "passed":
        return exit_status, detail, passed_tests
    problem = str(verdict["problem"])
    kind: Status = "failed" if verdict["kind"] == "failed" else "error"
    return "memory" if problem.startswith("MemoryError") else kind, problem, passed_tests
