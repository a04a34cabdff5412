"""The roofline as SVG: what a GPU can do at most, and where the kinds of work lie below it.

Both axes are logarithms: FLOPs for each byte, and FLOP/s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from millrace.observe.report.charts import short
from millrace.observe.report.figures import Kind

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 260, 64, 34, 10, 90
DECADES = 4.0  # of FLOP/s that are shown below the highest roof
_Scale = Callable[[float], float]


def roofline(kinds: Sequence[Kind], peaks: Mapping[str, float], bandwidth: float | None) -> str:
    """An SVG picture; empty without peaks, or without work that both multiplies and moves.
    peaks: FLOP/s by dtype. bandwidth: bytes/s."""
    shown = [kind for kind in kinds if kind.flops > 0 and kind.moved > 0]
    if not shown or not peaks or not bandwidth:
        return ""
    top = math.log10(max(peaks.values())) + 0.15
    low = min(math.log10(min(kind.flops / kind.moved for kind in shown)), 0.0) - 0.3
    ridge = math.log10(max(peaks.values()) / bandwidth)
    high = max(math.log10(max(kind.flops / kind.moved for kind in shown)), ridge) + 0.5

    def x(intensity: float) -> float:
        share = (math.log10(intensity) - low) / (high - low)
        return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    def y(rate: float) -> float:
        share = min(max((top - math.log10(rate)) / DECADES, 0.0), 1.0)
        return TOP + share * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Roofline">']
    parts += _axes(x, y, (low, high), top)
    start = max(10**low, 10 ** (top - DECADES) / bandwidth)
    for number, (unit, peak) in enumerate(sorted(peaks.items(), key=lambda item: item[1])):
        corners = ((start, start * bandwidth), (peak / bandwidth, peak), (10**high, peak))
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in corners)
        parts.append(f'<polyline class="l{number % 4}" points="{points}"/>')
        name = f"{escape(unit)} {short(peak)}"
        parts.append(f'<text x="{x(10**high) + 4:.1f}" y="{y(peak) + 4:.1f}">{name}</text>')
    for kind in shown:
        at = x(kind.flops / kind.moved), y(kind.flops)
        said = f"{kind.name}: {short(kind.flops)}FLOP/s, {short(kind.moved)}B/s"
        parts.append(
            f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4"><title>{escape(said)}</title>'
            f'</circle><text x="{at[0] + 6:.1f}" y="{at[1] - 5:.1f}">{escape(kind.name)}</text>'
        )
    return "".join(parts) + "</svg>"


def _axes(x: _Scale, y: _Scale, ends: tuple[float, float], top: float) -> list[str]:
    """Marks at each decade."""
    steps = [10.0**power for power in range(math.ceil(ends[0]), math.floor(ends[1]) + 1)]
    rates = [10.0**power for power in range(math.ceil(top - DECADES), math.floor(top) + 1)]
    below, right = HEIGHT - 16, WIDTH - RIGHT
    return [
        *(f'<text class="m" x="{x(one):.1f}" y="{below}">{one:g}</text>' for one in steps),
        *(
            f'<text class="a" x="{LEFT - 4}" y="{y(one) + 4:.1f}">{short(one)}</text>'
            for one in rates
        ),
        f'<text class="a" x="{right}" y="{HEIGHT - 2}">FLOPs for each byte</text>',
    ]
