"""The child process of `vigor.rewards.math_equal`: math-verify behind JSON lines on standard input and output.

One request a line, ``{"answer": str, "completion": str}``; one reply a line, ``{"score": 1.0 | 0.0 | null}``, where
null means that the reference answer cannot be parsed. Anything unexpected ends the process, which the parent notices
and counts; so does the end of the input. Imports neither torch nor transformers: it starts in about half a second.

Started with two arguments: the time limit of one request in seconds, and the memory limit in bytes.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from typing import Any, TextIO


def main() -> None:
    timeout_s, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    # Address space, because the kernel enforces no limit on resident memory. A bomb becomes a MemoryError, which
    # math-verify takes for an expression that it cannot read.
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # math-verify prints nothing of its own, but what it calls might: replies go to a copy that nobody else knows.
    replies, sys.stdout = sys.stdout, sys.stderr
    # The parent enforces the time limit. Once the parent has died nobody does, and one big integer operation heeds
    # neither a closed pipe nor a Python signal handler: only the kernel's default action ends it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    check = _make_checker()
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 1.0)
        score = check(request["answer"], request["completion"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, {"score": score})


def _reply(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _make_checker() -> Any:
    """``check(answer, completion)``: 1.0, 0.0, or None where the answer cannot be parsed."""
    from math_verify import LatexExtractionConfig, parse, verify

    # Both say on every call that no timeout of theirs is on; they rely on SIGALRM, which is the kernel's here.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The same clean-up on both sides: \frac12 is an answer as good as \frac{1}{2}.
    boxed_or_announced = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def check(answer: str, completion: str) -> float | None:
        gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        if not gold:
            return None
        found = parse(completion, boxed_or_announced, extraction_mode="first_match", parsing_timeout=None)
        return float(verify(gold, found, timeout_seconds=None))

    return check


if __name__ == "__main__":
    main()
