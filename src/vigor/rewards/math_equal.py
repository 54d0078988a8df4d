r"""Whether a completion's answer equals the reference: text first, then math-verify in a process that can be killed.

math-verify bounds its own time with a signal, which works on the main thread only and cannot interrupt one long
big-integer operation. Here it runs in a child process, one comparison at a time; the parent waits for each reply with
a wall-clock limit and kills the child's process group when that passes.

What counts as the answer: the last ``\boxed{...}`` of the completion. Without one, a LaTeX expression announced by
"answer" ("the answer is $\frac12$"), as math-verify finds it; a bare number in the text is no answer. References are
raw: ``72``, ``\$1,\!657``, ``90^\circ``, ``ab``. The verdict on a boxed answer, in this order:

1. equal text, apart from white space and punctuation at the ends and thousands separators in LaTeX dress: right;
2. both plain integers: compared as integers;
3. both plain words or quoted strings (program outputs such as ``ab``): compared as text without the quotes, because
   algebra calls ``ab`` and ``ba`` the same product;
4. anything else: math-verify. A reference in which it sees no mathematics is compared as text.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from vigor.rewards.boxed import last_boxed

MEMORY_LIMIT_BYTES = 2 * 2**30
"""Address space of the child; starting it takes about 0.1 GiB."""
_START_LIMIT_S = 120.0
_CACHE_SIZE = 4096
_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
_TEXT = re.compile(r"""[A-Za-z]+(?: [A-Za-z]+)*|'[^']*'|"[^"]*\"""")
_ANNOUNCED_LATEX = re.compile(r"answer.*(\$|\\\(|\\\[|\\frac|\s\[)", re.IGNORECASE | re.DOTALL)

# The child gets this process's module path, so that it finds the same packages wherever it is started from.
_CHILD = "import sys; sys.path[:] = sys.argv[3:]; from vigor.rewards.math_worker import main; main()"


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[bytes]
    stderr: IO[bytes]


