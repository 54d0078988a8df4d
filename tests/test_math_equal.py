from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vigor.rewards.math_equal as math_equal
from vigor.rewards import math_worker
from vigor.rewards.math_equal import MathVerifier, _tidy

HANGING = [r"9^{9^{9^{9}}}", r"(9^9)!", r"\sum_{n=1}^{10^{9}} \frac{1}{n^2}"]


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(timeout_s=30.0) as shared:
        yield shared


def boxed(answer: str) -> str:
    return f"Let us see. The answer is \\boxed{{{answer}}}."


def child_of(verifier: MathVerifier) -> int:
    assert verifier._child is not None
    return verifier._child.process.pid


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends(pid: int, within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (boxed("72"), "72", 1.0),
        (boxed(" 72 "), "72", 1.0),
        (boxed("072"), "72", 1.0),
        (boxed("73"), "72", 0.0),
        (boxed("-72"), "72", 0.0),
        (boxed("ab"), "ab", 1.0),
        (boxed("ba"), "ab", 0.0),
        (boxed("sat cat the"), "the cat sat", 0.0),
        (boxed("'ba'"), "'ab'", 0.0),
        (boxed('"ab"'), "'ab'", 1.0),
        (boxed(""), "0", 0.0),
        (r"\boxed{1} no, \boxed{2}", "2", 1.0),
        (r"\boxed{2} no, \boxed{1}", "2", 0.0),
        (r"\boxed{2", "2", 0.0),
        ("The answer is 2.", "2", 0.0),
        ("", "2", 0.0),
        (boxed("2"), None, None),
        (boxed("2"), "  ", None),
    ],
)
def test_text_decides_without_a_child(completion: str, answer: str | None, expected: float | None) -> None:
    verifier = MathVerifier()
    assert verifier.verify([completion], [answer]) == [expected]
    assert verifier._child is None


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (boxed(r"\frac{1}{2}"), "0.5", 1.0),
        (boxed(r"\frac12"), r"\dfrac{1}{2}", 1.0),
        (boxed("1/3"), r"\frac{1}{2}", 0.0),
        (boxed("1657"), r"\$1,\!657", 1.0),
        (boxed("1658"), r"\$1,\!657", 0.0),
        (boxed("90"), r"90^\circ", 1.0),
        (boxed("91"), r"90^\circ", 0.0),
        (boxed("(x+1)^2"), "x^2+2x+1", 1.0),
        (boxed(r"(3, \pi/2)"), r"\left( 3, \frac{\pi}{2} \right)", 1.0),
        (boxed(r"(\pi/2, 3)"), r"\left( 3, \frac{\pi}{2} \right)", 0.0),
        (boxed("72.0"), "72", 1.0),
        (boxed("17"), "{17}.", 1.0),
        (boxed("18"), "{17}.", 0.0),
        (boxed("1,657.0"), "1657", 1.0),
        (boxed("23000"), r"\$23{,}000", 1.0),
        (boxed("30"), r"30^\circ.", 1.0),
        (boxed("0.12345"), r"\dfrac{2469}{20,\!000}", 1.0),
        (boxed("c+b+a"), "a + b + c", 1.0),
        (boxed(r"1-\cos^2 t"), r"\sin^2 t", 1.0),
        (boxed(r"1-\cos^2 s"), r"\sin^2 t", 0.0),
        (boxed(r"\text{Monday}"), "Monday", 1.0),
        (boxed(r"\text{Tuesday}"), "Monday", 0.0),
        (r"The answer is $\frac12$.", "0.5", 1.0),
        (r"The answer is $\frac13$.", "0.5", 0.0),
        (boxed(r"\frac{"), r"\frac{1}{2}", 0.0),
    ],
)
def test_math_verify_decides_the_rest(
    verifier: MathVerifier, completion: str, answer: str, expected: float | None
) -> None:
    assert verifier.verify([completion], [answer]) == [expected]


def test_only_the_last_box_counts_for_math_verify_too(verifier: MathVerifier) -> None:
    texts = [r"\boxed{\frac12} so \boxed{\frac13}", r"\boxed{\frac13} so \boxed{\frac12}"]
    assert verifier.verify(texts, ["0.5", "0.5"]) == [0.0, 1.0]


def test_a_reference_with_nothing_in_it_has_no_verdict() -> None:
    with MathVerifier() as verifier:
        assert verifier.verify([boxed("1"), boxed("1.0")], ["}{", "1"]) == [None, 1.0]
        assert verifier.unparsable_answers == 1


def test_lengths_and_timeouts_are_checked() -> None:
    with pytest.raises(ValueError, match="2 completions, 1 answers"):
        MathVerifier().verify(["a", "b"], ["1"])
    with pytest.raises(ValueError, match="timeout_s=0"):
        MathVerifier(timeout_s=0)


@pytest.mark.parametrize("expression", HANGING)
def test_a_hanging_expression_off_the_main_thread_costs_its_timeout_only(expression: str) -> None:
    verifier = MathVerifier(timeout_s=1.0)
    results: list[list[float | None]] = []

    def work() -> None:
        texts = [boxed("0.50"), boxed(expression), boxed("0.25"), boxed(r"\frac12")]
        results.append(verifier.verify(texts, [r"\frac{1}{2}"] * 4))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert results == [[1.0, 0.0, 0.0, 1.0]]
    assert verifier.timeouts == 1
    pid = child_of(verifier)
    assert is_running(pid)
    verifier.close()
    assert not is_running(pid)


