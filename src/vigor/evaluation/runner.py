"""Where the programs of an evaluation run: the sandbox of this machine, unless `runs_on` names another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from vigor.evaluation.code_tasks import Runner, default_runner

_chosen: list[Runner] = []


@contextmanager
def runs_on(runner: Runner) -> Iterator[None]:
    """Within the block, generated code runs on ``runner``."""
    _chosen.append(runner)
    try:
        yield
    finally:
        _chosen.pop()


def current() -> Runner:
    """The runner at hand; without a choice this process's pool of bubblewrap sandboxes."""
    return _chosen[-1] if _chosen else default_runner(os.getpid())
