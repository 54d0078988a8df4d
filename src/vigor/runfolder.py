"""The run folder: everything needed to repeat and to explain a run, always written.

config.yaml         resolved settings: `vigor train --config RUN/config.yaml` repeats the run
environment.json    versions, hardware, command, commit
metrics.jsonl       one line a log: step and every metric
completions/        one parquet file a log: text, every reward, advantage, length, truncated
tokens/             one parquet file a log: log-probability and entropy of each token, for a few of the completions
checkpoints/        what training can resume from
dumps/              steps that the guard stopped: `vigor replay`
run.lock            held by the process that writes here
model/              the trained model and its tokenizer
results.json        accuracies before and after, where they are known
report.html         the run on one page
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from vigor.checkpoint import Rejected, newest, write_durably
from vigor.disk import naming
from vigor.reading import NUMBER, check, read_json, read_settings, read_text

LOCK = "run.lock"
_SCORE = {
    "n_prompts?": int, "n_samples?": int, "greedy": NUMBER, "sampled": NUMBER, "entropy": NUMBER, "repetition": NUMBER,
    "mean_length": NUMBER, "pass_at_k": {str: NUMBER}, "majority_at_k": {str: NUMBER}, "greedy_interval?": [NUMBER],
    "sampled_interval?": [NUMBER],
}  # fmt: skip
SHAPES: dict[str, Any] = {
    "results.json": {"before": {str: _SCORE}, "after": {str: _SCORE}},
    "environment.json": {"packages": {str: (str, type(None))}, "commit": (str, type(None)), "platform": str,
                         "cpu_count": (int, type(None)), "gpus": [str]},
}  # fmt: skip
"""Of the JSON files, as far as anything reads them."""
PACKAGES = ("vigor-rl", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "math-verify")


class RunFolderError(ValueError):
    """The folder cannot be used for this run."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and writers of one run folder; the writers are for the main process only."""

    path: Path

    @classmethod
    def open(cls, path: str | Path, *, resume: bool = False) -> RunFolder:
        """Checks the folder without touching it.

        Raises:
            RunFolderError: it holds a run already and `resume` is False, it is a file, it cannot be made or written
                to, or `resume` finds nothing.
        """
        folder = cls(Path(path))
        above = next(each for each in (folder.path, *folder.path.absolute().parents) if os.path.lexists(each))
        if not above.is_dir():
            raise RunFolderError(f"{above} is a file. Name a folder with --output_dir.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise RunFolderError(
                f"{above} cannot be written to: it is read-only, or belongs to another user. Name a folder elsewhere "
                "with --output_dir."
            )
        used = folder.path.is_dir() and any(not _empty(path) for path in folder.path.iterdir())
        if used and not resume:
            raise RunFolderError(
                f"{path} is not empty. Continue that run with --resume, or start another with a new --output_dir."
            )
        found, rejected = folder.last_checkpoint(hashes=False) if resume else (None, [])
        if resume and found is None:
            raise RunFolderError(
                f"--resume: {folder.path / 'checkpoints'} holds no checkpoint. Start anew without --resume, in a new "
                "--output_dir; checkpoints are written every --save_steps optimizer steps."
                + "".join(f"\n  {each}" for each in rejected)
            )
        return folder

    def last_checkpoint(self, *, hashes: bool = True) -> tuple[Path | None, list[Rejected]]:
        """The whole checkpoint of the highest step, if there is any, and those passed over."""
        return newest(self.path / "checkpoints", hashes=hashes)

    @property
    def finished(self) -> bool:
        """Whether the run has written the last of its files."""
        return (self.path / "results.json").is_file() and (self.path / "report.html").is_file()

    def start(self, config: dict[str, Any]) -> None:
        """Makes the folder and writes config.yaml and environment.json; results and report of a run that goes on are
        those of its earlier end, and go."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        write_durably(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        self.write_json("environment.json", environment())

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file into the folder."""
        write_durably(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """The contents of environment.json or results.json.

        Raises:
            FileNotFoundError: there is none.
            ReadError: it is not what a run writes there.
        """
        content: dict[str, Any] = read_json(self.path / name, SHAPES[name])
        return content

    def read_config(self) -> dict[str, Any]:
        """The settings of the run.

        Raises:
            FileNotFoundError, ReadError: config.yaml is missing, or no settings.
        """
        return read_settings(self.path / "config.yaml")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl; NaN and infinity become null, which every JSON reader takes."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        path = self.path / "metrics.jsonl"
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with naming(path), path.open("a", encoding="utf-8") as stream:
            stream.write(("\n" if torn else "") + json.dumps(clean, ensure_ascii=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, ascending; of a step logged twice (before and after a resume) the last.

        A line that a crash cut off is left out.

        Raises:
            ReadError: the file is not text, or a whole line is no record of numbers by name.
        """
        path = self.path / "metrics.jsonl"
        if not os.path.lexists(path):
            return []
        records: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            check(record, {"step": int, str: (int, float, type(None))}, f"{path}:{number}")
            records[record["step"]] = record
        return [records[step] for step in sorted(records)]


def _empty(path: Path) -> bool:
    """Whether this is nothing that a run wrote: the lock, or a folder that was made for what never came."""
    return path.name == LOCK or (path.is_dir() and not any(path.iterdir()))


def environment() -> dict[str, Any]:
    """Versions, hardware and command of this process."""
    import torch

    return {
        "command": " ".join(sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the working folder, with "-dirty" where it has changes; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
