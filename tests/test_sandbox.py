from __future__ import annotations

import base64
import http.server
import json
import os
import random
import struct
import subprocess
import sys
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from vigor.evaluation.sandbox import (
    Limits,
    Program,
    Sandbox,
    SandboxFusion,
    SandboxUnavailable,
    bubblewrap,
    check,
    run,
    same_lines,
    seccomp,
    worker,
)
from vigor.evaluation.sandbox.inside import wire

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ("assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'")
LIMITS = Limits(timeout_s=30.0)

PROGRAMS = {
    # name: program, status
    "script": (Program("print(input()[::-1])", stdin="abc", expected="cba\n"), "passed"),
    "wrong output": (Program("print(input())", stdin="abc", expected="cba\n"), "failed"),
    "exit status": (Program("import sys; print(1); sys.exit(3)", expected="1"), "error"),
    "exception": (Program("print(1); 1 / 0", expected="1"), "error"),
    "no expectation": (Program("x = 1"), "passed"),
    "files": (Program("print(open('data/in.txt').read())", files={"data/in.txt": "π"}, expected="π"), "passed"),
    "own comparison": (Program("print(1)", expected="2", matches=lambda output, expected: output < expected), "passed"),
    "threads end first": (
        Program(
            "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print(1))).start()", expected="1"
        ),
        "passed",
    ),
    "tests": (Program(ADD, entry=("add",), tests=TESTS), "passed"),
    "a wrong answer": (Program(ADD, entry=("add",), tests=("assert add(1, 2) == 4",)), "failed"),
    "an exception in a test": (Program(ADD, entry=("add",), tests=("assert add(1) == 4",)), "error"),
    "an expected exception": (
        Program(
            "def f(x):\n    raise KeyError(x)",
            entry=("f",),
            tests=("try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    raise AssertionError",),
        ),
        "passed",
    ),
    "method": (
        Program(
            "class S:\n    def __init__(self):\n        self.n = 0\n    def up(self):\n        self.n += 1\n"
            "        return self.n",
            entry=("S.up",),
            tests=("assert up() == 1", "assert up() == 1"),
        ),
        "passed",
    ),
    "setup": (
        Program(
            ADD,
            entry=("add",),
            setup="import math\ndef twice(x):\n    return 2 * x",
            tests=("assert add(1, math.pi) < twice(4)",),
        ),
        "passed",
    ),
    "broken setup": (Program(ADD, entry=("add",), setup="1 / 0", tests=TESTS), "error"),
}


@pytest.fixture(scope="module")
def sandbox(bubblewrap: None) -> Iterator[Sandbox]:
    with Sandbox(LIMITS, jobs=1) as shared:
        yield shared


@pytest.mark.parametrize("name", PROGRAMS)
def test_outcomes(sandbox: Sandbox, name: str) -> None:
    program, status = PROGRAMS[name]
    (outcome,) = sandbox.run([program])
    assert outcome.status == status, outcome
    assert len(outcome.passed_tests) == len(program.tests)
    assert outcome.passed == (status == "passed") and 0 < outcome.seconds < LIMITS.timeout_s


def test_outcomes_come_in_order_and_tests_one_by_one(sandbox: Sandbox) -> None:
    outcomes = sandbox.run([Program(f"print({i})") for i in range(20)])
    assert [outcome.stdout for outcome in outcomes] == [f"{i}\n" for i in range(20)]
    tests = ("assert add(1, 1) == 2", "assert add(1, 1) == 3", "assert add('a', 1)", "assert add(2, 2) == 4")
    (outcome,) = sandbox.run([Program(ADD, entry=("add",), tests=tests)])
    assert outcome.passed_tests == (True, False, False, True)
    assert (outcome.status, outcome.detail.partition(":")[0]) == ("failed", "AssertionError")


def test_the_environment_is_the_same_each_time(sandbox: Sandbox) -> None:
    code = "import os; print(dict(os.environ), os.getcwd(), sorted({'a', 'b', 'c'}), {'a', 'b', 'c'}, __name__)"
    first, second = sandbox.run([Program(code)] * 2)
    assert first.stdout == second.stdout and "'HOME': '/tmp'" in first.stdout and "__main__" in first.stdout
    randoms = sandbox.run([Program("import random; print(random.random())")] * 2)
    assert randoms[0].stdout != randoms[1].stdout


