"""Run a program without isolation, for machines that can be thrown away: `unsafe_local_exec`.

There are time, memory and output limits, an empty environment and a folder of its own, and its process group is
killed. Nothing keeps the program from the files, the network and the other processes of its user.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vigor.evaluation.sandbox.bubblewrap import ENVIRONMENT, INSIDE
from vigor.evaluation.sandbox.programs import Limits, Outcome, Program, Status, judge_output, script_status
from vigor.evaluation.sandbox.worker import read_verdict

_PATH = "import sys; sys.path.insert(0, sys.argv[1]); "
_SCRIPT = _PATH + (
    "import json; from vigor_sandbox import limits, program; "
    "payload = json.load(open(sys.argv[2])); "
    "limits.apply(payload['timeout_s'], payload['memory_bytes'], None); sys.exit(program.run(payload, None))"
)
_PAIR = _PATH + "from vigor_sandbox.pair import main; main()"


def candidate_payload(program: Program, limits: Limits) -> dict[str, Any]:
    """What `inside.program` reads, with the limits that the child is to set itself."""
    return {
        "code": program.code,
        "files": dict(program.files),
        "timeout_s": limits.timeout_s,
        "memory_bytes": limits.memory_bytes,
    }


def pair_input(program: Program, limits: Limits) -> str:
    """What `inside.pair` reads on standard input."""
    tests = {"setup": program.setup, "entry": program.entry, "tests": program.tests}
    return f"{json.dumps(candidate_payload(program, limits))}\n{json.dumps(tests)}\n"


def run(program: Program, limits: Limits) -> Outcome:
    """Run one program as a plain child process."""
    with tempfile.TemporaryDirectory(prefix="vigor-unsafe-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "vigor_sandbox").symlink_to(INSIDE)
        (folder / "work").mkdir()
        payload = folder / "payload.json"
        if program.tests:
            arguments, stdin = [_PAIR, name], pair_input(program, limits)
        else:
            payload.write_text(json.dumps(candidate_payload(program, limits)))
            arguments, stdin = [_SCRIPT, name, str(payload)], program.stdin
        started = time.monotonic()
        code, reason, stdout, stderr = _run(arguments, stdin, folder / "work", limits)
        seconds = time.monotonic() - started
    passed_tests: tuple[bool, ...] = ()
    status, detail = script_status(code, stderr)
    if program.tests and status == "passed":
        status, detail, passed_tests = read_verdict(program, json.loads(stdout), status, detail)
        stdout = ""
    if reason is not None:
        status, detail = reason, ""
    passed_tests = passed_tests or (False,) * len(program.tests)
    return Outcome(judge_output(program, status, stdout), stdout, stderr, seconds, passed_tests, detail)


def _run(arguments: list[str], stdin: str, folder: Path, limits: Limits) -> tuple[int, Status | None, str, str]:
    """Exit status, the limit that was passed if any, standard output and standard error."""
    environment = {**ENVIRONMENT, "HOME": str(folder), "TMPDIR": str(folder)}
    with tempfile.TemporaryFile() as given:
        given.write(stdin.encode())
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", *arguments],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    assert process.stdout is not None and process.stderr is not None
    outputs = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    reason: Status | None = None
    poll = select.poll()
    for descriptor in outputs:
        poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + limits.timeout_s
    still_open = set(outputs)
    while still_open and reason is None:
        for descriptor, _ in poll.poll(min(0.05, max(0.0, deadline - time.monotonic())) * 1000):
            part = os.read(descriptor, 2**16)
            outputs[descriptor] += part
            if not part:
                poll.unregister(descriptor)
                still_open.discard(descriptor)
            if len(outputs[descriptor]) > limits.output_bytes:
                reason = "output_limit"
        if time.monotonic() >= deadline:
            reason = "timeout"
        elif process.poll() is not None and not poll.poll(0):
            break  # a process that it left behind holds the pipes
    if reason is None:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            reason = "timeout"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    process.stdout.close()
    process.stderr.close()
    out, err = (text[: limits.output_bytes].decode(errors="replace") for text in outputs.values())
    return code, reason, out, err
