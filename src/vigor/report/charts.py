"""Charts as SVG inside the page: drawn by matplotlib, in the colours of the page, each series a CSS class."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

COLOURS = (
    "#3d85c6", "#e0782f", "#2f9e5f", "#c9508a", "#8a67d6", "#a58130", "#1d9bab", "#d34a4a", "#76889a", "#6f9424",
)  # fmt: skip
"""Told apart on white and on near-black alike."""
DASHES = ("solid", "dashed", "dotted", "dashdot")
_INK = "#010203"
"""Drawn in this colour, then replaced by the page's own."""
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_MOST_POINTS = 400
_SIZE = (4.4, 2.5)
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One series of a panel: the curve of every run, whose mean and spread are drawn over them."""

    series: int
    runs: Sequence[Points]


def look(series: int) -> tuple[str, str]:
    """(colour, line style) of a series."""
    return COLOURS[series % len(COLOURS)], DASHES[series // len(COLOURS) % len(DASHES)]


def line_chart(curves: Sequence[Curve], *, window: int, name: str, x_label: str = "optimizer step") -> str:
    """A panel of curves.

    One run: single steps thin, their running mean thick. Several: the running mean of each thin, the mean over runs
    thick, and a band from the lowest to the highest.

    Args:
        curves: points in ascending x.
        window: steps of the running mean.
        name: what the chart shows, for readers who do not see it.
        x_label: under the axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        colour, dash = look(curve.series)
        gid = f"s{curve.series}"
        smooth = [_thinned(smoothed(points, window)) for points in curve.runs]
        single = len(curve.runs) == 1
        for points in [_thinned(curve.runs[0])] if single else smooth:
            axes.plot(*_columns(points), color=colour, linewidth=0.7, alpha=0.35, gid=gid)
        middle, low, high = across(smooth)
        if not single:
            steps, lows = _columns(low)
            axes.fill_between(steps, lows, _columns(high)[1], color=colour, alpha=0.15, linewidth=0, gid=gid)
        marker = "o" if len(middle) == 1 else ""
        axes.plot(*_columns(middle), color=colour, linestyle=dash, linewidth=1.8, marker=marker, markersize=4, gid=gid)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(x_label, fontsize=9)
    return _finished(figure, name)


def category_chart(
    curves: Sequence[tuple[int, Sequence[tuple[float, float | None] | None]]],
    categories: Sequence[str],
    *,
    name: str,
    x_label: str = "",
    joined: bool = False,
) -> str:
    """Dots with error bars over named places; None leaves one out.

    Args:
        curves: (series, (value, half of the interval or None) at each place).
        categories: the places.
        name: what the chart shows, for readers who do not see it.
        x_label: under the axis.
        joined: dots of a series are joined by a line; otherwise the series stand beside each other.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for i, (series, values) in enumerate(curves):
        colour, dash = look(series)
        beside = 0.0 if joined else (i - (len(curves) - 1) / 2) * 0.7 / len(curves)
        there = [(x + beside, *value) for x, value in enumerate(values) if value is not None]
        for x, value, half in there:
            if half is not None:
                axes.plot([x, x], [value - half, value + half], color=colour, linewidth=1.2, gid=f"s{series}")
        axes.plot(
            [x for x, _, _ in there],
            [value for _, value, _ in there],
            color=colour,
            linestyle=dash if joined else "none",
            marker="o",
            markersize=5,
            gid=f"s{series}",
        )
    axes.set_xticks(range(len(categories)), categories, parse_math=False)
    axes.set_xlim(-0.5, len(categories) - 0.5)
    axes.set_xlabel(x_label, fontsize=9)
    return _finished(figure, name)


def smoothed(points: Points, window: int) -> list[tuple[float, float]]:
    """Running mean over the last `window` points."""
    found = []
    for i in range(len(points)):
        last = [y for _, y in points[max(0, i + 1 - window) : i + 1]]
        found.append((points[i][0], sum(last) / len(last)))
    return found


def across(runs: Sequence[Points]) -> tuple[list[tuple[float, float]], ...]:
    """(mean, lowest, highest) over the runs, at each x that any of them has."""
    at: dict[float, list[float]] = {}
    for points in runs:
        for x, y in points:
            at.setdefault(x, []).append(y)
    ordered = sorted(at.items())
    return (
        [(x, sum(ys) / len(ys)) for x, ys in ordered],
        [(x, min(ys)) for x, ys in ordered],
        [(x, max(ys)) for x, ys in ordered],
    )


def _thinned(points: Points) -> Points:
    """At most `_MOST_POINTS` of the points, the last among them: more than that no screen shows."""
    stride = -(-len(points) // _MOST_POINTS)
    return [point for i, point in enumerate(points) if (len(points) - 1 - i) % stride == 0] if stride > 1 else points


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _finished(figure: object, name: str) -> str:
    """The figure as an SVG element without ids of its own that others might have too, sized by the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    for axes in figure.axes:
        axes.grid(alpha=0.2, color=_INK, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.xaxis.label.set_color(_INK)
        for spine in axes.spines.values():
            spine.set_color(_INK)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent, tag in ((root, "metadata"), (root.find(f"{{{_SVG}}}defs"), "style")):
        for element in [] if parent is None else parent.findall(f"{{{_SVG}}}{tag}"):
            parent.remove(element)  # type: ignore[union-attr]
    used = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for v in e.attrib.values() if "#" in v)))
    for element in root.iter():
        gid = element.get("id")
        if gid is not None and gid not in used:
            del element.attrib["id"]
            if re.fullmatch(r"s\d+", gid):
                element.set("class", gid)
        if "d" in element.attrib:
            element.set("d", re.sub(r"(\.\d\d)\d+", r"\1", element.attrib["d"].replace("\n", "")))
        for key, value in element.attrib.items():
            element.set(key, re.sub(r"font-family: [^;]*; ?", "", value.replace(_INK, "currentColor")))
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", name)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")
