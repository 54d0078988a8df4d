"""A test file that runs itself in two processes, and what they leave.

As a program this file is the parent of such processes: it imports what they need, once, and forks them for each line
that it reads.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

Done = subprocess.CompletedProcess[str]


def torchrun(file: str, *argv: object, cwd: Path | None = None, timeout: float = 120, **variables: str) -> Done:
    """Runs a Python file in two processes, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **variables}
    return subprocess.run(
        [*command, *map(str, argv)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout
    )


def forked(
    file: str, *argv: object, processes: int = 2, cwd: Path | None = None, timeout: float = 120, **variables: str
) -> Done:
    """As `torchrun`, in forks of one parent, which costs no start of Python and no import; one process has no group.

    When one fails the others are killed. Their temporary folder is their own, and goes with them.
    """
    with tempfile.TemporaryDirectory(prefix="two-") as place, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        environment = {**os.environ, **variables, "TMPDIR": place}
        if processes > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        request = {"argv": [file, *map(str, argv)], "cwd": str(cwd or Path.cwd()), "environment": environment,
                   "processes": processes, "timeout": timeout, "place": place}  # fmt: skip
        parent = _parent()
        assert parent.stdin is not None
        assert parent.stdout is not None
        print(json.dumps(request), file=parent.stdin, flush=True)
        status = int(parent.stdout.readline())
        out, err = (Path(place, name).read_text("utf-8") for name in ("out", "err"))
    return Done(request["argv"], status, out, err)


@cache
def _parent() -> subprocess.Popen[str]:
    """The process whose forks run the files; it ends with this one."""
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def end() -> None:
        parent.communicate()

    atexit.register(end)
    return parent


def write_results(folder: Path, rank: int, results: dict[str, Any]) -> None:
    """What one process found."""
    (folder / f"results-{rank}.json").write_text(json.dumps(results))


def results_of_two(
    file: str, folder: Path, start: Callable[..., Done] = torchrun, **settings: Any
) -> list[dict[str, Any]]:
    """What two processes found that ran a Python file, by rank."""
    done = start(file, folder, **settings)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"results-{rank}.json").read_text("utf-8")) for rank in range(2)]


# The parent -----------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Forks the processes of each request, and says 0 when all ended well.

    No backward pass has run here, and none may: autograd's threads do not survive a fork.
    """
    import peft  # noqa: F401
    import torch

    import vigor.cli
    import vigor.commands.train
    import vigor.trainer  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        running: dict[int, int] = {}
        for rank in range(request["processes"]):
            if (child := os.fork()) == 0:
                become(request, rank)
                runpy.run_path(sys.argv[0], run_name="__main__")
                sys.exit()
            running[child] = rank
        print(ended(running, request["timeout"]), flush=True)


def ended(running: dict[int, int], timeout: float) -> int:
    """Waits for the processes, kills the rest when one fails or the time is over, and returns the first failure."""

    def late(*_: Any) -> None:
        for child in running:
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    worst = 0
    while running:
        child, status = os.wait()
        del running[child]
        if status and not worst:
            worst = abs(os.waitstatus_to_exitcode(status))
            late()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return worst


def become(request: dict[str, Any], rank: int) -> None:
    """Makes this fork one of the processes of a run."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["processes"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(request["cwd"])
    tempfile.tempdir = None
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for name, number in (("out", 1), ("err", 2)):
        with open(Path(request["place"], name), "a") as stream:
            os.dup2(stream.fileno(), number)
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    serve()
