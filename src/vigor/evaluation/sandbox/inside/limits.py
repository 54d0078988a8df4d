"""What a process does to itself before it runs a program: the kernel's limits, and closing itself to others' eyes."""

from __future__ import annotations

import ctypes
import resource
import signal

FILE_BYTES = 64 * 2**20
"""Size of one file, and of all files in each of the sandbox's scratch folders."""
_STACK_BYTES = 64 * 2**20
_OPEN_FILES = 256
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24


def apply(timeout_s: float, memory_bytes: int, tasks: int | None) -> None:
    """Limit CPU time, address space, stack, processes and files of this process and of what it starts.

    ``tasks``: processes and threads of this user id, None for no limit (outside a sandbox the id is shared).
    """
    _cap(resource.RLIMIT_CPU, int(timeout_s) + 2)
    _cap(resource.RLIMIT_AS, memory_bytes)
    _cap(resource.RLIMIT_STACK, min(memory_bytes // 4, _STACK_BYTES))
    _cap(resource.RLIMIT_FSIZE, FILE_BYTES)
    _cap(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _cap(resource.RLIMIT_MEMLOCK, 0)
    _cap(resource.RLIMIT_CORE, 0)
    if tasks is not None:
        _cap(resource.RLIMIT_NPROC, tasks)


def _cap(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def drop_bounding_set() -> None:
    """No later program file can give a capability back."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        _prctl(_PR_CAPBSET_DROP, capability)


def drop_capabilities() -> None:
    """Empty the permitted, effective and inheritable sets."""
    # struct __user_cap_header_struct (version 3, this process) and two times effective, permitted, inheritable.
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset failed")


def close_to_others() -> None:
    """Make this process undumpable: others of the same user can neither trace it nor read its memory and files."""
    _prctl(_PR_SET_DUMPABLE, 0)


def die_with_parent() -> None:
    """Be killed when the parent ends. A change of user id clears this, so it comes after."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")
