"""Programs that attack: none may be taken for right, leave the sandbox, slow the others, or leave anything behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vigor.evaluation.sandbox import Limits, Outcome, Program, Sandbox

TESTS = ("assert add(1, 2) == 3", "assert add(4, 5) == 9")
RIGHT = Program("def add(a, b):\n    return a + b\n", entry=("add",), tests=TESTS)
LIMITS = Limits(timeout_s=20.0, memory_bytes=256 * 2**20, output_bytes=2**16)
FAIR = replace(LIMITS, timeout_s=4.0)
SHORT = replace(LIMITS, timeout_s=1.0)
MARK = "vigor-hostile-mark"


@pytest.fixture(scope="module")
def sandbox(bubblewrap: None) -> Iterator[Sandbox]:
    with Sandbox(LIMITS, jobs=1) as shared:
        yield shared


def wrong(code: str) -> Program:
    """The attack, ahead of and inside a function that does not add."""
    return Program(code, entry=("add",), tests=TESTS)


def run(sandbox: Sandbox, program: Program, limits: Limits = LIMITS) -> Outcome:
    """Run it, and then a right one and an inspector in the same sandbox: the attack must not have reached them."""
    (outcome,) = sandbox.run([program], limits)
    right, inspected = sandbox.run([RIGHT, Program(INSPECT)])
    assert right.passed, right
    assert inspected.passed, inspected
    return outcome


INSPECT = """
import os, socket
assert os.listdir("/tmp") == [] and os.listdir("/dev/shm") == [], (os.listdir("/tmp"), os.listdir("/dev/shm"))
assert sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) == [1, os.getpid()]
for table in ("tcp", "tcp6", "udp", "udp6", "unix"):
    lines = open("/proc/net/" + table).read().splitlines()[1:]
    named = [line for line in lines if table != "unix" or len(line.split()) > 7]
    assert named == [], (table, named)
open("/tmp/writable", "w").close()
"""

FORGED = '{"passed": [true, true], "kind": null, "problem": null}'

VERDICT_ATTACKS = {
    "exit before the asserts": "import sys\nsys.exit(0)",
    "hard exit before the asserts": "import os\nos._exit(0)",
    "exit in the function": "import sys\ndef add(a, b):\n    sys.exit(0)",
    "hard exit in the function": "import os\ndef add(a, b):\n    os._exit(0)",
    "exit by exception": "def add(a, b):\n    raise SystemExit(0)",
    "equal to everything": """
