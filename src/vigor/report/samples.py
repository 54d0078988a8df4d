"""The browser of completions: for each run a few steps, for each step a few groups, with rewards and advantage."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from vigor.report.runs import RunData, Tokens
from vigor.report.tokens import Colouring

if TYPE_CHECKING:
    import pandas as pd

STEPS, GROUPS, ROWS = 6, 2, 16
"""Of a run, of a step, and of a group: no more than this is shown; all of it is in the run's parquet files."""
TEXT_BUDGET = 6_000_000
"""Characters of completions in a report."""
TOKEN_BUDGET = 60_000
"""Tokens in colour in a report."""
_SHORTEST, _LONGEST = 500, 8000


def browser(runs: Sequence[RunData], anchors: Sequence[str]) -> str:
    """Folded sections that open by mouse and by keyboard, without scripts."""
    limit = min(_LONGEST, max(_SHORTEST, TEXT_BUDGET // max(1, len(runs) * STEPS * GROUPS * ROWS)))
    alone = len(runs) == 1
    colours = Colouring(budget=max(1, TOKEN_BUDGET // max(1, len(runs) * STEPS)), limit=limit)
    shown = "".join(_run(run, anchor, colours, unfolded=alone) for run, anchor in zip(runs, anchors, strict=True))
    return (colours.legend() if any(run.tokens for run in runs) else "") + shown


def chosen_steps(steps: Sequence[int]) -> list[int]:
    """At most `STEPS` of the steps: the first, the last, and as evenly between them as can be."""
    if len(steps) <= STEPS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (STEPS - 1))] for i in range(STEPS)]


def _run(run: RunData, anchor: str, colours: Colouring, *, unfolded: bool) -> str:
    frame = run.completions
    steps = chosen_steps(sorted({int(step) for step in frame["step"]}))
    if not steps:
        return ""
    shown = [name for name in [*run.rewards, *(f"{name}/score" for name in run.rewards)] if name in frame]
    parts = []
    for step in steps:
        rows = frame[frame["step"] == step]
        groups = sorted(rows["group"].unique())[:GROUPS]
        colours.new_step()
        tables = "".join(_group(rows[rows["group"] == group], shown, run.tokens, colours) for group in groups)
        opened = " open" if unfolded and step in (steps[0], steps[-1]) else ""
        parts.append(f"<details{opened}><summary>Step {step}{_told(run, step)}</summary>{tables}</details>")
    opened = " open" if unfolded else ""
    return (
        f'<details id="samples-{anchor}" class="run"{opened}><summary><b>{escape(run.label)}</b>, seed '
        f'{escape(str(run.seed))} <span class="note">{escape(run.name)}</span></summary>{"".join(parts)}</details>'
    )


def _told(run: RunData, step: int) -> str:
    """The step's numbers beside its heading."""
    record = next((record for record in run.metrics if record["step"] == step), {})
    named = {"accuracy": "rewards/accuracy/mean", "entropy": "entropy", "length": "completions/mean_length"}
    told = [f"{name} {record[key]:.3g}" for name, key in named.items() if record.get(key) is not None]
    return f' <span class="note">{", ".join(told)}</span>' if told else ""


def _group(rows: pd.DataFrame, shown: Sequence[str], tokens: Tokens, colours: Colouring) -> str:
    numbers = [name for name in [*shown, "advantage", "length", "truncated"] if name in rows]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in numbers)
    body = "".join(
        f'<tr><td class="text">{_text(row, tokens, colours)}</td>'
        + "".join(f"<td>{_number(row[name])}</td>" for name in numbers)
        + "</tr>"
        for _, row in rows.head(ROWS).iterrows()
    )
    prompt = _cut(str(rows.iloc[0]["prompt"]), colours.limit)
    return (
        f'<p class="prompt"><b>Prompt</b></p><pre class="text">{escape(prompt)}</pre>'
        '<div class="wide" role="region" tabindex="0" aria-label="completions of one prompt"><table><thead><tr>'
        f'<th scope="col">completion</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _text(row: pd.Series[Any], tokens: Tokens, colours: Colouring) -> str:
    """The completion, token by token where its tokens are known and there is room for them."""
    known = tokens.get((int(row["step"]), row["prompt"], row["completion"]))
    return (known and colours.html(known)) or escape(_cut(row["completion"], colours.limit))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} characters more)"


def _number(value: Any) -> str:
    if value is None or isinstance(value, str):
        return escape(str(value))
    return ("yes" if value else "no") if str(value) in ("True", "False") else f"{value:.3g}"
