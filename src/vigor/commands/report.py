"""`vigor report`: one page, without network or scripts, for one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from vigor.reading import read_json
from vigor.terminal import printable, refuse

_RUN = {"folder": (str, type(None)), "method": str, "world": str}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vigor report`."""
    parser.description = (__doc__ or "").strip()
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or the folder of a comparison")
    parser.add_argument(
        "--out", type=Path, help="the page; default: report.html in the folder, where there is one only"
    )
    parser.add_argument("--title", default="", help="of the page")


def report(args: argparse.Namespace) -> int:
    """Runs `vigor report`; returns the exit status (0 done, 2 refused with a message)."""
    from vigor.report import write_runs

    try:
        out = args.out or _default(args.runs)
        comparisons = [path for path in args.runs if (path / "compare.json").is_file()]
        if not comparisons:
            write_runs(args.runs, out, title=args.title)
        elif len(args.runs) > 1:
            raise ValueError(f"{comparisons[0]} is a comparison: give it alone, or name run folders of its runs/.")
        else:
            _comparison(comparisons[0], out, args.title)
    except (OSError, ValueError) as error:
        return refuse("report", error)
    print(f"Report: {printable(out)}")
    return 0


def _comparison(folder: Path, out: Path, title: str) -> None:
    from vigor.compare.table import SHAPE as TABLE
    from vigor.compare.table import from_dict, html
    from vigor.report import write_runs

    content = read_json(folder / "compare.json", {"runs": [_RUN], "worlds": dict, "tables": [TABLE]})
    runs = [run for run in content["runs"] if run["folder"] is not None]
    several = len(content["worlds"]) > 1
    labels = [f"{run['method']} · {run['world']}" if several else run["method"] for run in runs]
    tables = [from_dict(table) for table in content["tables"]]
    write_runs([folder / run["folder"] for run in runs], out, labels=labels, head=html(tables), title=title)


def _default(runs: list[Path]) -> Path:
    if len(runs) > 1:
        raise ValueError("name the page with --out FILE.html: there are several runs.")
    return runs[0] / "report.html"
