"""The child process of `vigor.rewards.math_equal`: math-verify behind JSON lines on standard input and output.

One request a line, ``{"answer": str, "completion": str}``; one reply a line, ``{"score": 1.0 | 0.0 | null}``, where
null means that math-verify finds nothing in the reference. Anything unexpected ends the process, which the parent
notices and counts; so does the end of the input. Imports neither torch nor transformers: it starts in half a second.

Started with two arguments: the time limit of one request in seconds, and the memory limit in bytes.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from collections.abc import Callable
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


def _make_checker() -> Callable[[str, str], float | None]:
    """``check(answer, completion)``: 1.0, 0.0, or None where math-verify finds nothing in the answer."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import ExprExtractionConfig

    # Both say on every call that no timeout of theirs is on; they rely on SIGALRM, which is the kernel's here.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def configuration(units: bool) -> LatexExtractionConfig:
        # The same clean-up on both sides: \frac12 is an answer as good as \frac{1}{2}.
        clean_up = NormalizationConfig(
            basic_latex=True, units=units, malformed_operators=True, nits=True, boxed="all", equations=False
        )
        return LatexExtractionConfig(False, 0, clean_up)

    with_units, without_units = configuration(True), configuration(False)

    def read(text: str, config: LatexExtractionConfig, *others: ExprExtractionConfig) -> list[Any]:
        found: list[Any] = parse(text, [config, *others], extraction_mode="first_match", parsing_timeout=None)
        return found

    def check(answer: str, completion: str) -> float | None:
        config = with_units
        gold = read(f"\\boxed{{{answer}}}", config, ExprExtractionConfig())
        if gold and all(isinstance(value, str) for value in gold):
            # Only text came out. One reason is that single letters were dropped as units: the t of \sin^2 t.
            config = without_units
            gold = read(f"\\boxed{{{answer}}}", config, ExprExtractionConfig())
        if not gold:
            return None
        return float(verify(gold, read(completion, config), timeout_seconds=None))

    return check


if __name__ == "__main__":
    main()
