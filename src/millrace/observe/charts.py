"""Lines over time as SVG: one picture a figure, phases shaded. It knows pixels and no figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from millrace.observe.phases import Phase
from millrace.observe.series import Array

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 180, 56, 22, 8
MOST_POINTS = 720


@dataclass(frozen=True)
class Line:
    """values at t, seconds since 1970."""

    name: str
    t: Array
    values: Array


def chart(title: str, unit: str, lines: Sequence[Line], phases: Sequence[Phase]) -> str:
    """An SVG picture; empty where there is nothing to show."""
    lines = [line for line in lines if len(line.t)]
    if not lines:
        return ""
    start = float(min(line.t[0] for line in lines))
    end = float(max(line.t[-1] for line in lines))
    top = float(max(line.values.max() for line in lines)) or 1.0
    span = max(end - start, 1.0)

    def x(t: float) -> float:
        return LEFT + (t - start) / span * (WIDTH - LEFT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for number, phase in enumerate(phases):
        left, right = max(x(phase.start), LEFT), min(x(phase.end), WIDTH)
        if right > left:
            parts.append(
                f'<rect class="p{number % 2}" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
                f'height="{HEIGHT - BOTTOM - TOP}"/>'
                f'<text x="{left + 3:.1f}" y="{TOP + 11}">{escape(phase.name)}</text>'
            )
    for share in (0.0, 0.5, 1.0):
        value = f"{short(top * share)}{unit}"
        parts.append(f'<text class="a" x="{LEFT - 4}" y="{y(top * share) + 4:.1f}">{value}</text>')
    parts.append(f'<text class="a" x="{WIDTH}" y="{HEIGHT - 6}">{span:.0f} s</text>')
    for number, line in enumerate(lines):
        t, values = _thinned(line)
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(t, values, strict=True))
        parts.append(
            f'<polyline class="l{number % 4}" points="{points}"><title>{escape(line.name)}</title>'
            "</polyline>"
        )
    return "".join(parts) + "</svg>"


def _thinned(line: Line) -> tuple[Array, Array]:
    """At most MOST_POINTS points; of neighbours the largest, so that no peak is lost."""
    step = -(-len(line.t) // MOST_POINTS)
    if step == 1:
        return line.t, line.values
    cut = len(line.t) // step * step
    return line.t[:cut:step], np.asarray(line.values[:cut].reshape(-1, step).max(axis=1))


def short(value: float) -> str:
    """A number with an SI prefix."""
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g} {prefix}"
    return f"{value:.3g} "
