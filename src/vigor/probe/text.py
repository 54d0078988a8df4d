"""A probe's report as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import Any

Table = list[tuple[str, ...]]


def tables(report: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """(title, rows of cells) of each table, the first row its head."""
    made = [("The samples", _samples(report)), ("The signals", _signals(report))]
    if len(report["agreement"]) > 1:
        made.append(("Agreement of the signals within groups (Kendall's tau-b)", _agreement(report)))
    return made


def verdicts(report: Mapping[str, Any]) -> str:
    """Each signal's forecast and its reasons."""
    parts = []
    for name, signal in report["signals"].items():
        found = signal["forecast"]
        parts.append(f"{name}: {found['verdict'].upper()}")
        parts += [fill(r, 110, initial_indent="  - ", subsequent_indent="    ") for r in found["reasons"]]
    return "\n".join(parts)


def _samples(report: Mapping[str, Any]) -> Table:
    found = report["samples"]
    rows: Table = [("what", "value")]
    if found["pass_at_k"]:
        rows.append(("accuracy", _share(found["accuracy"])))
        for label in ("pass_at_k", "majority_at_k"):
            name = label.replace("_at_k", "@")
            rows.append((f"{name}k", "  ".join(f"{k}: {_percent(e['value'])}" for k, e in found[label].items())))
    rows += [
        ("share of the most common answer", _share(found["majority_share"])),
        ("completions with a boxed answer", _percent(found["answered"])),
        ("distinct answers a prompt", f"{found['distinct_answers']:.1f}"),
        ("tokens, entropy", f"{found['length']:.0f}, {found['entropy']:.2f} nats a token"),
        ("hit the token budget", _percent(found["truncated"])),
    ]
    return rows


def _signals(report: Mapping[str, Any]) -> Table:
    labelled = report["facts"]["labelled_prompts"] > 0
    head = ("AUC", "rival AUC", "best of N") if labelled else ("AUC to majority", "rival AUC to majority", "best of N")
    keys = ("auc", "rival_auc", "best_of") if labelled else ("majority_auc", "majority_rival_auc", "best_of_majority")
    last = ("labels for ±0.05",) if labelled else ()
    rows: Table = [("signal", *head, "tau length", "given right" if labelled else "given majority", "ties", "spread",
                    "flips", *last)]  # fmt: skip
    for name, s in report["signals"].items():
        cells = (
            *(_number(s[key]) for key in keys),
            _plain(s["length_tau"]["value"]),
            _plain(s["length_tau_partial"]["value"]),
            _percent(s["tie_rate"]),
            _plain(s["spread"]),
            _percent(s["flip_rate"]),
        )
        needed = (str(s["prompts_needed"]["rival_auc"] or "-"),) if labelled else ()
        rows.append((name, *cells, *needed))
    return rows


def _agreement(report: Mapping[str, Any]) -> Table:
    names = list(report["agreement"])
    return [("", *names), *((a, *(_plain(report["agreement"][a][b]) for b in names)) for a in names)]


def _number(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _share(estimate: Mapping[str, Any]) -> str:
    return f"{_percent(estimate['value'])} [{_percent(estimate['low'])}, {_percent(estimate['high'])}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