def test_threads_share_one_child_and_get_their_own_answers(verifier: MathVerifier) -> None:
    wrong: list[int] = []

    def work(k: int) -> None:
        texts = [boxed(rf"\frac{{{i}}}{{{i + k}}}") for i in range(1, 8)]
        golds = [rf"\frac{{{3 * i}}}{{{3 * (i + k)}}}" for i in range(1, 8)]
        if verifier.verify(texts, golds) != [1.0] * 7:
            wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_dead_child_is_replaced_and_counted() -> None:
    with MathVerifier(timeout_s=60.0) as verifier:
        assert verifier.verify([boxed("0.50")], [r"\frac{1}{2}"]) == [1.0]
        first = child_of(verifier)
        threading.Timer(0.5, os.kill, (first, signal.SIGKILL)).start()
        texts = [boxed(HANGING[0]), boxed(r"\frac24")]
        assert verifier.verify(texts, [r"\frac{1}{2}"] * 2) == [0.0, 1.0]
        assert (verifier.crashes, verifier.timeouts) == (1, 0)
        assert child_of(verifier) != first


def test_the_childs_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 256 * 2**20
    monkeypatch.setattr(math_equal, "MEMORY_LIMIT_BYTES", limit)
    with MathVerifier(timeout_s=2.0) as verifier:
        assert verifier.verify([boxed("0.50")], [r"\frac{1}{2}"]) == [1.0]
        assert resource.prlimit(child_of(verifier), resource.RLIMIT_AS) == (limit, limit)
        assert verifier.verify([boxed("2^{2^{40}}"), boxed("0.500")], [r"\frac{1}{2}"] * 2) == [0.0, 1.0]


def test_a_collected_verifier_leaves_no_child() -> None:
    verifier = MathVerifier()
    verifier.verify([boxed("0.50")], [r"\frac{1}{2}"])
    pid = child_of(verifier)
    del verifier
    gc.collect()
    assert not is_running(pid)


_PARENT = """
import sys, threading
from vigor.rewards.math_equal import MathVerifier
verifier = MathVerifier(timeout_s=2.0)
verifier.verify([r"\\boxed{0.50}"], [r"\\frac{1}{2}"])
print(verifier._child.process.pid, flush=True)
if sys.argv[1] == "hang":
    threading.Thread(target=verifier.verify, args=([r"\\boxed{9^{9^{9^{9}}}}"], ["0.5"])).start()
    print("hanging", flush=True)
if sys.argv[1] != "exit":
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["exit", "kill", "hang"])
def test_the_child_does_not_outlive_its_parent(how: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None and parent.stdin is not None
    pid = int(parent.stdout.readline())
    if how == "hang":
        parent.stdout.readline()
    if how != "exit":
        parent.kill()
    parent.wait(timeout=60)
    assert ends(pid)
    parent.stdin.close()
    parent.stdout.close()


def test_a_fork_starts_its_own_child_and_leaves_the_parents_alone() -> None:
    with MathVerifier() as verifier:
        verifier.verify([boxed("0.50")], [r"\frac{1}{2}"])
        pid = child_of(verifier)
        forked = os.fork()
        if forked == 0:
            status = 1
            try:
                right = verifier.verify([boxed("0.5000")], [r"\frac{1}{2}"]) == [1.0]
                status = 0 if right and child_of(verifier) != pid else 2
                verifier.close()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
        assert is_running(pid)
        assert verifier.verify([boxed("0.50000")], [r"\frac{1}{2}"]) == [1.0]
        assert child_of(verifier) == pid


def test_the_child_imports_nothing_heavy() -> None:
    code = "import sys, vigor.rewards.math_worker as w; w._make_checker(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "math_verify" in modules
    assert not {"torch", "transformers", "datasets", "trl", "numpy"} & set(modules)


def test_a_child_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_equal, "_CHILD", "raise SystemExit('no such module as math_verify')")
    with pytest.raises(RuntimeError, match="no such module as math_verify"):
        MathVerifier().verify([boxed("0.50")], [r"\frac{1}{2}"])


def real_answers(name: str) -> list[str]:
    folder = os.environ.get("VIGOR_DATA_DIR")
    if folder is None:
        pytest.skip("VIGOR_DATA_DIR is not set: the folder with math_train.jsonl, gsm8k_train.jsonl and others")
    with open(Path(folder, f"{name}.jsonl"), encoding="utf-8") as rows:
        return [json.loads(row)["answer"] for row in rows]


@pytest.mark.parametrize("name", ["math_train", "gsm8k_train", "amc83", "aime24"])
def test_real_answers_equal_themselves_and_not_each_other(verifier: MathVerifier, name: str) -> None:
    answers = real_answers(name)
    answers = random.Random(0).sample(answers, min(500, len(answers)))
    assert verifier.verify([boxed(answer) for answer in answers], answers) == [1.0] * len(answers)
    # The same without the comparison of text, which would settle it alone.
    check = math_worker._make_checker()
    assert [answer for answer in answers if check(_tidy(answer), boxed(_tidy(answer))) != 1.0] == []

    perturbed = [f"{answer} + 1" for answer in answers]
    verdicts = verifier.verify([boxed(text) for text in perturbed], answers)
    assert [a for a, verdict in zip(answers, verdicts, strict=True) if verdict != 0.0] == []
