"""Line charts as SVG, for pages that fetch nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 40, 28, 34
COLOURS = ("#0b8a7a", "#d9822b", "#5b6ee1", "#b0427a", "#7a8b1f", "#3a9bd6", "#946b54", "#888888")
STYLE = """\
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
.chart { flex: 1 1 24rem; max-width: 36rem; }
.chart svg { width: 100%; height: auto; }
.chart text { fill: currentColor; font: 11px system-ui, sans-serif; }
.chart .grid { stroke: currentColor; opacity: .15; }
"""
"""Style that a page with charts needs."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line.

    Attributes:
        name: Name in the legend; empty for none.
        points: (x, y) in the order of x.
    """

    name: str
    points: Sequence[tuple[float, float]]


def chart(title: str, lines: Sequence[Series], ticks: Mapping[float, str] | None = None) -> str:
    """Return a chart as HTML; its vertical axis begins at 0.

    Args:
        title: Title, with the unit.
        lines: Lines to draw; those without points are left out.
        ticks: Words for places on the horizontal axis; round numbers where not given.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    high = max(y for line in lines for _, y in line.points) or 1.0
    steps = _round_steps(high)
    low_x, high_x = (0.0, max(xs) or 1.0) if ticks is None else (min(xs), max(xs))
    marks = dict(ticks) if ticks is not None else {x: f"{x:g}" for x in _round_steps(high_x)}

    def across(x: float) -> float:
        share = (x - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - y / max(high, steps[-1]) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="14" font-weight="bold">{html.escape(title)}</text>']
    for y in steps:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" '
            f'y2="{down(y):.1f}"/><text x="{LEFT - 6}" y="{down(y) + 4:.1f}" '
            f'text-anchor="end">{y:g}</text>'
        )
    for x, words in marks.items():
        if low_x <= x <= high_x:
            parts.append(
                f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" '
                f'text-anchor="middle">{html.escape(words)}</text>'
            )
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        if len(line.points) <= len(marks):
            parts += [
                f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}">'
                f"<title>{html.escape(line.name)} {y:g}</title></circle>"
                for x, y in line.points
            ]
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'
    return f'<div class="chart">{drawing}{_legend(lines)}</div>'


def _legend(lines: Sequence[Series]) -> str:
    named = [
        f'<span style="color:{COLOURS[number % len(COLOURS)]}">■</span> {html.escape(line.name)}'
        for number, line in enumerate(lines)
        if line.name
    ]
    return f"<small>{' &nbsp; '.join(named)}</small>" if named else ""


def _round_steps(high: float) -> list[float]:
    """Return round numbers from 0 to at least `high`, four to eight of them."""
    size = 10.0 ** math.floor(math.log10(high / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor * 6 >= high)
    return [float(f"{step * number:.10g}") for number in range(math.ceil(high / step - 1e-9) + 1)]
