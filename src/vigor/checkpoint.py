"""Checkpoints that are whole or not there: files, folders and hashes; what is in them is the trainer's affair.

A checkpoint is written into `.writing/` beside its place, every file and folder synced. `commit` lists sizes and
SHA-256 in manifest.json, renames the folder to `checkpoint-N`, and writes the marker, which holds the hash of the
manifest. `newest` takes nothing that lacks the marker or differs from its manifest, and says so. A kill at any moment
leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vigor.disk import naming
from vigor.reading import check

MANIFEST = "manifest.json"
MARKER = "COMMITTED"
WRITING = ".writing"
_SHAPE = {"about": dict, "files": {str: {"bytes": int, "sha256": str}}}
_DELETING, _REPLACED = ".deleting-", ".replaced-"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or cannot be resumed from."""


class LockedError(CheckpointError):
    """Another process is writing this folder."""


@dataclass(frozen=True)
class Rejected:
    """A folder that looks like a checkpoint and is none."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"{self.path} is not used: {self.why}"


# Writing --------------------------------------------------------------------------------------------------------------


def write_durably(path: Path, content: str | bytes) -> None:
    """Replaces a file at once: it holds the old content or the new one, after a crash of the machine too.

    Raises OSError, which names the file.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Makes every file and every folder below `folder` durable, and `folder` itself."""
    for here, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(here, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(here))


def clear(root: Path) -> None:
    """Removes what an interrupted process left beside the checkpoints; a replaced one whose successor was not finished
    comes back."""
    for replaced in root.glob(f"{_REPLACED}*"):
        place = root / replaced.name.removeprefix(_REPLACED)
        if fault(place, hashes=False) is not None:
            shutil.rmtree(place, ignore_errors=True)
            os.rename(replaced, place)
        else:
            shutil.rmtree(replaced)
    for leftover in (root / WRITING, *root.glob(f"{_DELETING}*")):
        if leftover.is_dir():
            shutil.rmtree(leftover)


def commit(root: Path, name: str, about: dict[str, Any]) -> Path:
    """Turns `root/.writing/name` into the checkpoint `root/name`. For one process, after all have written and synced.

    Args:
        root: the folder of the checkpoints.
        name: "checkpoint-N".
        about: what the manifest says besides the files: the number of processes and the like, as JSON.

    Returns the checkpoint's path. Raises OSError.
    """
    written, place = root / WRITING / name, root / name
    files = _hashes(written)
    manifest = json.dumps({"about": about, "files": files}, indent=1, sort_keys=True) + "\n"
    write_durably(written / MANIFEST, manifest)
    aside = None
    if place.exists():
        aside = root / ((_DELETING if fault(place, hashes=False) else _REPLACED) + name)
        os.rename(place, aside)
    os.rename(written, place)
    sync_folder(root)
    write_durably(place / MARKER, _sha256(manifest.encode()) + "\n")
    if aside is not None:
        shutil.rmtree(aside)
    shutil.rmtree(root / WRITING)
    return place


def discard(root: Path, name: str) -> None:
    """Removes what there is of a checkpoint that could not be finished, as far as the disk lets it; one that it was to
    replace comes back."""
    shutil.rmtree(root / WRITING, ignore_errors=True)
    with suppress(OSError):
        clear(root)
    if fault(root / name, hashes=False) is not None:
        shutil.rmtree(root / name, ignore_errors=True)


def rotate(root: Path, keep: int | None, best: str | None) -> list[Path]:
    """Deletes all but the newest `keep` whole checkpoints (None or 0: all stay) and the one named `best`.

    What is no whole checkpoint neither counts nor goes. Returns what was deleted.
    """
    if not keep or keep < 0:
        return []
    whole = [path for path in _candidates(root) if fault(path, hashes=False) is None]
    deleted = [path for path in whole[keep:] if path.name != best]
    for path in deleted:
        gone = root / f"{_DELETING}{path.name}"
        os.rename(path, gone)  # at once, where a deletion cut off would leave half a checkpoint
        shutil.rmtree(gone)
    return deleted


# Reading --------------------------------------------------------------------------------------------------------------


def newest(root: Path, *, hashes: bool = True) -> tuple[Path | None, list[Rejected]]:
    """The whole checkpoint of the highest step, and those of higher steps that were passed over, with the reasons."""
    rejected: list[Rejected] = []
    for path in _candidates(root):
        why = fault(path, hashes=hashes)
        if why is None:
            return path, rejected
        rejected.append(Rejected(path, why))
    return None, rejected


def fault(folder: Path, *, hashes: bool = True) -> str | None:
    """Why a folder is no whole checkpoint; None if it is one.

    Args:
        folder: the folder.
        hashes: compare contents; else only the marker, the names and the sizes.
    """
    marker, manifest = folder / MARKER, folder / MANIFEST
    if not folder.is_dir():
        return "there is no such folder"
    if not marker.is_file() or not manifest.is_file():
        return f"it has no {(MARKER if manifest.is_file() else MANIFEST)}, so that it was never finished"
    text = manifest.read_bytes()
    if marker.read_text("utf-8", errors="replace").strip() != _sha256(text):
        return f"{MANIFEST} is not the one that {MARKER} was written for"
    try:
        content = json.loads(text)
        check(content, _SHAPE, MANIFEST)
    except ValueError as error:
        return f"{MANIFEST} is none ({error})"
    listed: dict[str, dict[str, Any]] = content["files"]
    for name, entry in listed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != entry["bytes"]:
            return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
    if hashes:
        found = _hashes(folder, list(listed))
        for name, entry in listed.items():
            if found[name]["sha256"] != entry["sha256"]:
                return f"{name} has changed since it was written (its SHA-256 differs)"
    return None


def about(folder: Path) -> dict[str, Any]:
    """What the manifest of a whole checkpoint says besides its files."""
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))["about"]
    return found


def step_of(folder: Path) -> int:
    """The optimizer step of `checkpoint-N`."""
    return int(folder.name.removeprefix("checkpoint-"))


def _candidates(root: Path) -> list[Path]:
    """Folders named checkpoint-N, newest first."""
    named = [path for path in root.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted((path for path in named if path.is_dir()), key=step_of, reverse=True)


def _hashes(folder: Path, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """{name: bytes and sha256} of the files below a folder."""
    if names is None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    stats = [(folder / name).stat() for name in names]
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        digests = pool.map(_sha256_file, [folder / n for n in names], [(s.st_size, s.st_mtime_ns) for s in stats])
        return {
            name: {"bytes": s.st_size, "sha256": digest} for name, s, digest in zip(names, stats, digests, strict=True)
        }


@lru_cache(maxsize=4096)
def _sha256_file(path: Path, signature: tuple[int, int]) -> str:
    """Kept for as long as size and time of the file stay, so that a resume reads each file once."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# One writer -----------------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Holds a folder for this process; the kernel lets go of it when the process ends, however it ends.

    The lock belongs to the process: it is not inherited by children, and a second one by the same process is granted.

    Raises:
        LockedError: another process holds it.
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("ab+", buffering=0) as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().decode("utf-8", "replace").strip() or "another process"
            raise LockedError(
                f"{folder} is being written to by {holder}. Wait until that run ends, stop it, or give this run "
                "another --output_dir."
            ) from error
        with naming(folder / name):
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
