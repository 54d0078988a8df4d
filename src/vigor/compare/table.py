"""The table of a comparison: a row a method, a table a (world, task), and its four forms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from vigor.compare.outcomes import Outcome
from vigor.compare.plan import BASE, Plan
from vigor.compare.statistics import Estimate, estimate, paired_difference, verdict
from vigor.reading import NUMBER, ReadError
from vigor.terminal import printable

if TYPE_CHECKING:
    from rich.console import Group

PRIMARY = "sampled"
"""The metric that the verdicts are about."""
_PERCENT = ("sampled", "greedy", "pass@", "majority@", "repetition")
_COLUMN = re.compile(r"sampled|greedy|(pass|majority)@\d{1,9}|entropy|length|repetition|seconds")
_ORDER = ("sampled", "greedy", "pass@", "majority@", "entropy", "length", "repetition", "seconds")
_DIGITS = {"entropy": 3, "length": 1, "seconds": 0}
NOTE = (
    "Mean over seeds ± half of the 95 % interval (Student's t over seeds). Accuracies and repetition in percent, "
    "entropy in nats a token, length in tokens, seconds of training. The verdict is on the sampled accuracy, from the "
    "differences between runs of the same seed, which meet the same prompts in the same order; its interval holds the "
    "spread between runs, not that between test prompts, which are the same for all."
)


@dataclass(frozen=True)
class Row:
    """A method: the estimate of each metric, the paired difference of sampled accuracy, and what it shows."""

    method: str
    n_seeds: int
    metrics: dict[str, Estimate]
    difference: Estimate | None
    verdict: str


@dataclass(frozen=True)
class Table:
    """All methods in one world on one task."""

    world: str
    task: str
    baseline: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """World and task."""
        return f"{self.world}: {self.task}"

    @property
    def n_verdicts(self) -> int:
        """How many intervals are looked at."""
        return sum(row.difference is not None and row.difference.half is not None for row in self.rows)


def make_tables(plan: Plan, found: Sequence[Outcome]) -> list[Table]:
    """A table for each world and task that any run was scored on, methods in the order of the plan."""
    tables = []
    for world in plan.worlds:
        here = [outcome for outcome in found if outcome.world == world.name]
        for task in dict.fromkeys(task for outcome in here for task in outcome.tasks):
            values = {
                method.name: {o.seed: o.tasks[task] for o in here if o.method == method.name and task in o.tasks}
                for method in plan.methods
            }
            rows = tuple(_row(name, seeds, values[plan.baseline], plan.baseline) for name, seeds in values.items())
            tables.append(Table(world.name, task, plan.baseline, _columns(rows), rows))
    return tables


def shown(columns: Sequence[str]) -> list[str]:
    """The columns for people: of the metrics at k, the largest k only."""
    kinds = {column.split("@")[0]: column for column in columns}  # ascending k: the last stays
    return list(kinds.values())


def cells(table: Table) -> list[list[str]]:
    """The heads, then a row a method, as text."""
    names = shown(table.columns)
    return [
        ["method", *names, "seeds", "verdict"],
        *(
            [row.method, *(written(name, row.metrics.get(name)) for name in names), str(row.n_seeds), row.verdict]
            for row in table.rows
        ),
    ]


def written(name: str, value: Estimate | None) -> str:
    """An estimate in the metric's unit, such as "85.4 ± 5.6"; "–" where there is none."""
    if value is None:
        return "–"
    scale, digits = (100, 1) if name.startswith(_PERCENT) else (1, _DIGITS[name])
    mean = f"{scale * value.mean:.{digits}f}"
    return mean if value.half is None else f"{mean} ± {scale * value.half:.{digits}f}"


def markdown(tables: Sequence[Table]) -> str:
    """Every table in Markdown, and the note on how to read them."""
    parts = []
    for table in tables:
        head, *body = cells(table)
        parts.append(f"## {_plain(table.title)}\n")
        parts.append(f"| {' | '.join(head)} |")
        parts.append(f"|---|{'---:|' * (len(head) - 2)}---|")
        parts += [f"| {' | '.join(map(_plain, row))} |" for row in body]
        parts.append("")
    return "\n".join([*parts, note(tables)]) + "\n"


def html(tables: Sequence[Table]) -> str:
    """Every table as a piece of HTML in which all names are escaped."""
    parts = []
    for table in tables:
        head, *body = cells(table)
        heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head[:-1])
        heads += f'<th scope="col" class="words">{escape(head[-1])}</th>'
        rows = "".join(
            f'<tr><th scope="row">{escape(first)}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in rest[:-1])
            + f'<td class="words {direction(row)}">{escape(rest[-1])}</td></tr>'
            for (first, *rest), row in zip(body, table.rows, strict=True)
        )
        parts.append(
            f'<h3>{escape(table.title)}</h3><div class="wide" role="region" tabindex="0" '
            f'aria-label="{escape(table.title)}"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
            "</div>"
        )
    return "".join(parts) + f'<p class="note">{escape(note(tables))}</p>'


