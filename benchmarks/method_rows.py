"""The lab's row on each method's page, from what a comparison wrote.

    vigor compare --config lab-methods --jobs 2
    python benchmarks/method_rows.py runs/compare-lab-methods lab-methods

Writes docs/results/NAME.md and .json, and on the page of each method that was compared the section "In the lab": the
untrained base, the baseline, and every line of the comparison whose name begins with the method's. A section that is
there is kept as far as this script did not write it.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from vigor.compare.plan import BASE
from vigor.compare.table import Table, from_dict, written
from vigor.rewards import METHODS

DOCS = Path(__file__).parents[1] / "docs"
KEPT = ("command", "date", "config", "baseline", "methods", "seeds", "settings", "environments", "tables")
"""What of compare.json goes under docs/results; the runs' own numbers stay behind."""
SECTION = "## In the lab"
TASKS = ("lab:math", "lab:math-hard", "lab:code")
_UNMEASURED = re.compile(r"\n+Not measured in the lab[^\n]*(?:\n[^\n]+)*\n")
_WRITTEN = re.compile(r"\n+\| after training \|(?s:.*?)\.md\)\.\n")


def trained_with(line: dict[str, Any]) -> str:
    """What a line of the comparison trains with, as flags."""
    settings = {key: value if isinstance(value, list) else [value] for key, value in line.items()}
    return " ".join(f"--{key} {' '.join(map(str, values))}" for key, values in settings.items())


def rows_for(method: str, tables: dict[str, Table], content: dict[str, Any], name: str) -> str:
    """The table of one method, and how to read it."""
    first = tables[TASKS[0]]
    own = [row.method for row in first.rows if row.method.split()[0] == method and row.method != first.baseline]
    made = [
        "| after training | `lab:math` | `lab:math-hard` | `lab:code` | greedy `lab:math` |",
        "|---|---:|---:|---:|---:|",
    ]
    for shown in (BASE, first.baseline, *own):
        by_task = {task: next(row for row in table.rows if row.method == shown) for task, table in tables.items()}
        cells = [written("sampled", by_task[task].metrics["sampled"]) for task in TASKS]
        cells.append(written("greedy", by_task[TASKS[0]].metrics["greedy"]))
        label = "base model, untrained" if shown == BASE else shown if " " in shown else f"`{shown}`"
        made.append(f"| {label} | {' | '.join(cells)} |")
    verdicts = {row.method: row.verdict for row in first.rows}
    said = "; ".join(f"{one}, `{trained_with(content['methods'][one])}`: {verdicts[one]}" for one in own)
    seeds = first.rows[-1].n_seeds
    spread = "one seed, so nothing is decided" if seeds == 1 else f"mean ± 95 % interval over {seeds} seeds"
    text = (
        f"Accuracy in percent after {content['settings']['max_steps']} steps on `{content['settings']['prompts']}`, "
        f"sampled at temperature 1 unless it says greedy, {spread}. "
        f"Sampled `{TASKS[0]}`, in points: {said}. [Command, hardware and date](../results/{name}.md)."
    )
    made += ["", *textwrap.wrap(text, 128, break_long_words=False, break_on_hyphens=False)]
    return "\n".join(made) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of vigor compare")
    parser.add_argument("name", help="of the results under docs/results")
    args = parser.parse_args()
    content = json.loads((args.folder / "compare.json").read_text("utf-8"))
    tables = {table["task"]: from_dict(table) for table in content["tables"]}
    results = DOCS / "results" / args.name
    results.with_suffix(".md").write_text((args.folder / "compare.md").read_text("utf-8"), "utf-8")
    results.with_suffix(".json").write_text(
        json.dumps({key: content[key] for key in KEPT}, indent=1, ensure_ascii=False) + "\n", "utf-8"
    )
    baseline = next(iter(tables.values())).baseline
    for method in dict.fromkeys(line.split()[0] for line in content["methods"] if line not in (BASE, baseline)):
        if method not in METHODS:
            raise SystemExit(f"{method!r} names no method: a line's first word says on whose page it stands.")
        page = DOCS / "methods" / f"{method}.md"
        text = _WRITTEN.sub("\n", _UNMEASURED.sub("\n", page.read_text("utf-8"))).rstrip()
        text += f"\n\n{SECTION}\n\n" if SECTION not in text else "\n\n"
        page.write_text(text + rows_for(method, tables, content, args.name), "utf-8")


if __name__ == "__main__":
    main()