class Same(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 3
def add(a, b): return Same(0)
""",
    "equal to everything, no number": """
class Same:
    def __eq__(self, other): return True
    def __bool__(self): return True
def add(a, b): return Same()
""",
    "equal inside a container": """
class Same(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def add(a, b): return [Same("x")]
""",
    "patched builtins": """
import builtins, unittest, operator
builtins.AssertionError = type("Quiet", (Exception,), {})
unittest.TestCase.assertEqual = lambda *args: None
operator.eq = lambda a, b: True
builtins.isinstance = lambda *args: True
def add(a, b): return 0
""",
    "patched harness": """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith("vigor_sandbox"):
        for key in ("judge", "send", "receive", "encode", "decode"):
            if hasattr(module, key):
                setattr(module, key, lambda *args, **kwargs: {"value": True, "passed": [True, True]})
def add(a, b): return 0
""",
    "forged verdict on every descriptor": f"""
import os
for number in range(3, 64):
    try:
        os.write(number, {FORGED!r}.encode())
        os.write(number, len({FORGED!r}).to_bytes(4, "big") + {FORGED!r}.encode())
    except OSError:
        pass
def add(a, b): return 0
""",
    "forged result lines": f"""
import sys
for stream in (sys.stdout, sys.stderr, sys.__stdout__):
    print({FORGED!r}, file=stream); print("2 passed in 0.01s", file=stream); print("OK", file=stream)
def add(a, b):
    print({FORGED!r}); return 0
""",
    "answers for any call ahead of time": """
import json, os, struct
frame = json.dumps({"value": 3}).encode()
for number in range(3, 64):
    try: os.write(number, (struct.pack(">I", len(frame)) + frame) * 8)
    except OSError: pass
def add(a, b): return 0
""",
    "looks for expected values in memory and frames": """
import gc, sys
def add(a, b):
    frame = sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if isinstance(value, dict) and "tests" in value: return a + b
        frame = frame.f_back
    for found in gc.get_objects():
        if isinstance(found, str) and "assert add" in found: return a + b
    if "assert add" in open("/proc/self/cmdline").read(): return a + b
    return 0
""",
    "reads and writes the memory of process 1": """
import os
def add(a, b):
    for name in ("mem", "environ", "fd", "maps", "root"):
        try:
            if name == "fd": os.listdir("/proc/1/fd")
            else: open("/proc/1/" + name, "rb").read(10)
            return a + b
        except OSError:
            pass
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, 1, 0, 0) == 0 or libc.ptrace(0x4206, 1, 0, 0) == 0: return a + b
    return 0
""",
    "an exception of every kind": "def add(a, b):\n    raise AssertionError('passed')",
    "keyboard interrupt": "def add(a, b):\n    raise KeyboardInterrupt",
    "endless generator": "import itertools\ndef add(a, b):\n    return itertools.count()",
    "deep answer": "def add(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "large answer": "def add(a, b):\n    return 'x' * (40 * 2**20)",
    "kills process 1 and itself": """
import os, signal
for number in range(1, 65):
    try: os.kill(1, number)
    except OSError: pass
def add(a, b): os.kill(os.getpid(), signal.SIGKILL)
""",
    "kills all": "import os, signal\nos.kill(-1, signal.SIGKILL)\ndef add(a, b): return 0",
    "kill of the parent": "import os, signal\ndef add(a, b):\n    os.kill(os.getppid(), signal.SIGKILL); return 0",
    "crash": "import ctypes\ndef add(a, b):\n    ctypes.string_at(0)",
    "syntax error": "def add(a, b) return",
    "no such function": "def plus(a, b): return a + b",
    "stack overflow": "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b): return add(a, b)",
}


@pytest.mark.parametrize("name", VERDICT_ATTACKS)
def test_no_attack_on_the_verdict_passes(sandbox: Sandbox, name: str) -> None:
    outcome = run(sandbox, wrong(VERDICT_ATTACKS[name]), replace(LIMITS, timeout_s=2.0))
    assert outcome.status in ("failed", "error", "memory", "timeout"), outcome
    assert not any(outcome.passed_tests) or name == "answers for any call ahead of time", outcome
    assert len(outcome.passed_tests) == 2


LIMIT_ATTACKS = {
    "endless loop": ("while True: pass", {"timeout"}),
    "endless sleep": ("import time\ntime.sleep(1000)", {"timeout"}),
    "ignores signals": (
        "import signal\n"
        "for n in range(1, 32):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except OSError: pass\n"
        "while True: pass",
        {"timeout"},
    ),
    "one long operation": ("9 ** 9 ** 9", {"timeout", "memory"}),
    "endless output": ("while True: print('x' * 1000)", {"output_limit"}),
    "endless errors": ("import os\nwhile True: os.write(2, b'x' * 65536)", {"output_limit"}),
    "memory": ("x = [0]\nwhile True: x = x + x", {"memory"}),
    "memory at once": ("x = bytearray(10**12)", {"memory"}),
    "memory by many processes": (
        "import os, time\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        x = b'x' * (100 * 2**20); time.sleep(1000)\n"
        "time.sleep(1000)",
        {"memory"},
    ),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {"processes"}),
    "quiet fork bomb": (
        "import os, time\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(0.01)",
        {"processes"},
    ),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,)).start()",
        {"processes", "timeout"},
    ),
    "many files": ("for i in range(10**7): open(f'/tmp/{i}', 'w').close()", {"files"}),
    "large file": ("f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * 2**20)", {"error"}),
    "many large files": (
        "for i in range(100):\n    open(f'/dev/shm/{i}', 'wb').write(b'x' * 2**23)",
        {"error"},
    ),
    "deep folders": (
        "import os\nfor i in range(3000):\n    os.mkdir('d'); os.chdir('d')\nos._exit(1)",
        {"error"},
    ),
    "locked folders": (
        "import os\nos.makedirs('a/b/c')\nos.chmod('a/b', 0)\nos.chmod('a', 0)\nos._exit(1)",
        {"error"},
    ),
}


@pytest.mark.parametrize("name", LIMIT_ATTACKS)
def test_limits_hold(sandbox: Sandbox, name: str) -> None:
    code, allowed = LIMIT_ATTACKS[name]
    outcome = run(sandbox, Program(code), SHORT if "timeout" in allowed else LIMITS)
    assert outcome.status in allowed, outcome
    assert len(outcome.stdout) <= LIMITS.output_bytes and len(outcome.stderr) <= LIMITS.output_bytes


DAEMON = """
import os, socket, subprocess, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        server = socket.socket(); server.bind(("127.0.0.1", 7777)); server.listen()
        abstract = socket.socket(socket.AF_UNIX); abstract.bind("\\0vigor-hostile-mark")
        while True:
            open("/tmp/left", "w").close()
            time.sleep(0.001)
    os._exit(0)
subprocess.Popen(["/bin/sh", "-c", "while true; do :; done  # vigor-hostile-mark"], start_new_session=True)
time.sleep(0.2)
"""


def test_daemons_do_not_outlive_their_program(sandbox: Sandbox) -> None:
    assert run(sandbox, Program(DAEMON)).status == "left_running"
    assert run(sandbox, wrong(DAEMON + "def add(a, b): return 0")).status == "left_running"


# Each script ends with status 0 only if the attack worked.
ESCAPES = {
    "write outside": """
import os
for folder in ("/", "/usr", "/usr/bin", "/etc", "/sandbox", "/sandbox/vigor_sandbox", "/dev", "/proc", PREFIX, "/var"):
    try: open(os.path.join(folder, "vigor-hostile-mark"), "w"); sys.exit(0)
    except OSError: pass
""",
    "write into a mounted file": """
for file in (sys.executable, "/usr/bin/env", "/sandbox/vigor_sandbox/judge.py", "/etc/ld.so.cache"):
    try: open(file, "r+b"); sys.exit(0)
    except OSError: pass
""",
    "secrets in the environment": "if 'VIGOR_HOSTILE_SECRET' in os.environ: sys.exit(0)",
    "secrets in the environment of others": """
for name in os.listdir("/proc"):
    try:
        if b"VIGOR_HOSTILE_SECRET" in open(f"/proc/{name}/environ", "rb").read(): sys.exit(0)
    except OSError: pass
""",
    "home": """
if os.listdir(os.path.expanduser("~")): sys.exit(0)
try: open(SECRET).read(); sys.exit(0)
except OSError: pass
""",
    "password file": """
for file in ("/etc/shadow", "/etc/passwd", "/root/.bashrc", "/var/lib", "/run", "/sys"):
    if os.path.exists(file): sys.exit(0)
""",
    "symlinks": """
for target in (SECRET, "/proc/1/root" + SECRET, "/proc/1/cwd", "/proc/self/root/.." + SECRET):
    os.symlink(target, "link")
    try: open("link").read(); sys.exit(0)
    except OSError: pass
    os.unlink("link")
os.symlink("/", "all"); os.symlink("/usr", "system")
""",
    "hard link": """
try: os.link(sys.executable, "/tmp/linked"); sys.exit(0)
except OSError: pass
""",
    "socket to loopback": """
try: socket.create_connection(("127.0.0.1", PORT), timeout=1); sys.exit(0)
except OSError: pass
""",
    "socket out": """
for address in (("1.1.1.1", 53), ("169.254.169.254", 80), ("10.0.0.1", 22)):
    try: socket.create_connection(address, timeout=0.5); sys.exit(0)
    except OSError: pass
try: socket.getaddrinfo("example.com", 80); sys.exit(0)
except OSError: pass
""",
    "socket of another family": """
for family in (16, 17, 38, 40):  # netlink, packet, algorithms, virtual machine
    try: socket.socket(family, socket.SOCK_DGRAM); sys.exit(0)
    except OSError: pass
""",
    "abstract socket of the machine": """
try: socket.socket(socket.AF_UNIX).connect("\\0" + ABSTRACT); sys.exit(0)
except OSError: pass
""",
    "processes of the machine": """
if any(os.path.exists(f"/proc/{pid}") for pid in PIDS): sys.exit(0)
for pid in PIDS:
    try: os.kill(pid, 0); sys.exit(0)
    except OSError: pass
""",
    "new namespaces": """
for flags in (0x10000000, 0x20000, 0x40000000, 0x20000000):
    if libc.unshare(flags) == 0: sys.exit(0)
    if libc.syscall(56 if os.uname().machine == "x86_64" else 220, flags | 17, 0, 0, 0, 0) >= 0: os._exit(0)
""",
    "mounts and root": """
if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0 or libc.chroot(b"/tmp") == 0: sys.exit(0)
if libc.umount2(b"/usr", 2) == 0 or libc.mount(None, b"/usr", None, 32 | 4096, None) == 0: sys.exit(0)
for call in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(8, 0))):
    try: call(); sys.exit(0)
    except OSError: pass
