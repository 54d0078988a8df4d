"""`vigor compare`: methods × seeds × worlds from one recipe, and what the difference between them shows."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vigor.reading import read_value
from vigor.terminal import printable, refuse

if TYPE_CHECKING:
    from vigor.compare.plan import Plan, Run
    from vigor.compare.runs import Failed
    from vigor.compare.table import Table

_EPILOG = """\
Any other --setting VALUE is one of `vigor train` and holds for all runs:

vigor compare --config lab --jobs 2                          seven methods, three seeds
vigor compare --config lab --worlds lab lab-misaligned
vigor compare --config math-qwen2.5-0.5b --prompts my.jsonl --methods base vigor random --max_steps 50
vigor compare --config lab-paper --jobs 2                    a comparison file

The same command again goes on where it stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vigor compare`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = (__doc__ or "").strip(), _EPILOG
    parser.add_argument("--config", required=True, help="a recipe of `vigor train`, or a comparison: name or file")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rewards, and `base` for the untrained model")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: 0 1 2")
    parser.add_argument("--worlds", nargs="+", metavar="MODEL", help="base models; default: the recipe's")
    parser.add_argument("--baseline", metavar="NAME", help="the method that others are held against; default: vigor")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time, a CPU thread each")
    parser.add_argument("--output_dir", type=Path, help="default: runs/compare-NAME")
    parser.add_argument("--dry_run", action="store_true", help="print the runs, touch nothing")


def compare(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs `vigor compare`; returns the exit status (0 done, 1 a run failed, 2 refused with a message)."""
    from vigor.compare.plan import make_plan, slug
    from vigor.compare.runs import check_settings, execute

    try:
        plan = make_plan(
            args.config,
            methods=args.methods,
            worlds=args.worlds,
            seeds=args.seeds,
            baseline=args.baseline,
            settings=read_settings(rest),
        )
        if args.jobs < 1:
            raise ValueError(f"--jobs {args.jobs}: at least 1 run at a time.")
        out: Path = args.output_dir or Path("runs") / f"compare-{slug(Path(args.config).stem)}"
        check_settings(out, plan.runs)
        if args.dry_run:
            print(printable(describe(plan, out)))
            return 0
        check_runs(out, plan)
    except (OSError, ValueError) as error:
        return refuse("compare", error)
    signal.signal(signal.SIGTERM, _end)
    failed = execute(out, plan.runs, jobs=args.jobs, say=lambda text: print(printable(text), flush=True))
    tables = write(out, plan, failed)
    _print(out, tables)
    for failure in failed:
        print(printable(f"{failure.run.name} failed: {failure.reason} (see {failure.log})."), file=sys.stderr)
    return 1 if failed else 0


def read_settings(rest: Sequence[str]) -> dict[str, Any]:
    """{"max_steps": 50} from ["--max_steps", "50"]; several values make a list, none makes True.

    Raises:
        ValueError: a value without a setting before it, or one that is not YAML.
    """
    given: dict[str, list[Any]] = {}
    name = None
    for part in rest:
        if part.startswith("--"):
            name, has_value, value = part[2:].partition("=")
            given[name] = [read_value(name, value)] if has_value else []
        elif name is None:
            raise ValueError(f"{part!r} stands without a --setting before it.")
        else:
            given[name].append(read_value(name, part))
    return {k: True if not v else v[0] if len(v) == 1 else v for k, v in given.items()}


def describe(plan: Plan, out: Path) -> str:
    """What would be run."""
    runs = plan.runs
    lines = [
        f"methods   {', '.join(method.name for method in plan.methods)}",
        f"worlds    {', '.join(world.name for world in plan.worlds)}",
        f"seeds     {', '.join(map(str, plan.seeds))}",
        f"baseline  {plan.baseline}",
        f"runs      {len(runs)}, in {out} (nothing is made: this is a dry run)",
        *(f"          {run.name}" for run in runs),
    ]
    return "\n".join(lines)


def check_runs(out: Path, plan: Plan) -> None:
    """Checks one unfinished run of each method and world as `vigor train` would, before any is started.

    Raises:
        ValueError, OSError: what `vigor train` would say.
    """
    from vigor.commands.job import prepare, quiet_third_parties
    from vigor.compare.runs import finished, folder_of

    quiet_third_parties()
    first: dict[tuple[str, str], Run] = {}
    for run in plan.runs:
        if not finished(folder_of(out, run)):
            first.setdefault((run.world, run.method), run)
    for run in first.values():
        free = out / ".check" / run.name  # never made
        try:
            prepare(["--output_dir", str(free)], run.settings)
        except SystemExit as stopped:  # the parser of TRL ends the process where a value cannot be read
            raise ValueError(f"{run.method}: a setting cannot be read, see above.") from stopped
        except (OSError, ValueError) as error:
            raise ValueError(f"{run.method}: {error}") from error


def write(out: Path, plan: Plan, failed: Sequence[Failed]) -> list[Table]:
    """Writes compare.json, compare.md and report.html from the runs that are finished; returns the tables."""
    from vigor.checkpoint import write_durably
    from vigor.compare import table
    from vigor.compare.outcomes import environments, outcomes
    from vigor.compare.plan import BASE
    from vigor.report import write_runs

    found = outcomes(out, plan.runs, base=any(method.name == BASE for method in plan.methods))
    tables = table.make_tables(plan, found)
    kinds = environments(found)
    content = {
        "command": shlex.join(["vigor", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": plan.source,
        "baseline": plan.baseline,
        "methods": {method.name: method.settings for method in plan.methods},
        "worlds": {world.name: world.settings for world in plan.worlds},
        "seeds": list(plan.seeds),
        "settings": plan.settings,
        "environments": kinds,
        "intervals": "Student's t over seeds, 95 %",
        "tables": [table.as_dict(made) for made in tables],
        "runs": [
            {
                "world": o.world,
                "method": o.method,
                "seed": o.seed,
                "folder": None if o.folder is None else str(o.folder.relative_to(out)),
                "tasks": o.tasks,
            }
            for o in found
        ],
        "failed": [{"run": failure.run.name, "reason": failure.reason} for failure in failed],
    }
    write_durably(out / "compare.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    head = (
        f"# Comparison: {plan.source}\n\nMade by `{content['command']}` on {str(content['date'])[:10]}: "
        f"{_machine(kinds)}; seeds {', '.join(map(str, plan.seeds))}.\n\n"
    )
    write_durably(out / "compare.md", head + table.markdown(tables))
    names = {o.folder: f"{o.method} · {o.world}" if len(plan.worlds) > 1 else o.method for o in found if o.folder}
    title = f"Comparison: {Path(plan.source).stem}"
    write_runs(list(names), out / "report.html", labels=list(names.values()), head=table.html(tables), title=title)
    return tables


def _print(out: Path, tables: Sequence[Table]) -> None:
    from rich.console import Console

    from vigor.compare.table import note, terminal

    console = Console()
    for made in tables:
        console.print(terminal(made))
    console.print(note(tables), highlight=False, markup=False)
    for text in (f"Tables: {out / 'compare.md'}, {out / 'compare.json'}", f"Report: {out / 'report.html'}"):
        console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def _machine(kinds: Sequence[dict[str, Any]]) -> str:
    if not kinds:
        return "no run is finished"
    first = kinds[0]
    hardware = ", ".join(first["gpus"]) or f"{first['cpu_count']} CPU cores, one thread a run"
    mixed = f" (runs were made by {len(kinds)} different versions, see compare.json)" if len(kinds) > 1 else ""
    return f"{hardware}, torch {first['packages']['torch']}, commit {first['commit']}{mixed}"


def _end(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)
