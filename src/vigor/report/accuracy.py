"""Held-out accuracy before and after, by task: over the test prompts for one run, over seeds for several."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vigor.compare.statistics import Estimate, estimate
from vigor.report.charts import category_chart
from vigor.report.runs import Series
from vigor.report.table import TableRow, before_after, percent

_NONE = '<p class="note">No held-out score: only the lab&rsquo;s tasks are scored before and after.</p>'


def accuracy(found: Sequence[Series]) -> str:
    """The tables and, where a method has several tasks, the picture."""
    rows = [(series, [before_after(run.results) for run in series.runs]) for series in found]
    rows = [(series, [scored for scored in runs if scored]) for series, runs in rows]
    rows = [(series, runs) for series, runs in rows if runs]
    if not rows:
        return _NONE
    single = len(rows) == 1 and len(rows[0][1]) == 1
    return _one_run(rows[0][1][0]) if single else _many_runs(rows)


def _one_run(rows: Sequence[TableRow]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{escape(row.task)}</th><td>{row.decoding}</td>'
        f"<td>{percent(row.before, row.before_interval)}</td><td>{percent(row.after, row.after_interval)}</td>"
        f'<td class="{_direction(row.change) if row.apart else ""}">{100 * row.change:+.1f}</td></tr>'
        for row in rows
    )
    return _table(["task", "decoding", "before", "after", "change"], cells) + (
        '<p class="note">Percent. Brackets: 95 % intervals over test prompts. Coloured where they do not overlap.</p>'
    )


def _many_runs(rows: Sequence[tuple[Series, list[list[TableRow]]]]) -> str:
    places = dict.fromkeys((row.task, row.decoding) for _, runs in rows for scored in runs for row in scored)
    body, curves = [], []
    for series, runs in rows:
        after: list[tuple[float, float | None] | None] = []
        for task, decoding in places:
            same = [row for scored in runs for row in scored if (row.task, row.decoding) == (task, decoding)]
            if not same:
                after.append(None)
                continue
            change = estimate([row.change for row in same])
            end = estimate([row.after for row in same])
            after.append((100 * end.mean, None if end.half is None else 100 * end.half))
            shown = change.low is not None and change.high is not None and (change.low > 0 or change.high < 0)
            body.append(
                f'<tr class="s{series.number}"><th scope="row">{escape(series.label)}</th><td>{escape(task)}</td>'
                f"<td>{decoding}</td><td>{len(same)}</td>"
                f"<td>{_written(Estimate(estimate([row.before for row in same]).mean, None, 1))}</td>"
                f'<td>{_written(end)}</td><td class="{_direction(change.mean) if shown else ""}">'
                f"{_written(change, '+')}</td></tr>"
            )
        curves.append((series.number, after))
    charts = ""
    for decoding in dict.fromkeys(decoding for _, decoding in places):
        at = [i for i, place in enumerate(places) if place[1] == decoding]
        tasks = [task for task, kind in places if kind == decoding]
        chart = category_chart(
            [(number, [values[i] for i in at]) for number, values in curves],
            tasks,
            name=f"{decoding} accuracy after training",
        )
        charts += (
            f"<figure><figcaption><b>{decoding.capitalize()} accuracy after training</b> "
            f'<span class="note">percent, mean and 95 % interval over seeds</span></figcaption>{chart}</figure>'
        )
    heads = ["method", "task", "decoding", "seeds", "before", "after", "change"]
    return (
        f'<div class="grid">{charts}</div>{_table(heads, "".join(body))}<p class="note">Percent, mean ± half of the '
        "95 % interval over seeds (Student&rsquo;s t). Changes are coloured where that interval leaves 0 out.</p>"
    )


def _table(heads: Sequence[str], body: str) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        '<div class="wide" role="region" tabindex="0" aria-label="accuracy before and after"><table><thead>'
        f"<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _written(value: Estimate, sign: str = "") -> str:
    half = "" if value.half is None else f" ± {100 * value.half:.1f}"
    return f"{100 * value.mean:{sign}.1f}{half}"


def _direction(change: float) -> str:
    return "up" if change > 0 else "down"
