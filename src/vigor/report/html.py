"""report.html: one self-contained page of one or several runs. No network, and no script: its own policy forbids both.

Series are shown and hidden by check boxes and CSS alone. Whatever came from a model, a data set or a user is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import yaml

from vigor.checkpoint import write_durably
from vigor.report import panels
from vigor.report.accuracy import accuracy
from vigor.report.charts import look
from vigor.report.plots import curves
from vigor.report.runs import RunData, Series, read_runs, series
from vigor.report.samples import browser
from vigor.report.style import STYLE
from vigor.report.tokens import STYLE as TOKEN_STYLE
from vigor.runfolder import RunFolder

_WORDS = ' class="words"'
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(folder: RunFolder) -> None:
    """Writes curves.png and report.html from what the run folder holds."""
    (run,) = read_runs([folder.path])
    picture = BytesIO()
    curves(run.metrics, run.rewards).savefig(picture, format="png", dpi=110)
    write_durably(folder.path / "curves.png", picture.getvalue())
    write_durably(folder.path / "report.html", page([run]))


def write_runs(
    paths: Sequence[Path], out: Path, *, labels: Sequence[str] | None = None, head: str = "", title: str = ""
) -> None:
    """Writes one page for several run folders.

    Args:
        paths: run folders; those of one label count as seeds of one method.
        out: the page.
        labels: a name for each run; default: what their settings differ in.
        head: HTML that stands first, such as the table of a comparison.
        title: of the page.

    Raises:
        ValueError: a folder that holds no run, or none that is given.
    """
    written = page(read_runs(paths, labels), head=head, title=title)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, written)


def page(runs: Sequence[RunData], *, head: str = "", title: str = "") -> str:
    """The whole page as text."""
    found = series(runs)
    measured = panels.measure(found)
    anchors = {id(run): str(i) for i, run in enumerate(runs)}
    name = title or (f"VIGOR run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} VIGOR runs")
    sections = [
        ("comparison", "Comparison", head),
        ("runs", "Runs", _runs(found, anchors)),
        ("accuracy", "Accuracy before and after", accuracy(found)),
        ("curves", "Curves", panels.curve_panels(measured) or '<p class="note">No step is logged.</p>'),
        ("alignment", "Rewards against correctness", panels.alignment_panels(measured)),
        ("bins", "Quarters of the group, by advantage", panels.bin_panels(measured)),
        ("samples", "Completions", browser(runs, [anchors[id(run)] for run in runs])),
        ("settings", "Settings and environment", _settings(runs, anchors)),
    ]
    there = [(anchor, heading, body) for anchor, heading, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in there)
    body = "".join(f'<section id="{anchor}"><h2>{heading}</h2>{body}</section>' for anchor, heading, body in there)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}{TOKEN_STYLE}{_switches(found)}</style></head>"
        f'<body><a class="skip" href="#runs">To the content</a><header><h1>{escape(name)}</h1>'
        f'<nav aria-label="sections">{links}</nav>{_legend(found)}</header><main>{body}</main></body></html>\n'
    )


def _switches(found: Sequence[Series]) -> str:
    """CSS: a box that is not checked hides its series in every panel and table."""
    return "".join(
        f"body:has(#show-{one.number}:not(:checked)) .s{one.number}{{display:none}}"
        f".k{one.number}{{border-top:3px {look(one.number)[1].replace('dashdot', 'double')} {look(one.number)[0]}}}"
        for one in found
    )


def _legend(found: Sequence[Series]) -> str:
    if len(found) < 2:
        return ""
    boxes = "".join(
        f'<label><input type="checkbox" id="show-{one.number}" checked><i class="key k{one.number}"></i>'
        f"{escape(one.label)}</label>"
        for one in found
    )
    return f'<fieldset class="legend"><legend>Shown in all panels</legend>{boxes}</fieldset>'


def _runs(found: Sequence[Series], anchors: dict[int, str]) -> str:
    rows = "".join(
        f'<tr class="s{one.number}"><th scope="row"><i class="key k{one.number}"></i>{escape(one.label)}</th>'
        f"<td>{escape(str(run.seed))}</td><td>{run.metrics[-1]['step'] if run.metrics else 0}</td>"
        f"<td>{_seconds(run)}</td><td>{_state(run)}</td>"
        f'<td class="words">{_links(run, anchors[id(run)])}</td></tr>'
        for one in found
        for run in one.runs
    )
    heads = ("method", "seed", "steps", "seconds", "state", "folder")
    head = "".join(f'<th scope="col"{_WORDS if name == "folder" else ""}>{name}</th>' for name in heads)
    return (
        '<div class="wide" role="region" tabindex="0" aria-label="runs"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="note">Curves are running means over {panels.WINDOW} steps. Thin lines are single runs (single '
        "steps where a method has one run), bands reach from the lowest to the highest seed.</p>"
    )


def _links(run: RunData, anchor: str) -> str:
    samples = f'<a href="#samples-{anchor}">completions</a> · ' if len(run.completions) else ""
    return f'{escape(run.name)} <span class="note">{samples}<a href="#settings-{anchor}">settings</a></span>'


def _seconds(run: RunData) -> str:
    seconds = [record["time/step"] for record in run.metrics if record.get("time/step") is not None]
    return f"{sum(seconds):.0f}" if seconds else "–"


def _state(run: RunData) -> str:
    return "finished" if (run.folder.path / "results.json").is_file() else "not finished"


def _settings(runs: Sequence[RunData], anchors: dict[int, str]) -> str:
    opened = " open" if len(runs) == 1 else ""
    return "".join(
        f'<details id="settings-{anchors[id(run)]}"{opened}><summary><b>{escape(run.label)}</b>, seed '
        f'{escape(str(run.seed))} <span class="note">{escape(str(run.folder.path))}</span></summary>'
        f"<h3>Environment</h3><pre>{escape(yaml.safe_dump(run.environment, sort_keys=False))}</pre>"
        f"<h3>config.yaml</h3><pre>{escape((run.folder.path / 'config.yaml').read_text('utf-8'))}</pre></details>"
        for run in runs
    )
