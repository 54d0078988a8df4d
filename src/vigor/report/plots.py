"""The curves of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WINDOW = 5


def curves(metrics: Sequence[dict[str, Any]], reward_names: Sequence[str]) -> Figure:
    """Reward scores, accuracy (where answers are known), entropy, length and seconds against the step.

    Thin lines are single steps, thick ones means over the last five.
    """
    from matplotlib.figure import Figure

    panels: list[tuple[str, list[tuple[str, str]]]] = []
    for name in reward_names:
        key = f"scores/{name}"
        if any(key in record for record in metrics):
            panels.append((f"{name}: mean score", [(key, name)]))
        else:
            panels.append((f"{name}: mean of the samples", [(f"rewards/{name}/mean", name)]))
    panels += [
        ("entropy (nats a token)", [("entropy", "entropy")]),
        ("completion length (tokens)", [("completions/mean_length", "mean"), ("completions/max_length", "longest")]),
        (
            "seconds a step",
            [(f"time/{part}", part) for part in ("generation", "reward", "update")],
        ),
    ]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    for i, (title, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for key, label in lines:
            points = [(r["step"], r[key]) for r in metrics if r.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                (line,) = axes.plot(steps, values, linewidth=0.7, alpha=0.4)
                axes.plot(steps, _smooth(values), linewidth=1.8, color=line.get_color(), label=label)
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.lines) > 2:  # a thin and a thick line a curve
            axes.legend(fontsize=8, frameon=False)
        if i >= len(panels) - columns:
            axes.set_xlabel("optimizer step", fontsize=9)
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    return [sum(values[max(0, i + 1 - _WINDOW) : i + 1]) / min(_WINDOW, i + 1) for i in range(len(values))]