class MathVerifier:
    """Checks answers. One instance may be used from several threads, which take turns; forks start their own child.

    The child starts at the first comparison that needs it and ends with `close`, with the ``with`` block, when the
    instance is collected, or when this process ends, even by SIGKILL (then within ``timeout_s`` + 1 seconds).

    Counters since the start: ``timeouts`` (over ``timeout_s``), ``crashes`` (the child died) and
    ``unparsable_answers`` (references in which math-verify finds nothing). The child's address space is limited to
    2 GiB; an expression that needs more counts as one that cannot be parsed, or as a crash where the child dies of it.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        """``timeout_s``: wall-clock seconds that one comparison may take, positive. Raises ValueError otherwise."""
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s}: one comparison needs a positive number of seconds, such as 5.0")
        self.timeout_s = timeout_s
        self.timeouts = 0
        self.crashes = 0
        self.unparsable_answers = 0
        self._lock = threading.Lock()
        self._cache: dict[tuple[str, str], float | None] = {}
        self._owner = os.getpid()
        self._child: _Child | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def verify(self, completions: Sequence[str], answers: Sequence[str | None]) -> list[float | None]:
        """1.0 for a right answer, 0.0 for a wrong one, None where there is no opinion; one value a completion.

        None: the reference is None or blank, or math-verify finds nothing in it. 0.0 also stands for a completion
        without an answer, with one that cannot be parsed, and for a comparison that ran out of time or memory.
        Raises ValueError for sequences of different lengths and RuntimeError where the child cannot start.
        """
        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions, {len(answers)} answers: give one answer a completion")
        return [self._verify_one(text, answer) for text, answer in zip(completions, answers, strict=True)]

    def close(self) -> None:
        """End the child, if there is one. The verifier can be used again afterwards."""
        with self._own_lock():
            self._stop()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _verify_one(self, completion: str, answer: str | None) -> float | None:
        if answer is None or not answer.strip():
            return None
        answer = _tidy(answer)
        boxed = last_boxed(completion)
        if boxed is not None:
            found = _tidy(boxed)
            verdict = _compare_text(found, answer)
            if verdict is not None:
                return verdict
            # Only the last box is judged, and equal answers in different texts share one verdict.
            completion = f"\\boxed{{{found}}}"
        elif not _ANNOUNCED_LATEX.search(completion):
            return 0.0
        with self._own_lock():
            key = (answer, completion)
            if key not in self._cache:
                if len(self._cache) >= _CACHE_SIZE:
                    self._cache.clear()
                self._cache[key] = self._ask(answer, completion)
            return self._cache[key]

    def _own_lock(self) -> threading.Lock:
        """The lock, after leaving a fork's inherited child and lock to the process that they belong to."""
        if os.getpid() != self._owner:
            self._owner = os.getpid()
            self._lock = threading.Lock()
            self._child = None
            if self._finalizer is not None:
                self._finalizer.detach()
                self._finalizer = None
        return self._lock

    def _ask(self, answer: str, completion: str) -> float | None:
        if self._child is None or self._child.process.poll() is not None:
            self._stop()
            self._start()
        request = json.dumps({"answer": answer, "completion": completion}).encode() + b"\n"
        try:
            reply = self._exchange(request, self.timeout_s)
        except TimeoutError:
            self.timeouts += 1
            self._stop()
            return 0.0
        except EOFError:
            self.crashes += 1
            self._stop()
            return 0.0
        except BaseException:
            # An interrupt in the middle of an exchange would leave a reply that the next request takes for its own.
            self._stop()
            raise
        if reply["score"] is None:
            self.unparsable_answers += 1
        return reply["score"]

    def _start(self) -> None:
        limits = [str(self.timeout_s), str(MEMORY_LIMIT_BYTES)]
        stderr = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the child
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *limits, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,
            start_new_session=True,
        )
        self._child = _Child(process, stderr)
        self._finalizer = weakref.finalize(self, _kill, self._child, os.getpid())
        try:
            self._exchange(b"", _START_LIMIT_S)
        except (TimeoutError, EOFError) as error:
            stderr.seek(0)
            written = stderr.read().decode(errors="replace").strip()
            self._stop()
            raise RuntimeError(
                f"the math-verify process did not start ({type(error).__name__} within {_START_LIMIT_S:.0f} s); it "
                f"wrote:\n{written[-2000:] or '(nothing)'}\nRemedy: check `{sys.executable} -c 'import math_verify'`"
            ) from error
        except BaseException:
            self._stop()
            raise

    def _exchange(self, request: bytes, limit_s: float) -> dict[str, Any]:
        """Send one line, wait for one. Raises TimeoutError over the limit and EOFError where the child is gone."""
        assert self._child is not None
        stdin, stdout = self._child.process.stdin, self._child.process.stdout
        assert stdin is not None and stdout is not None
        deadline = time.monotonic() + limit_s
        while request:
            _wait(stdin, select.POLLOUT, deadline)
            try:
                # A pipe that is ready for writing takes this much without blocking.
                request = request[os.write(stdin.fileno(), request[: select.PIPE_BUF]) :]
            except BrokenPipeError as error:
                raise EOFError("the child closed its input") from error
        received = b""
        while not received.endswith(b"\n"):
            _wait(stdout, select.POLLIN, deadline)
            part = os.read(stdout.fileno(), 65536)
            if not part:
                raise EOFError("the child ended without a reply")
            received += part
        return json.loads(received)

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = None
        self._child = None


def _tidy(text: str) -> str:
    """Without thousands separators in LaTeX dress, and without a full stop or comma at the end."""
    return text.replace(",\\!", "").replace("{,}", "").strip().rstrip(" .,;")


def _compare_text(found: str, answer: str) -> float | None:
    """The verdict where text decides, None where it does not."""
    if found == answer:
        return 1.0
    if _INTEGER.fullmatch(found) and _INTEGER.fullmatch(answer):
        return float(int(found) == int(answer))
    if _TEXT.fullmatch(found) and _TEXT.fullmatch(answer):
        return float(found.strip("'\"") == answer.strip("'\""))
    return None if found else 0.0


def _wait(stream: IO[bytes], event: int, deadline: float) -> None:
    # poll() and not select(): a training process may have more than 1,024 files open.
    poll = select.poll()
    poll.register(stream, event)
    remaining = deadline - time.monotonic()
    if remaining <= 0 or not poll.poll(remaining * 1000.0):
        raise TimeoutError("the comparison ran out of time")


def _kill(child: _Child, owner: int) -> None:
    """Kill the child's process group and reap it; nothing in a fork, whose parent the child belongs to."""
    if os.getpid() != owner:
        return
    process = child.process
    if process.poll() is None:
        # Its own session makes the child the leader of a group with its process id.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, child.stderr):
        if stream is not None:
            stream.close()