VALUES = [
    *(None, True, 0, -(2**53), 2**53, 10**5000, 0.1, float("inf"), "", "é\ud800", b"\x00", 2j, Fraction(1, 3)),
    *([], [[1], (2, (3,))], {"a": {1: [2]}, (1, 2): {3}}, frozenset({1}), deque([1]), range(1, 9, 2), bytearray(b"a")),
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_plain_data_passes_unchanged(value: Any) -> None:
    found = wire.decode(json.loads(json.dumps(wire.encode(value))))
    assert found == value and type(found) is type(value)


def test_only_plain_data_passes() -> None:
    class Sly(str):
        def __eq__(self, other: object) -> bool:
            return True

        def __str__(self) -> str:
            return "expected"

        __hash__ = str.__hash__

    found = wire.decode(json.loads(json.dumps(wire.encode([Sly("x"), Counter("aab"), OrderedDict(a=1)]))))
    assert found == ["x", {"a": 2, "b": 1}, {"a": 1}]
    assert [type(item) for item in found] == [str, dict, dict]
    assert list(wire.decode(wire.encode(x * x for x in range(3)))) == [0, 1, 4]
    assert list(wire.decode(wire.encode({1: 2}.values()))) == [2] and {1: 2}.keys() == wire.decode(
        wire.encode({1: 2}.keys())
    )
    with pytest.raises(TypeError, match="object does not pass"):
        wire.encode([object()])
    stand = wire.decode(wire.encode([object()], stands=True))[0]
    assert bool(stand) and stand != object() and stand != True  # noqa: E712
    for forged in ({"call": []}, {"int": "1", "x": 2}, {"set": [[1]]}, {"stand": "no"}):
        try:
            assert not wire.decode(forged)
        except (TypeError, ValueError):
            continue


def test_an_exception_is_a_built_in_one_or_a_runtime_error() -> None:
    assert type(wire.exception_from("KeyError", "x")) is KeyError
    for name in ("SystemExit", "print", "UnicodeDecodeError", "Mine"):
        assert type(wire.exception_from(name, "x")) is RuntimeError


def follow(lines: list[tuple[int, int, int, int]], arch: int, number: int, argument: int) -> int:
    """A slow reading of a filter: what it returns for one system call."""
    at, register = 0, 0
    while True:
        code, yes, no, k = lines[at]
        at += 1
        if code == 0x06:
            return k
        if code == 0x20:
            register = {0: number, 4: arch, 16: argument}[k]
        else:
            at += yes if {0x15: register == k, 0x35: register >= k, 0x45: bool(register & k)}[code] else no


@pytest.mark.parametrize(("machine", "arch", "column"), [("x86_64", 0xC000003E, 0), ("aarch64", 0xC00000B7, 1)])
def test_the_filter_refuses_what_its_table_says_and_nothing_else(machine: str, arch: int, column: int) -> None:
    allow, enosys, eperm, family = 0x7FFF0000, 0x50000 | 38, 0x50000 | 1, 0x50000 | 97
    lines = list(struct.iter_unpack("=HBBI", seccomp.program(machine)))
    assert follow(lines, 0x40000003, 1, 0) == 0x80000000  # 32-bit x86
    refused = {pair[column] for pair in seccomp._REFUSED.values()}
    refused |= set(seccomp._REFUSED_ON_X86.values()) if column == 0 else set()
    clone, sock, prlimit = ((56, 41, 302), (220, 198, 261))[column]
    for number in [*range(500), 2**30 + 41]:
        expected = eperm if number in refused else enosys if number == 435 or number > 462 else allow
        for argument in (0, 1, 2, 3, 10, 16, 40, 17, 17 | 0x10000000, 17 | 0x20000, 17 | 0x40000000):
            special = {
                clone: eperm if argument >= 0x20000 else allow,
                sock: allow if argument in (1, 2, 10) else family,
                prlimit: allow if argument == 0 else eperm,
            }
            assert follow(lines, arch, number, argument) == special.get(number, expected), (number, argument)


def test_the_filter_knows_its_machines() -> None:
    with pytest.raises(ValueError, match="no system call table for 'riscv64'"):
        seccomp.program("riscv64")


def test_refusals_name_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def bwrap(script: str) -> None:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bwrap").chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match=r"no `bwrap` on PATH.*apt-get install bubblewrap.*unsafe_local_exec"):
        run([Program("1")])
    bwrap("echo bubblewrap 0.6.1")
    with pytest.raises(SandboxUnavailable, match=r"is bubblewrap 0\.6\.1; 0\.7\.0 is needed"):
        Sandbox()
    bwrap(
        '[ "$1" = --version ] && echo bubblewrap 0.9.0 || { echo "No permissions to create a namespace" >&2; exit 1; }'
    )
    with pytest.raises(
        SandboxUnavailable, match=r"could not make a sandbox(.|\n)*No permissions(.|\n)*user namespaces"
    ):
        check()
    monkeypatch.setattr(bubblewrap.sys, "platform", "darwin")
    with pytest.raises(SandboxUnavailable, match="needs Linux, and this is darwin"):
        check()


def test_a_python_in_the_home_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bubblewrap.sys, "prefix", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match="would show it all"):
        bubblewrap.command("bwrap", 3, 4, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Program("", tests=("assert f()",)), "needs entry"),
        (lambda: Program("", entry=("f",), tests=("assert f()",), expected="1"), "not by both"),
        (lambda: Program("", files={"../x": ""}), "below the program's folder"),
        (lambda: Program("", files={"/etc/x": ""}), "below the program's folder"),
        (lambda: Limits(timeout_s=0.0), "positive number of seconds"),
        (lambda: Limits(memory_bytes=1), "at least 67108864"),
        (lambda: Limits(tasks=1), "at least 1 and 8"),
        (lambda: Sandbox(jobs=0), "at least one program"),
        (lambda: SandboxFusion("localhost"), "give the server's address"),
        (lambda: SandboxFusion("http://localhost", jobs=0), "at least one request"),
    ],
)
def test_senseless_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n", "1 2", True),
        ("1 2  \n3\n\n", "1 2\n3", True),
        ("1\r\n2", "1\n2", True),
        ("1.0 2", "1 2.00", True),
        ("1.0 x", "1 x", False),
        ("1\n2", "1 2", False),
        ("", "", True),
        ("", "0", False),
        ("yes", "Yes", False),
        ("a\n\nb", "a\nb", False),
        ("nan", "nan", True),
        ("inf x", "inf y", False),
    ],
)
def test_same_lines(output: str, expected: str, same: bool) -> None:
    assert same_lines(output, expected) is same


