"""The bubblewrap command line: what a sandbox sees of this machine, and whether one can run here.

Seen, read-only: /usr with the links into it, the dynamic linker's cache, Python's own folders and this package's
`inside`. Writable: /tmp and /dev/shm, each private, in memory, and of limited size. No network, own process ids,
host name, IPC and cgroup view, no capabilities, no environment.

Started by root, bubblewrap makes the mounts with root's rights and process 1 then becomes a user id that nothing else
on the machine has, without capabilities. Started by anyone else it makes a user namespace. (A user namespace made by
root would leave root's own id to the program, which the kernel exempts from the limit on processes.)
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from vigor.evaluation.sandbox.inside.limits import FILE_BYTES
from vigor.evaluation.sandbox.programs import SandboxUnavailable

INSIDE = Path(__file__).parent / "inside"
OLDEST = (0, 7, 0)
"""The first bubblewrap with --size."""
REMEDY = (
    "Remedies: install bubblewrap 0.7 or newer (Debian, Ubuntu: `apt-get install bubblewrap`; Fedora: `dnf install "
    "bubblewrap`); in a container, allow user namespaces or run it privileged; or name a SandboxFusion server; or, in "
    "a machine that you can throw away, run without any isolation: unsafe_local_exec=True. See docs/sandbox.md."
)
_MAIN = "import sys; sys.path.insert(0, '/sandbox'); from vigor_sandbox.zygote import main; sys.path.pop(0); main()"
_FIRST_FREE_USER = 1_900_000_000
_SCRATCH = ("/tmp", "/dev")
_LINKER = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime")


def find() -> str:
    """The path of a bubblewrap that can be used. Raises SandboxUnavailable with the remedy."""
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable(f"the sandbox needs Linux, and this is {sys.platform}. {REMEDY}")
    path = shutil.which("bwrap")
    if path is None:
        raise SandboxUnavailable(f"generated code runs in bubblewrap, and there is no `bwrap` on PATH. {REMEDY}")
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, env={}).stdout
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", answer)
    if found is None or tuple(map(int, found.groups())) < OLDEST:
        raise SandboxUnavailable(f"{path} is {answer.strip() or 'of an unknown version'}; 0.7.0 is needed. {REMEDY}")
    return path


def command(bwrap: str, control: int, seccomp: int, info: int) -> list[str]:
    """Argument list that starts process 1 of a sandbox.

    ``control``, ``seccomp``, ``info``: descriptors of the control socket, of the system call filter and of the pipe on
    which bubblewrap names its child. Raises SandboxUnavailable where Python's folders hold the home folder.
    """
    as_root = os.geteuid() == 0
    arguments = [bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if not as_root:
        arguments += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    arguments += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    if as_root:
        arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
    arguments += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        folder = Path("/", name)
        if folder.is_symlink():
            arguments += ["--symlink", os.readlink(folder), str(folder)]
        else:
            arguments += ["--ro-bind-try", str(folder), str(folder)]
    for file in _LINKER:
        arguments += ["--ro-bind-try", file, file]
    scratch = ["--perms", "1777", "--size", str(FILE_BYTES), "--tmpfs"]
    arguments += ["--proc", "/proc", "--dev", "/dev", *scratch, "/dev/shm", "--remount-ro", "/dev", *scratch, "/tmp"]
    folders = python_folders()
    for folder, shown in folders.items():
        # Made here with their mode: bubblewrap's own choice would close them to the user id of process 1.
        for parent in list(shown.parents)[-2::-1]:
            arguments += ["--perms", "0755", "--dir", str(parent)]
        arguments += ["--ro-bind", str(folder), str(shown)]
    arguments += ["--ro-bind", str(INSIDE), "/sandbox/vigor_sandbox", "--remount-ro", "/", "--chdir", "/tmp"]
    arguments += ["--seccomp", str(seccomp), "--info-fd", str(info)]
    user = _FIRST_FREE_USER + secrets.randbelow(100_000_000) if as_root else -1
    python = str(_shown(Path(sys.executable), folders))
    return [*arguments, "--", python, "-I", "-B", "-c", _MAIN, str(control), str(user)]


def python_folders() -> dict[Path, Path]:
    """Python's own folders outside /usr, to be shown read-only, and where: the installation and the environment.

    Raises SandboxUnavailable where one holds the home folder, or where the installation is in a scratch folder.
    """
    home = Path.home().resolve()
    folders: dict[Path, Path] = {}
    for name in (sys.base_prefix, sys.base_exec_prefix, sys.prefix):
        folder = Path(name)
        if folder.is_relative_to("/usr"):
            continue
        if home.is_relative_to(folder.resolve()):
            raise SandboxUnavailable(
                f"Python lies in {folder}, which holds the home folder {home}: the sandbox would show it all. Remedy: "
                "run vigor from a virtual environment of a Python that has a folder of its own."
            )
        folders[folder] = folder
        if any(folder.is_relative_to(scratch) for scratch in _SCRATCH):
            if name == sys.base_prefix:
                raise SandboxUnavailable(
                    f"Python is installed in {folder}, and the sandbox has a {folder.parts[1]} of its own. Remedy: use "
                    "a Python that is installed elsewhere; a virtual environment may be there."
                )
            folders[folder] = Path("/environment")
    return folders


def _shown(file: Path, folders: dict[Path, Path]) -> Path:
    for folder, shown in folders.items():
        if file.is_relative_to(folder):
            return shown / file.relative_to(folder)
    return file


ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""All that a program finds in its environment. One thread: a library's pool of threads would eat the address space."""