def terminal(table: Table) -> Group:
    """For rich, within 80 columns: the accuracies, the rest, and the verdicts below each other."""
    from rich.console import Group
    from rich.table import Table as Rich
    from rich.text import Text

    head, *body = cells(table)
    cut = next((i for i, name in enumerate(head) if name == "entropy"), len(head) - 1)
    parts: list[Rich | Text] = []
    for i, columns in enumerate([range(1, cut), range(cut, len(head) - 1)]):
        made = Rich(title=Text(printable(table.title)) if i == 0 else None, title_justify="left")
        made.add_column("method", overflow="fold")
        for at in columns:
            made.add_column(head[at], justify="right", no_wrap=True)
        for line in body:
            made.add_row(*(Text(printable(line[at])) for at in (0, *columns)))
        parts += [made] if columns else []
    colours = {"up": "green", "down": "red", "": ""}
    parts += [Text(printable(f"{row.method}: {row.verdict}"), style=colours[direction(row)]) for row in table.rows]
    return Group(*parts, Text())


def as_dict(table: Table) -> dict[str, Any]:
    """For compare.json: everything, with the ends of the intervals."""

    def numbers(value: Estimate | None) -> dict[str, Any] | None:
        return None if value is None else {**asdict(value), "low": value.low, "high": value.high}

    rows = [
        {
            "method": row.method,
            "n_seeds": row.n_seeds,
            "metrics": {name: numbers(value) for name, value in row.metrics.items()},
            "difference": numbers(row.difference),
            "verdict": row.verdict,
        }
        for row in table.rows
    ]
    return {"world": table.world, "task": table.task, "baseline": table.baseline, "rows": rows}


_ESTIMATE = {"mean": NUMBER, "half": (*NUMBER, type(None)), "n": int}
SHAPE = {
    "world": str,
    "task": str,
    "baseline": str,
    "rows": [{"method": str, "n_seeds": int, "metrics": {str: _ESTIMATE}, "verdict": str}],
}
"""Of what `as_dict` writes, as far as `from_dict` relies on it."""


def from_dict(content: dict[str, Any]) -> Table:
    """The table that `as_dict` wrote; ReadError if it has a column that no table has."""

    def numbers(value: dict[str, Any] | None) -> Estimate | None:
        return None if value is None else Estimate(value["mean"], value["half"], value["n"])

    rows = []
    for row in content["rows"]:
        if strange := [name for name in row["metrics"] if not _COLUMN.fullmatch(name)]:
            raise ReadError(f"the table {content['task']!r} has a column {strange[0]!r}, which no comparison writes.")
        metrics = {name: Estimate(v["mean"], v["half"], v["n"]) for name, v in row["metrics"].items()}
        rows.append(Row(row["method"], row["n_seeds"], metrics, numbers(row["difference"]), row["verdict"]))
    return Table(content["world"], content["task"], content["baseline"], _columns(rows), tuple(rows))


def direction(row: Row) -> str:
    """ "up" or "down" where the interval shows one, else ""."""
    return "up" if row.verdict.startswith("better") else "down" if row.verdict.startswith("worse") else ""


def note(tables: Sequence[Table]) -> str:
    """How to read the numbers, and how many verdicts chance alone would give."""
    n = sum(table.n_verdicts for table in tables)
    chance = f" {n} intervals are looked at: if no method differed, about {n / 20:.1f} of them would still say so."
    return NOTE + (chance if n else "")


def _row(name: str, seeds: dict[int, dict[str, float]], baseline: dict[int, dict[str, float]], against: str) -> Row:
    names = {metric for numbers in seeds.values() for metric in numbers}
    metrics = {m: estimate([numbers[m] for numbers in seeds.values() if m in numbers]) for m in names}
    if name == BASE:  # the same model on the same test, seed by seed: no spread between runs to speak of
        metrics = {m: Estimate(value.mean, None, value.n) for m, value in metrics.items()}
    if name == against:
        return Row(name, len(seeds), metrics, None, "the baseline")
    ours, theirs = (
        {seed: numbers[PRIMARY] for seed, numbers in side.items() if PRIMARY in numbers} for side in (seeds, baseline)
    )
    difference = paired_difference(ours, theirs)
    if not seeds:
        return Row(name, 0, metrics, None, "no finished run")
    if not ours:
        return Row(name, len(seeds), metrics, None, "no accuracy known")
    return Row(name, len(seeds), metrics, difference, verdict(difference, against, lambda x: f"{100 * x:+.1f}"))


def _columns(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(sorted({name for row in rows for name in row.metrics}, key=_place))


def _place(column: str) -> tuple[int, int]:
    kind, _, k = column.partition("@")
    return next(i for i, name in enumerate(_ORDER) if name.rstrip("@") == kind), int(k or 0)


def _plain(text: str) -> str:
    """Text that Markdown leaves alone: no cell ends, no tags, no emphasis."""
    for mark in "\\|<>`*_[]":
        text = text.replace(mark, f"\\{mark}")
    return text
