"""Lines over time and histograms as SVG, one picture each. It knows pixels and no figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from millrace.observe.report.phases import Phase
from millrace.observe.samples.sample import Array

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 180, 56, 22, 8
MOST_POINTS = 720
MOST_LABELS = 12
LEAST_SHARE = 0.001


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


def bars(title: str, cumulative: Sequence[tuple[float, float]]) -> str:
    """A histogram of seconds as SVG, a bar for each bucket with a share of 0.1% or more; empty
    without values. cumulative: (bound, values up to it)."""
    total = cumulative[-1][1] if cumulative else 0.0
    if not total:
        return ""
    shares, before = [], 0.0
    for bound, count in cumulative:
        shares.append((bound, (count - before) / total))
        before = count
    seen = [at for at, (_, share) in enumerate(shares) if share >= LEAST_SHARE]
    shares = shares[seen[0] : seen[-1] + 1]
    step, most = (WIDTH - LEFT) / len(shares), max(share for _, share in shares)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    every = -(-len(shares) // MOST_LABELS)
    for at, (bound, share) in enumerate(shares):
        height = share / most * (HEIGHT - BOTTOM - TOP)
        left, label = LEFT + at * step, "more" if bound == float("inf") else _seconds(bound)
        parts.append(
            f'<rect class="b" x="{left + 1:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" '
            f'width="{max(step - 2, 1):.1f}" height="{height:.1f}"><title>up to {label}: '
            f"{share:.1%}</title></rect>"
        )
        if at % every == 0:
            place = f'x="{left + step:.1f}" y="{HEIGHT - 6}"'
            parts.append(f'<text class="a" {place}>{label}</text>')
    parts.append(f'<text class="a" x="{LEFT - 4}" y="{TOP + 8}">{most:.0%}</text>')
    return "".join(parts) + "</svg>"


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"
