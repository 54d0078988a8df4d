"""The panels of a report: what is drawn, from which numbers, and the figure around each chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd

from vigor.report.charts import Curve, Points, category_chart, line_chart
from vigor.report.measures import N_BINS, bins, by_step, measured
from vigor.report.runs import RunData, Series

WINDOW = 5
"""Steps of the running mean of every curve."""
_LOGGED = (
    ("entropy", "Entropy", "nats a token"),
    ("completions/mean_length", "Length", "tokens, mean over completions"),
    ("completions/clipped_ratio", "Cut off", "share of completions that hit the token budget"),
)
_WRITTEN = (
    ("repetition", "Repetition", "share of the 3-grams of words and signs that came before in the completion"),
    ("distinct", "Different completions", "share of a group's completions that differ"),
    ("answers", "Different answers", "boxed answers that differ, mean number in a group"),
)
_COURSE = (
    ("loss", "Loss", ""),
    ("grad_norm", "Norm of the update's gradient", "before clipping"),
    ("time/step", "Seconds a step", ""),
)
_BINS = (
    ("accuracy", "Accuracy by quarter", "share right"),
    ("length", "Length by quarter", "tokens"),
    ("repetition", "Repetition by quarter", "share of 3-grams that came before"),
)


@dataclass(frozen=True)
class Measured:
    """A series with what its completions say, run by run."""

    series: Series
    frames: list[pd.DataFrame]
    steps: list[dict[str, list[tuple[int, float]]]]


def measure(found: Sequence[Series]) -> list[Measured]:
    """Goes through the completions of every run, once."""
    made = []
    for series in found:
        frames = [measured(run.completions) for run in series.runs]
        made.append(Measured(series, frames, [by_step(frame) for frame in frames]))
    return made


def curve_panels(found: Sequence[Measured]) -> str:
    """Accuracy and the score of every reward, then what the completions are like, then the course of training."""
    accuracy, others = [], []
    for name in reward_names(found):
        if name.split("(")[0] == "accuracy":
            panel = _logged(found, f"rewards/{name}/mean", "Accuracy of the samples", "share right, training prompts")
            accuracy.append(panel)
        elif any(f"scores/{name}" in record for run in _runs(found) for record in run.metrics):
            others.append(_logged(found, f"scores/{name}", f"Score: {name}", "mean, before it is ranked"))
        else:
            others.append(_logged(found, f"rewards/{name}/mean", f"Reward: {name}", "mean of the samples"))
    panels = [*accuracy, *(_logged(found, *panel) for panel in _LOGGED), *(_from_text(found, *p) for p in _WRITTEN)]
    return _grid([*panels, *others, *(_logged(found, *panel) for panel in _COURSE)])


def alignment_panels(found: Sequence[Measured]) -> str:
    """How each reward of each run tells right from wrong, where answers are known."""
    panels = []
    for name in reward_names(found):
        panels += [
            _logged(found, f"auc/{name}", f"AUC: {name}", "right against wrong of one prompt; 0.5 knows nothing"),
            _logged(found, f"top25/{name}", f"Top quarter: {name}", "accuracy of each group's best quarter by it"),
        ]
    return _grid(panels)


def bin_panels(found: Sequence[Measured]) -> str:
    """Accuracy, length and repetition by quarter of the group's advantage, early and late."""
    panels = []
    for when, title in ((0.0, "first quarter of the steps"), (0.75, "last quarter of the steps")):
        by_run = [
            (one, [bins(frame, [key for key, _, _ in _BINS], _span(frame, when)) for frame in one.frames])
            for one in found
        ]
        for key, head, unit in _BINS:
            curves = [
                (one.series.number, [_middle([run[key][i] for run in runs if key in run]) for i in range(N_BINS)])
                for one, runs in by_run
            ]
            if any(value is not None for _, values in curves for value in values):
                places = ["lowest", "second", "third", "highest"]
                name = f"{head}, {title}"
                x_label = "quarter of the group, by advantage"
                chart = category_chart(curves, places, name=name, x_label=x_label, joined=True)
                highest = [(one.series.label, values[-1]) for one, (_, values) in zip(found, curves, strict=True)]
                panels.append(_figure(name, unit, chart, "highest quarter", highest))
    return _grid(panels)


def reward_names(found: Sequence[Measured]) -> list[str]:
    """Every reward of any run."""
    return list(dict.fromkeys(name for run in _runs(found) for name in run.rewards))


def _runs(found: Sequence[Measured]) -> list[RunData]:
    return [run for one in found for run in one.series.runs]


def _logged(found: Sequence[Measured], key: str, title: str, unit: str) -> str:
    points = {
        id(run): [(record["step"], record[key]) for record in run.metrics if record.get(key) is not None]
        for run in _runs(found)
    }
    return _lines(found, lambda one: [points[id(run)] for run in one.series.runs], title, unit)


def _from_text(found: Sequence[Measured], key: str, title: str, unit: str) -> str:
    return _lines(found, lambda one: [steps.get(key, []) for steps in one.steps], title, unit)


def _lines(found: Sequence[Measured], points: Callable[[Measured], Sequence[Points]], title: str, unit: str) -> str:
    """A panel, or nothing where no run has the numbers."""
    curves = {one.series.number: [run for run in points(one) if run] for one in found}
    if not any(curves.values()):
        return ""
    drawn = [Curve(number, runs) for number, runs in curves.items() if runs]
    chart = line_chart(drawn, window=WINDOW, name=title)

    ends = [
        (one.series.label, _middle([y for run in curves[one.series.number] for _, y in run[-WINDOW:]])) for one in found
    ]
    return _figure(title, unit, chart, f"last {WINDOW} steps", ends)


def _figure(
    title: str, unit: str, chart: str, what: str, numbers: Sequence[tuple[str, tuple[float, float | None] | None]]
) -> str:
    """A chart, and some of its numbers for readers who do not see it."""
    listed = "".join(
        f"<dt>{escape(label)}</dt><dd>{value[0]:.4g}</dd>" for label, value in numbers if value is not None
    )
    return (
        f'<figure><figcaption><b>{escape(title)}</b> <span class="note">{escape(unit)}</span></figcaption>{chart}'
        f"<details><summary>Numbers: {what}</summary><dl>{listed}</dl></details></figure>"
    )


def _grid(panels: Sequence[str]) -> str:
    drawn = "".join(panels)
    return f'<div class="grid">{drawn}</div>' if drawn else ""


def _span(frame: pd.DataFrame, start: float) -> tuple[float, float]:
    first, last = (frame["step"].min(), frame["step"].max()) if len(frame) else (0, 0)
    return first + start * (last - first), first + (start + 0.25) * (last - first)


def _middle(values: Sequence[float | None]) -> tuple[float, None] | None:
    there = [value for value in values if value is not None]
    return (sum(there) / len(there), None) if there else None