""",
    "setuid programs": """
for name in ("su", "sudo"):
    if os.path.exists("/bin/" + name):
        found = subprocess.run(["/bin/" + name, "-c", "id"], stdin=subprocess.DEVNULL, capture_output=True)
        if b"uid=0" in found.stdout: sys.exit(0)
if any(int(line.split()[1], 16) for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm"))):
    sys.exit(0)
""",
    "memory that outlives processes": """
for call in (lambda: libc.shmget(0, 4096, 0o1600), lambda: libc.semget(0, 1, 0o1600), lambda: libc.msgget(0, 0o1600)):
    if call() >= 0: sys.exit(0)
try: os.memfd_create("x"); sys.exit(0)
except OSError: pass
""",
    "keyring": """
number = 250 if os.uname().machine == "x86_64" else 219
if libc.syscall(number, 0, -3, 0) >= 0: sys.exit(0)
""",
    "limits of process 1": """
try: resource.prlimit(1, resource.RLIMIT_CPU, (1, 1)); sys.exit(0)
except OSError: pass
try: os.sched_setaffinity(1, {0}); sys.exit(0)
except OSError: pass
try: os.setpriority(os.PRIO_PROCESS, 1, 19); sys.exit(0)
except OSError: pass
try: resource.setrlimit(resource.RLIMIT_NPROC, (10000, 10000)); sys.exit(0)
except (OSError, ValueError): pass
""",
    "terminal": """
import fcntl, termios
for number in (0, 1, 2):
    try: fcntl.ioctl(number, termios.TIOCSTI, b"x"); sys.exit(0)
    except OSError: pass
try: open("/dev/tty"); sys.exit(0)
except OSError: pass
""",
    "an earlier program's source in memory": """
import re
assert libc.prctl(4, 1, 0, 0, 0) == 0  # dumpable, or it may not look at itself
for line in open("/proc/self/maps"):
    first, last = (int(part, 16) for part in line.split()[0].split("-"))
    if "rw" not in line.split()[1] or "[v" in line: continue
    with open("/proc/self/mem", "rb", 0) as memory:
        memory.seek(first)
        try: content = memory.read(last - first)
        except OSError: continue
        if re.search(b"earlier[-]program[-]mark", content): sys.exit(0)
""",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_leaves_the_sandbox(
    sandbox: Sandbox, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIGOR_HOSTILE_SECRET", "1")
    secret = tmp_path / "secret"
    secret.write_text(MARK)
    secret.chmod(0o644)
    sandbox.run([Program("x = 'earlier-program-mark'")])
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0vigor-{os.getpid()}")
        abstract.listen()
        known = {
            "PREFIX": sys.prefix,
            "SECRET": str(secret),
            "PORT": server.getsockname()[1],
            "ABSTRACT": f"vigor-{os.getpid()}",
            "PIDS": [os.getpid(), os.getppid()] if min(os.getpid(), os.getppid()) > 1000 else [999999],
        }
        head = "import ctypes, os, resource, socket, subprocess, sys\nlibc = ctypes.CDLL(None)\n"
        head += "".join(f"{key} = {value!r}\n" for key, value in known.items())
        outcome = run(sandbox, Program(head + ESCAPES[name] + "\nsys.exit(7)\n"))
        assert (outcome.status, outcome.detail) == ("error", "exit status 7"), outcome
        server.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert secret.read_text() == MARK
    assert not list(Path("/").glob("*" + MARK)) and not list(Path("/usr").glob("*" + MARK))


def test_programs_share_nothing_that_they_change(sandbox: Sandbox) -> None:
    change = "import math, json, sys\nmath.pi = 3; json.dumps = len; sys.path.append('/tmp')\nopen('/tmp/json.py','w')"
    look = "import math, json, sys\nassert math.pi > 3.1 and json.dumps([1]) == '[1]' and '/tmp' not in sys.path"
    assert all(outcome.passed for outcome in sandbox.run([Program(change), Program(look)]))


def children() -> set[str]:
    """Command lines of all live processes below this one."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return {f"{pid}" for pid in below - {os.getpid()}}


def descriptors() -> dict[str, str]:
    links = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            links[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return links


def test_afterwards_nothing_is_left(sandbox: Sandbox, tmp_path: Path) -> None:
    files = {name: set(os.listdir(name)) for name in ("/tmp", "/dev/shm", "/")}
    processes, opened, threads = children(), descriptors(), threading.active_count()
    with Sandbox(LIMITS, jobs=2) as other:
        bombs = [Program(LIMIT_ATTACKS[name][0]) for name in ("fork bomb", "endless output", "many files")]
        other.run([*bombs, Program(DAEMON), wrong(DAEMON), RIGHT])
        assert children() > processes
    assert children() <= processes
    assert set(descriptors().values()) <= set(opened.values()) and len(descriptors()) <= len(opened)
    assert threading.active_count() <= threads
    marked = [path for path in Path("/proc").glob("[0-9]*/cmdline") if MARK.encode() in _read(path)]
    assert marked == []
    assert MARK not in Path("/proc/net/unix").read_text()
    for name, before in files.items():
        assert not {entry for entry in set(os.listdir(name)) - before if "left" in entry or MARK in entry}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_a_killed_parent_takes_its_sandboxes_along(sandbox: Sandbox) -> None:
    code = """
import threading, time
from vigor.evaluation.sandbox import Limits, Program, Sandbox
sandbox = Sandbox(Limits(timeout_s=300), jobs=1)
threading.Thread(target=sandbox.run, args=([Program("import time; time.sleep(299)")],), daemon=True).start()
time.sleep(1.0)
print(sandbox._workers[0]._program._process.bwrap.pid, flush=True)
time.sleep(300)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    bwrap = Path("/proc", child.stdout.readline().strip())
    inner = Path(bwrap, "task", bwrap.name, "children").read_text().split()
    assert inner and bwrap.exists()
    child.kill()
    child.wait()
    child.stdout.close()
    deadline = time.monotonic() + 30
    watched = [bwrap, *(Path("/proc", pid) for pid in inner)]
    while any(path.exists() for path in watched) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(path.exists() for path in watched)


def test_a_bomb_does_not_stop_the_others(bubblewrap: None) -> None:
    bombs = [Program(LIMIT_ATTACKS[name][0]) for name in ("fork bomb", "memory by many processes", "endless loop")]
    with Sandbox(LIMITS, jobs=2) as pool:
        outcomes = pool.run([program for bomb in bombs for program in (bomb, RIGHT, RIGHT, RIGHT)], FAIR)
    for index, outcome in enumerate(outcomes):
        assert outcome.passed == (index % 4 != 0), outcome
