"""Small line charts as inline SVG, written by hand: no plotting library, no script, nothing to load."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 224
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 46, 26  # margins around the plot, pixels


@dataclass(frozen=True)
class Line:
    """label, CSS class (`train`, `val`, `true`, `wrong`, `other`), points (step, value)."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


def chart(title: str, lines: Sequence[Line], from_zero: bool = False) -> str:
    """One chart as <svg>; "" where no line has a point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks, y_ticks = ticks(0, max(xs), 4), ticks(0 if from_zero else min(ys), max(ys), 4)
    x_low, x_high = 0, max(xs) or 1
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * plot_width

    def down(y: float) -> float:
        return TOP + (1 - (y - y_low) / ((y_high - y_low) or 1)) * plot_height

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        f'<text class="title" x="{LEFT}" y="16">{html.escape(title)}</text>',
    ]
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{down(y) + 3.5:.1f}" text-anchor="end">{short(y)}</text>')
    for x in x_ticks:
        if x <= x_high:
            anchor = "end" if x == x_high else "middle"
            parts.append(
                f'<text class="tick" x="{across(x):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{short(x)}</text>'
            )
    for line in lines:
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        if len(line.points) <= 40:
            spots = [(across(x), down(y)) for x, y in line.points]
            parts += [f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in spots]
    keys = " ".join(f'<tspan class="key {line.style}">\u2014 {html.escape(line.label)}</tspan>' for line in lines)
    parts.append(f'<text x="{LEFT}" y="33">{keys} <tspan>by step</tspan></text>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if high <= low:
        high = low + (abs(low) or 1)
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def short(value: float) -> str:
    """1500 -> 1.5k, 0.25 -> .25 with its zero kept."""
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:g}"
