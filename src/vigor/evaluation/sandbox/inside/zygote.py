"""Process 1 of a sandbox: forks a fresh child for each program, watches it, and leaves nothing behind.

As process 1 of a pid namespace it can be neither killed nor stopped from inside, inherits every orphan, and its own end
ends all of them. It never reads a program or a test: it hands descriptors on, so no child finds an earlier one's text
in its memory.

One message a request on the control socket (JSON, with the descriptors attached):
``{"role", "timeout_s", "memory_bytes", "tasks"}`` and payload, stdin, stdout, stderr, then for a candidate with
tests, or for the judge, the call socket, and for the judge the verdict pipe. ``{"stop": true}`` ends the child early.
One reply: ``{"code", "reason", "seconds", "spent"}``: exit status (negative: signal), why the child was ended if it
was (``timeout``, ``memory``, ``processes``, ``files``, ``stopped``, ``left_running``), wall-clock seconds, and whether
this sandbox must not be used again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import socket
import stat
import sys
import time
import traceback
from typing import Any

from . import judge, limits, program

SCRATCH = ("/tmp", "/dev/shm")
MAX_FILES = 4096
"""Files, folders and links in the scratch folders; more end the program."""
MAX_FILES_REMOVED = 1000
"""With more of them it is quicker to start a new sandbox than to empty this one."""
_OFTEN_IMPORTED = (
    *("bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "io", "itertools"),
    *("json", "math", "operator", "random", "re", "statistics", "string", "sys", "threading", "typing"),
)
_TICK_S = 0.02
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CLOCK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Arguments: the control socket's descriptor, and the user id to take (-1: keep)."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    _become(int(sys.argv[2]))
    # A handler would make the signal deliverable to process 1; without one the kernel drops it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _preload()
    control.send(b'{"ready": true}')
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 65536, 8, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return
        request = json.loads(message)
        if "stop" in request:  # for a child that has ended meanwhile
            continue
        control.send(json.dumps(_serve(control, request, descriptors)).encode())


def _become(user: int) -> None:
    """Give up what is left of root, close this process to its children's eyes, and make sure of both."""
    if user >= 0:
        limits.drop_bounding_set()
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    limits.drop_capabilities()
    limits.close_to_others()
    limits.die_with_parent()
    with open("/proc/self/status") as file:
        fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(fields[name], 16):
            raise RuntimeError(f"the sandbox kept capabilities: {name} {fields[name]}")
    if fields["NoNewPrivs"] != "1" or fields["Seccomp"] != "2" or os.getpid() != 1:
        raise RuntimeError("the sandbox lacks no_new_privs, its system call filter or its pid namespace")


def _preload() -> None:
    """Import what programs often import, once for all of them."""
    for name in _OFTEN_IMPORTED:
        importlib.import_module(name)


def _serve(control: socket.socket, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            control.close()
            code = _child(request, descriptors)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    for descriptor in descriptors:
        os.close(descriptor)
    reason = _watch(control, child, started + request["timeout_s"], request)
    status = _end_all(child)
    seconds = time.monotonic() - started
    return {"code": status, "reason": reason, "seconds": seconds, "spent": not _empty_scratch()}


def _child(request: dict[str, Any], descriptors: list[int]) -> int:
    payload_fd, *standard = descriptors[:4]
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(payload_fd, "rb") as file:
        payload = json.load(file)
    for descriptor in standard:
        os.close(descriptor)
    limits.apply(request["timeout_s"], request["memory_bytes"], request["tasks"])
    connection = socket.socket(fileno=descriptors[4]) if len(descriptors) > 4 else None
    if request["role"] == "program":
        return program.run(payload, connection)
    assert connection is not None
    verdict = judge.judge(payload, connection)
    with open(descriptors[5], "wb") as file:
        file.write(json.dumps(verdict).encode("ascii"))
    return 0


def _watch(control: socket.socket, child: int, deadline: float, request: dict[str, Any]) -> str | None:
    """Wait for the child's end; why it must be ended, or what it left behind, if anything."""
    handle = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.register(control, select.POLLIN)
        while True:
            events = dict(poll.poll(min(_TICK_S, max(0.0, deadline - time.monotonic())) * 1000))
            if handle in events:
                tasks, _, _ = _usage(skip=child)
                return "left_running" if tasks else None
            if control.fileno() in events:
                if not control.recv(65536):
                    os._exit(0)  # the parent is gone; the namespace goes with this process
                return "stopped"
            if time.monotonic() >= deadline:
                return "timeout"
            tasks, memory_bytes, cpu_s = _usage(skip=0)
            if tasks >= request["tasks"] - 1:
                return "processes"
            if memory_bytes > request["memory_bytes"]:
                return "memory"
            if cpu_s > request["timeout_s"] * 2 + 1:
                return "timeout"
            if _files() > MAX_FILES:
                return "files"
    finally:
        os.close(handle)


def _usage(skip: int) -> tuple[int, int, float]:
    """Tasks (threads), resident bytes and CPU seconds of all live processes but this one and ``skip``."""
    tasks, resident, cpu_s = 0, 0, 0.0
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[1]) * _PAGE
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in (1, skip):
            continue
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] in "ZX":
            continue
        tasks += int(fields[17])
        # What it shares with this process since the fork is no memory of its own.
        resident += max(0, int(fields[21]) * _PAGE - own)
        cpu_s += sum(map(int, fields[11:15])) / _CLOCK
    return tasks, resident, cpu_s


def _end_all(child: int) -> int | None:
    """Kill whatever else lives in this namespace, reap it, and return the child's exit status."""
    code = None
    with contextlib.suppress(ProcessLookupError):
        # Spares this process; the kernel lets no fork slip through between.
        os.kill(-1, signal.SIGKILL)
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)


def _files() -> int:
    used = 0
    for folder in SCRATCH:
        status = os.statvfs(folder)
        used += status.f_files - status.f_ffree
    return used


def _empty_scratch() -> bool:
    """Empty the only writable folders. False where that would take long or did not work."""
    if _files() > MAX_FILES_REMOVED:
        return False
    try:
        for folder in SCRATCH:
            for entry in os.scandir(folder):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
            if os.listdir(folder) or stat.S_IMODE(os.stat(folder).st_mode) != 0o1777:
                return False
    except (OSError, RecursionError):
        return False
    return True
