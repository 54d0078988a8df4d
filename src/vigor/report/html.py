"""report.html: one self-contained page, no network, no scripts."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

import yaml

from vigor.report.plots import curves
from vigor.report.table import before_after, percent
from vigor.runfolder import RunFolder

SAMPLES = 8
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .8rem; }
img { max-width: 100%; background: #fff; border-radius: 6px; } pre { overflow-x: auto; font-size: .8rem; }
.up { color: #18794e; font-weight: 600; } .down { color: #c0392b; font-weight: 600; } .note { opacity: .7; }
"""


def write_report(folder: RunFolder) -> None:
    """Writes curves.png and report.html from what the run folder holds."""
    metrics = folder.read_metrics()
    keys = filter(_is_reward_mean, metrics[-1] if metrics else {})
    names = [key.removeprefix("rewards/").removesuffix("/mean") for key in keys]  # a name may hold slashes
    image = io.BytesIO()
    curves(metrics, names).savefig(image, format="png", dpi=110)
    (folder.path / "curves.png").write_bytes(image.getvalue())
    sections = [
        _results(folder.read_json("results.json")),
        f'<h2>Curves</h2><img alt="training curves" src="data:image/png;base64,{_base64(image)}">',
        _samples(folder, names),
        _facts(folder),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>VIGOR run {escape(folder.path.name)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>VIGOR run <code>{escape(folder.path.name)}</code></h1>{''.join(sections)}</body></html>\n"
    )
    (folder.path / "report.html").write_text(page, "utf-8")


def _is_reward_mean(key: str) -> bool:
    return key.startswith("rewards/") and key.endswith("/mean")


def _base64(image: io.BytesIO) -> str:
    return base64.b64encode(image.getvalue()).decode("ascii")


def _results(results: dict[str, Any]) -> str:
    rows = before_after(results)
    if not rows:
        return '<p class="note">No held-out score: only the lab&rsquo;s tasks are scored before and after.</p>'
    cells = "".join(
        f"<tr><td>{escape(row.task)}</td><td>{row.decoding}</td><td>{percent(row.before, row.before_interval)}</td>"
        f"<td>{percent(row.after, row.after_interval)}</td>"
        f'<td class="{_direction(row.change) if row.apart else ""}">{100 * row.change:+.1f}</td></tr>'
        for row in rows
    )
    return (
        "<h2>Accuracy before and after (%)</h2><table><tr><th>task</th><th>decoding</th><th>before</th><th>after</th>"
        f'<th>change</th></tr>{cells}</table><p class="note">Brackets: 95 % intervals. Coloured where they do not '
        "overlap.</p>"
    )


def _direction(change: float) -> str:
    return "up" if change > 0 else "down"


def _samples(folder: RunFolder, names: list[str]) -> str:
    import pandas as pd

    files = sorted((folder.path / "completions").glob("*.parquet"))
    parts = []
    for title, path in [("First step", files[0]), ("Last step", files[-1])] if files else []:
        frame = pd.read_parquet(path)
        first = frame["prompt"].map(_text) == _text(frame.iloc[0]["prompt"])
        frame = frame[first].head(SAMPLES)
        head = "".join(f"<th>{escape(name)}</th>" for name in [*names, "advantage"])
        body = "".join(
            f'<tr><td class="text">{escape(_text(row["completion"]))}</td>'
            + "".join(f"<td>{row[name]:.3g}</td>" for name in [*names, "advantage"])
            + "</tr>"
            for _, row in frame.iterrows()
        )
        prompt = escape(_text(frame.iloc[0]["prompt"]))
        parts.append(
            f'<h2>{title}: the first group</h2><table><tr><td class="text">{prompt}</td></tr></table>'
            f"<table><tr><th>completion</th>{head}</tr>{body}</table>"
        )
    return "".join(parts)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(str(message["content"]) for message in value)


def _facts(folder: RunFolder) -> str:
    environment = yaml.safe_dump(folder.read_json("environment.json"), sort_keys=False)
    config = (folder.path / "config.yaml").read_text("utf-8")
    return (
        f"<h2>Environment</h2><pre>{escape(environment)}</pre>"
        f"<h2>Settings</h2><details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>"
    )