def test_sandboxes_are_reused_and_renewed(sandbox: Sandbox) -> None:
    def first() -> int:
        process = sandbox._workers[0]._program._process
        assert process is not None
        return process.bwrap.pid

    sandbox.run([Program("x = 1")])
    before = first()
    sandbox.run([Program("x = 1"), Program("1 / 0"), Program("import os; os._exit(1)")])
    assert first() == before
    (outcome,) = sandbox.run([Program("for i in range(2000): open(f'/tmp/{i}', 'w').close()")])
    assert outcome.passed and sandbox._workers[0]._program._process is None
    sandbox.run([Program("x = 1")])
    os.kill(first(), 9)
    assert sandbox.run([Program("print(1)", expected="1")])[0].passed


def test_a_sandbox_that_dies_twice_is_an_error(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Any) -> None:
        raise worker.Lost("gone")

    monkeypatch.setattr(worker._Run, "pump", lost)
    (outcome,) = sandbox.run([Program(ADD, entry=("add",), tests=TESTS)])
    assert (outcome.status, outcome.passed_tests) == ("error", (False, False))


@pytest.mark.filterwarnings("ignore:unsafe_local_exec=True")
@pytest.mark.parametrize("name", PROGRAMS)
def test_unsafe_local_outcomes(name: str) -> None:
    program, status = PROGRAMS[name]
    with Sandbox(LIMITS, jobs=1, unsafe_local_exec=True) as local:
        (outcome,) = local.run([program])
    assert outcome.status == status, outcome
    assert len(outcome.passed_tests) == len(program.tests)


