"""The before/after table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vigor.runfolder import RunFolder
from vigor.terminal import printable


@dataclass(frozen=True)
class TableRow:
    """One accuracy before and after training; numbers are shares in [0, 1]."""

    task: str
    decoding: str
    before: float
    before_interval: tuple[float, float]
    after: float
    after_interval: tuple[float, float]

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def apart(self) -> bool:
        """True if the two 95 % intervals do not overlap."""
        return self.after_interval[0] > self.before_interval[1] or self.after_interval[1] < self.before_interval[0]


def before_after(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[TableRow]:
    """The rows of the table from the contents of results.json."""
    rows = []
    for task, after in results["after"].items():
        before = results["before"][task]
        for decoding in ("greedy", "sampled"):
            interval = f"{decoding}_interval"
            rows.append(
                TableRow(
                    task,
                    decoding,
                    before[decoding],
                    tuple(before[interval]),
                    after[decoding],
                    tuple(after[interval]),
                )
            )
    return rows


def print_results(folder: RunFolder) -> None:
    """Prints the table, where there is one, and where everything lies."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    results = folder.read_json("results.json")
    rows = before_after(results)
    if rows:
        first = next(iter(results["after"].values()))
        table = Table(
            title=f"Accuracy before and after ({first['n_prompts']} test prompts a task, {first['n_samples']} samples "
            "each, 95 % intervals)",
            title_justify="left",
        )
        for name in ("task", "decoding", "before", "after", "change"):
            table.add_column(name, justify="left" if name in ("task", "decoding") else "right")
        for row in rows:
            colour = "" if not row.apart else "green" if row.change > 0 else "red"
            change = f"{100 * row.change:+.1f}"
            table.add_row(
                row.task,
                row.decoding,
                percent(row.before, row.before_interval),
                percent(row.after, row.after_interval),
                f"[{colour}]{change}[/]" if colour else change,
            )
        console.print(table)
        prompts = folder.read_config()["prompts"]
        told = printable(f"Trained on {prompts}; the other tasks had no part in this training.")
        console.print(told, highlight=False, markup=False)
    where = {"Run folder": f"{folder.path}  (model/, metrics.jsonl, curves.png)", "Report": folder.path / "report.html"}
    for name, path in where.items():
        console.print(printable(f"{name}: {path}"), highlight=False, markup=False, soft_wrap=True)


def percent(value: float, interval: tuple[float, float]) -> str:
    """A share and its interval in percent, such as "43.5 [40.1, 46.9]"."""
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
