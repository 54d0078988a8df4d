"""Lets the disk be full at each write of a run in turn, frees it, resumes, and compares with the undisturbed run.

    OMP_NUM_THREADS=1 python benchmarks/diskfull.py --out docs/results/diskfull.md

The run is one of two steps that saves each, keeps one, and writes everything a run can: metrics, tables, checkpoints
with an EMA teacher, a dump of the guard, model and report. In three campaigns

  stays   the N-th call that takes space fails with ENOSPC, as do all after it, for each N: a disk that is full
  once    the N-th alone fails: a disk on which another process has made room again
  sizes   the folder lies on a tmpfs of so many bytes, for sizes from nothing to what the run needs

Calls are those to the kernel, of Python and of native libraries alike (diskfull.c, which is compiled with gcc and
preloaded): create, write, extend, rename, make a folder, sync. Whether that sees all of them is checked: the bytes
written to each file must be its size. A write of several bytes fails in its middle. The sizes need root, and go by
without the preloaded library: real short writes, and space that comes back when a file is deleted.

After each failure: the run ended with status 1 and a message on one screen that names a file of the run, says that no
space is left and what to do; or with status 0 and everything in place. No checkpoint is lost that was whole at that
moment, and each is what the undisturbed run had at its step. `vigor report` reads the folder. The model is whole or not
there. Then there is space: the run, resumed (or made again, where there was no checkpoint yet), must have the
undisturbed one's files, metrics, tables and weights. Runs are forks of this process, which has imported everything, and
do not draw the charts of the page, which would take most of their time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diskfull_runs import Call, Outcome

SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = "VIGOR_DISKFULL"
"""The variable that names the preloaded library."""
WAYS = {
    "stays": "every call from the N-th on",
    "once": "the N-th call alone",
    "sizes": "a tmpfs of so many bytes",
}


def evenly(items: Sequence[int], most: int) -> list[int]:
    """At most so many of them, the first and the last among these."""
    n = len(items)
    return sorted({items[i * (n - 1) // max(min(n, most) - 1, 1)] for i in range(min(n, most))})


def points(calls: Sequence[Call], repeated: int) -> list[int]:
    """Numbers of calls; of those that write to one file one after the other at most so many."""
    found: list[int] = []
    for _, same in itertools.groupby(calls, lambda call: (call.kind, call.path)):
        found += evenly([call.number for call in same], repeated)
    return found


def spread(items: Sequence[int]) -> list[int]:
    """In an order of which every beginning is spread over the whole."""
    return [items[i] for i in sorted(range(len(items)), key=lambda i: i * (5**0.5 - 1) / 2 % 1)]


def page(outcomes: Sequence[Outcome], calls: int, command: str, seconds: float) -> str:
    """The result as Markdown."""
    import torch

    lines = [
        "# Results: a full disk\n",
        f"`{command}`: a run of two steps that saves each and keeps one, its disk full at one place; then the next "
        f"run, with space. The undisturbed run takes space in {calls} calls. {date.today()}, {os.cpu_count()} vCPUs "
        f"({platform.machine()}) shared with other work, one thread, torch {torch.__version__}, seed 0, "
        f"{seconds / 60:.0f} minutes.\n",
        "| what fails with ENOSPC | runs | stopped, status 1 | refused, status 2 | went on | then resumed "
        "| then made again | faults |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(text, [each for each in outcomes if each.way == way]) for way, text in WAYS.items()),
        "\nBy what was being written, the first two ways together:\n",
        "| file | runs | stopped, status 1 | refused, status 2 | went on | then resumed | then made again | faults |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    called = sorted((each for each in outcomes if each.way != "sizes"), key=lambda each: each.at)
    files = dict.fromkeys(each.what.split(" ", 1)[1] for each in called)
    lines += [_row(f"`{file}`", [each for each in called if each.what.split(" ", 1)[1] == file]) for file in files]
    faults = [f"- {each.way} {each.at}, {each.what}: {'; '.join(each.problems)}" for each in outcomes if each.problems]
    return "\n".join([*lines, *(["", "Faults:", "", *faults] if faults else [])]) + "\n"


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    stopped, refused, on = (sum(each.status == status for each in outcomes) for status in (1, 2, 0))
    again = sum(each.first and each.status != 0 for each in outcomes)
    faults = sum(bool(each.problems) for each in outcomes)
    cells = len(outcomes), stopped, refused, on, len(outcomes) - on - again, again, faults
    return f"| {name} | {' | '.join(map(str, cells))} |"


def preload() -> None:
    """Starts this program again with the library; nothing where it is there."""
    if LIBRARY in os.environ:
        return
    library = Path(tempfile.mkdtemp()) / "diskfull.so"
    build(library)
    os.environ.update({LIBRARY: str(library), "LD_PRELOAD": str(library)})
    os.execv(sys.executable, [sys.executable, *sys.argv])


def build(library: Path) -> None:
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--repeated", type=int, default=3, metavar="N", help="writes to one file after each other")
    parser.add_argument("--sizes", type=int, default=60, metavar="N", help="of the tmpfs")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="for each way; what is left out is spread evenly"
    )
    parser.add_argument("--what", default="", metavar="REGEX", help="only calls whose kind and file match")
    parser.add_argument(
        "--last", action="store_true", help="of a file that is written in several steps the last step only"
    )
    parser.add_argument("--at", type=int, nargs="+", help="these calls or bytes only")
    parser.add_argument("--out", type=Path, help="write the result as a page")
    args = parser.parse_args()
    preload()
    import torch
    from diskfull_runs import PAGE, WHOLE, Campaign, group

    torch.set_num_threads(1)
    began = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        campaign = Campaign(Path(scratch))
        calls = campaign.straight.calls
        print(f"{len(calls)} calls, {campaign.straight.size:,} bytes", flush=True)
        named = {call.number: f"{call.kind} {group(os.path.relpath(call.path, campaign.run))}" for call in calls}
        chosen = [call for call in calls if re.match(args.what, named[call.number])]
        if args.last:
            paths = {named[call.number]: call.path for call in chosen}
            chosen = [call for call in chosen if call.path == paths[named[call.number]]]
        for way in args.ways:
            needed = range(PAGE, campaign.straight.size * 2, PAGE)
            places = evenly(needed, args.sizes) if way == "sizes" else points(chosen, args.repeated)
            until = time.monotonic() + args.minutes * 60
            for at in args.at or (places if way == "sizes" else spread(places)):
                if time.monotonic() > until:
                    break
                outcome = campaign.fit_into(at) if way == "sizes" else campaign.fail_at(at, way == "stays")
                outcomes.append(outcome)
                told = "".join(f"\n    {each}" for each in outcome.problems)
                print(outcome.way, outcome.at, outcome.what, outcome.status, "again" * outcome.first, told, flush=True)
                if outcome.what == WHOLE:
                    break
    command = " ".join(["benchmarks/diskfull.py", *sys.argv[1:]])
    written = page(outcomes, len(calls), command, time.monotonic() - began)
    print(written)
    if args.out:
        args.out.write_text(written, "utf-8")
    shutil.rmtree(Path(os.environ[LIBRARY]).parent)
    return int(any(each.problems for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