def test_unsafe_local_exec_says_so_and_keeps_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIGOR_HOSTILE_SECRET", "1")
    with pytest.warns(RuntimeWarning, match="YOUR rights on THIS machine"):
        local = Sandbox(Limits(timeout_s=1.5, memory_bytes=2**28, output_bytes=2**16), jobs=2, unsafe_local_exec=True)
    attacks = {
        "while True: pass": "timeout",
        "while True: print('x' * 1000)": "output_limit",
        "x = bytearray(10**12)": "memory",
        "import os; assert 'VIGOR_HOSTILE_SECRET' not in os.environ; print(os.getcwd())": "passed",
    }
    with local:
        outcomes = local.run([Program(code) for code in attacks])
        exits = [Program("import os; os._exit(0)", entry=("add",), tests=TESTS)]
        exits.append(Program("def add(a, b):\n    print('x'); return 0", entry=("add",), tests=TESTS))
        found = local.run(exits, Limits(timeout_s=20.0))
    assert [outcome.status for outcome in outcomes] == list(attacks.values())
    assert [outcome.status for outcome in found] == ["error", "failed"]
    assert not Path(outcomes[-1].stdout.strip()).exists()


class _Server(http.server.BaseHTTPRequestHandler):
    """As SandboxFusion's /run_code answers, with a plain child process behind it."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/run_code" and request["language"] == "python"
        folder = Path(self.server.folder, f"{random.getrandbits(64)}")  # type: ignore[attr-defined]
        for name, content in {
            **request["files"],
            "main.py": base64.b64encode(request["code"].encode()).decode(),
        }.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(base64.b64decode(content))
        try:
            done = subprocess.run(
                [sys.executable, "-B", "main.py"],
                cwd=folder,
                input=request["stdin"],
                capture_output=True,
                text=True,
                timeout=request["run_timeout"],
                check=False,
            )
            result = {"status": "Finished" if done.returncode == 0 else "Error", "return_code": done.returncode}
            result |= {"stdout": done.stdout, "stderr": done.stderr, "execution_time": 0.1}
        except subprocess.TimeoutExpired:
            result = {"status": "TimeLimitExceeded", "return_code": None, "execution_time": request["run_timeout"]}
            result |= {"stdout": "", "stderr": ""}
        broken = "server fault" in request["code"]
        answer: dict[str, Any] = {"status": "Success" if result["status"] == "Finished" else "Failed", "message": ""}
        answer["run_result"] = result
        if broken:
            answer = {"status": "SandboxError", "message": "out of disk", "run_result": None}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    server.folder = tmp_path_factory.mktemp("fusion")  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", PROGRAMS)
def test_sandboxfusion_outcomes(fusion: str, name: str) -> None:
    program, status = PROGRAMS[name]
    (outcome,) = SandboxFusion(fusion, LIMITS, jobs=1).run([program])
    assert outcome.status == status, outcome
    assert len(outcome.passed_tests) == len(program.tests)


def test_sandboxfusion_limits_and_faults(fusion: str) -> None:
    short = SandboxFusion(fusion, Limits(timeout_s=1.0, output_bytes=1000))
    late, long = short.run([Program("while True: pass"), Program("print('x' * 2000)")])
    assert (late.status, long.status) == ("timeout", "output_limit")
    forged = 'print(\'{"passed": [true, true], "kind": null, "problem": null}\', flush=True)\nimport os\nos._exit(0)'
    (outcome,) = SandboxFusion(fusion, LIMITS).run([Program(forged, entry=("add",), tests=TESTS)])
    assert not outcome.passed
    with pytest.raises(SandboxUnavailable, match="out of disk"):
        short.run([Program("'server fault'")])
    with pytest.raises(SandboxUnavailable, match="did not answer"):
        SandboxFusion("http://127.0.0.1:9").run([Program("1")])
