"""A test file that runs itself in two processes, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def torchrun(
    file: str, *argv: object, cwd: Path | None = None, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a Python file in two processes, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **variables}
    return subprocess.run(
        [*command, *map(str, argv)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout
    )


def write_results(folder: Path, rank: int, results: dict[str, Any]) -> None:
    """What one process found."""
    (folder / f"results-{rank}.json").write_text(json.dumps(results))


def results_of_two(file: str, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """What two processes found that ran a Python file, by rank."""
    done = torchrun(file, folder, **settings)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"results-{rank}.json").read_text("utf-8")) for rank in range(2)]
