"""Run generated programs and learn what came of each: the entrance to the sandbox."""

from __future__ import annotations

import itertools
import os
import queue
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from vigor.evaluation.sandbox import local
from vigor.evaluation.sandbox.process import Zygote
from vigor.evaluation.sandbox.programs import Limits, Outcome, Program
from vigor.evaluation.sandbox.worker import Worker

UNSAFE = (
    "unsafe_local_exec=True: generated code runs with YOUR rights on THIS machine. It can read, change and delete your "
    "files, read your keys and tokens, use the network, and stay behind. Do this only in a machine that you can throw "
    "away."
)


class Sandbox:
    """A pool of reused sandboxes. Use it in a ``with`` block, or `close` it.

    One instance belongs to the process that made it; several threads may call `run`.
    """

    def __init__(self, limits: Limits | None = None, *, jobs: int | None = None, unsafe_local_exec: bool = False):
        """``jobs``: programs at a time; None: the CPUs that this process may use.

        The first sandbox is started at once, so that a machine without bubblewrap is refused here.

        Raises:
            SandboxUnavailable: no sandbox can run here; the message names the remedy.
            ValueError: fewer than one job.
        """
        self.jobs = len(os.sched_getaffinity(0)) if jobs is None else jobs
        if self.jobs < 1:
            raise ValueError(f"jobs={jobs}: at least one program must run at a time")
        self.limits = limits or Limits()
        self._unsafe = unsafe_local_exec
        if unsafe_local_exec:
            warnings.warn(UNSAFE, RuntimeWarning, stacklevel=2)
        # A sandbox dies with the thread that started it, so threads live as long as the pool.
        self._threads = ThreadPoolExecutor(self.jobs, thread_name_prefix="sandbox")
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._workers = [Worker() for _ in range(0 if unsafe_local_exec else self.jobs)]
        for worker in self._workers:
            self._idle.put(worker)
        if not unsafe_local_exec:
            check()

    def run(self, programs: Sequence[Program], limits: Limits | None = None) -> list[Outcome]:
        """One outcome a program, in their order; ``limits``: of this call, None: of the pool.

        Raises SandboxUnavailable where a sandbox cannot be started.
        """
        return list(self._threads.map(self._run_one, programs, itertools.repeat(limits or self.limits)))

    def close(self) -> None:
        """Wait for programs in flight, end all sandboxes and wait until they are gone."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_one(self, program: Program, limits: Limits) -> Outcome:
        if self._unsafe:
            return local.run(program, limits)
        worker = self._idle.get()
        try:
            return worker.run(program, limits)
        finally:
            self._idle.put(worker)


def check() -> None:
    """Start a sandbox and end it. Raises SandboxUnavailable, with the reason and the remedy, where that fails."""
    zygote = Zygote()
    try:
        zygote.start()
    finally:
        zygote.close()


def run(
    programs: Sequence[Program],
    *,
    timeout: float = 10.0,
    memory: int = 2**30,
    jobs: int | None = None,
    unsafe_local_exec: bool = False,
) -> list[Outcome]:
    """Run programs in a pool of their own; one outcome a program, in their order.

    ``timeout``: wall-clock seconds a program; ``memory``: bytes; ``jobs``: programs at a time, None: the CPUs. Raises
    as `Sandbox` does.
    """
    limits = Limits(timeout_s=timeout, memory_bytes=memory)
    with Sandbox(limits, jobs=jobs, unsafe_local_exec=unsafe_local_exec) as sandbox:
        return sandbox.run(programs)
