"""Run programs on a SandboxFusion server instead (bytedance/SandboxFusion, ``POST /run_code``).

Its isolation is the server's: with ``isolation: none`` in its configuration there is none. Tests and candidate are two
processes of one container (`inside.pair`), so a candidate that has root's capabilities there can forge a verdict.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vigor.evaluation.sandbox.bubblewrap import INSIDE
from vigor.evaluation.sandbox.local import pair_input
from vigor.evaluation.sandbox.programs import (
    Limits,
    Outcome,
    Program,
    SandboxUnavailable,
    Status,
    judge_output,
    script_status,
)
from vigor.evaluation.sandbox.worker import read_verdict

_PAIR = "import os, sys\nsys.path.insert(0, os.getcwd())\nfrom vigor_sandbox.pair import main\nmain()\n"


class SandboxFusion:
    """The same `run` as `Sandbox`, on a server."""

    def __init__(self, url: str, limits: Limits | None = None, *, jobs: int = 8):
        """``url``: such as ``http://localhost:8080``; ``jobs``: requests at a time. Raises ValueError for another URL.

        Of the limits, time, memory and output are asked for; processes and files are the server's affair.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r}: give the server's address, such as http://localhost:8080")
        if jobs < 1:
            raise ValueError(f"jobs={jobs}: at least one request must run at a time")
        self.url = url.rstrip("/")
        self.limits = limits or Limits()
        self.jobs = jobs

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """One outcome a program, in their order. Raises SandboxUnavailable where the server does not answer."""
        with ThreadPoolExecutor(self.jobs) as threads:
            return list(threads.map(self._run_one, programs))

    def _run_one(self, program: Program) -> Outcome:
        files = {name: text.encode() for name, text in program.files.items()}
        if program.tests:
            code, stdin = _PAIR, pair_input(program, self.limits)
            files = {f"vigor_sandbox/{file.name}": file.read_bytes() for file in sorted(INSIDE.glob("*.py"))}
        else:
            code, stdin = program.code, program.stdin
        answer = self._post(
            {
                "code": code,
                "language": "python",
                "stdin": stdin,
                "run_timeout": self.limits.timeout_s,
                "memory_limit_MB": self.limits.memory_bytes // 2**20,
                "files": {name: base64.b64encode(content).decode() for name, content in files.items()},
            }
        )
        if answer["status"] == "SandboxError" or answer["run_result"] is None:
            raise SandboxUnavailable(f"{self.url} could not run the program: {answer['message']}")
        return self._outcome(program, answer["run_result"])

    def _outcome(self, program: Program, result: dict[str, Any]) -> Outcome:
        stdout, stderr = result["stdout"] or "", result["stderr"] or ""
        passed_tests: tuple[bool, ...] = ()
        status: Status
        if result["status"] == "TimeLimitExceeded":
            status, detail = "timeout", ""
        elif len(stdout.encode()) > self.limits.output_bytes:
            status, detail = "output_limit", f"more than {self.limits.output_bytes} bytes"
        else:
            code = result["return_code"]
            status, detail = script_status(1 if code is None else code, stderr)
            if program.tests and status == "passed":
                status, detail, passed_tests = read_verdict(program, json.loads(stdout), status, detail)
                stdout = ""
        passed_tests = passed_tests or (False,) * len(program.tests)
        seconds = float(result["execution_time"] or 0.0)
        return Outcome(judge_output(program, status, stdout), stdout, stderr, seconds, passed_tests, detail)

    def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(request).encode()
        message = urllib.request.Request(
            f"{self.url}/run_code", data=data, headers={"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(message, timeout=self.limits.timeout_s + 60.0) as reply:
                return json.load(reply)
        except (urllib.error.URLError, TimeoutError, ValueError) as error:
            raise SandboxUnavailable(
                f"the SandboxFusion server at {self.url} did not answer: {error}. Remedy: start it (its docs: "
                "`docker run -p 8080:8080 volcengine/sandbox-fusion`) and check the address."
            ) from error
