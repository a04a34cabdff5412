"""Charts as SVG text: lines, points and steps on linear or logarithmic axes. No script, no request.

Colours are classes (`s0`, `s1`, ...), so that the page's style sheet sets them for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import msgspec

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 42
COLOURS = 6

Point = tuple[float, float]


class Series(msgspec.Struct, frozen=True):
    """Points under a name. dots: draw the points and not the line between them; labels: one for
    each point, shown beside it."""

    name: str
    points: list[Point]
    dots: bool = False
    labels: list[str] = []


class Axis(msgspec.Struct, frozen=True):
    """A range of values on a range of pixels."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; what lies outside is put on the edge."""
        low, high, value = (self._scale(v) for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.begin + min(1.0, max(0.0, share)) * (self.end - self.begin)

    def _scale(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value

    def ticks(self) -> list[float]:
        """Round values to write beside the axis."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / about))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= about)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    every = [m * 10.0**n for n in range(first, last + 1) for m in steps]
    return [tick for tick in every if low * 0.999 <= tick <= high * 1.001]


def number(value: float) -> str:
    """A tick's text: 1,200 or 0.05, and 12k or 3.4M for the large."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    from_zero: bool = True,
    title: str = "",
) -> str:
    """An SVG of the series, with a legend under it where there are several; empty for no points.

    x and y name the axes. title is for readers that do not see the picture.
    """
    shown = [one for one in series if one.points]
    if log_x:
        shown = [_positive(one) for one in shown]
    every = [point for one in shown for point in one.points]
    if not every:
        return ""
    across, up = _axes(every, log_x, from_zero)
    parts = [_frame(across, up, x, y)]
    parts += [_draw(one, index, across, up) for index, one in enumerate(shown)]
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title or y)}">'
        f"{''.join(parts)}</svg>"
    )
    return picture + (_legend(shown) if len(shown) > 1 else "")


def _positive(series: Series) -> Series:
    return msgspec.structs.replace(series, points=[p for p in series.points if p[0] > 0])


def _axes(every: Sequence[Point], log_x: bool, from_zero: bool) -> tuple[Axis, Axis]:
    xs, ys = [p[0] for p in every], [p[1] for p in every]
    low_x, high_x = min(xs), max(xs)
    if from_zero and not log_x:
        low_x = min(0.0, low_x)
    if high_x <= low_x:
        high_x = low_x * 2 if low_x > 0 else low_x + 1.0
    low_y, high_y = min(0.0, min(ys)), max(ys) * 1.05
    if high_y <= low_y:
        high_y = low_y + 1.0
    return (
        Axis(low_x, high_x, _LEFT, WIDTH - _RIGHT, log_x),
        Axis(low_y, high_y, HEIGHT - _BOTTOM, _TOP),
    )


def _frame(across: Axis, up: Axis, x: str, y: str) -> str:
    floor, left = HEIGHT - _BOTTOM, _LEFT
    parts = []
    for tick in up.ticks():
        at = up.at(tick)
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" class="end">{number(tick)}</text>')
    for tick in across.ticks():
        at = across.at(tick)
        parts.append(f'<path class="tick" d="M{at:.1f} {floor}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{floor + 17}" class="mid">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{left} {floor}H{WIDTH - _RIGHT}"/>')
    middle = (left + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="mid">{escape(x)}</text>')
    turned = f'transform="translate(12 {(floor + _TOP) / 2}) rotate(-90)"'
    parts.append(f'<text {turned} class="mid side">{escape(y)}</text>')
    return "".join(parts)


def _draw(series: Series, index: int, across: Axis, up: Axis) -> str:
    colour = f"s{index % COLOURS}"
    places = [(across.at(x), up.at(y)) for x, y in series.points]
    if not series.dots:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        return f'<path class="line {colour}" d="M{path}"/>'
    dots = "".join(f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
                   for x, y in places)  # fmt: skip
    return dots + "".join(
        f'<text class="label" x="{x + 7:.1f}" y="{y - 6:.1f}">{escape(text)}</text>'
        if x < WIDTH - 70
        else f'<text class="label end" x="{x - 7:.1f}" y="{y - 6:.1f}">{escape(text)}</text>'
        for (x, y), text in zip(places, series.labels, strict=False)
    )


def _legend(series: Sequence[Series]) -> str:
    entries = "".join(
        f'<span class="key"><i class="k{index % COLOURS}"></i>{escape(one.name)}</span>'
        for index, one in enumerate(series)
    )
    return f'<div class="legend">{entries}</div>'


def cumulative(values: Sequence[float], most: int = 200) -> list[Point]:
    """(value, share of the values up to it), at most so many points."""
    ordered = sorted(values)
    count = len(ordered)
    if count == 0:
        return []
    places = sorted({round(n * (count - 1) / most) for n in range(most + 1)})
    return [(ordered[i], (i + 1) / count) for i in places]


def binned(events: Sequence[Point], width: float, end: float) -> list[Point]:
    """(middle of the bin, sum of the events' values in it per second) of (time, value) events."""
    bins = [0.0] * max(1, math.ceil(end / width))
    for at, value in events:
        bins[min(len(bins) - 1, max(0, int(at / width)))] += value
    # The last bin may be cut short; a rate over the whole of it would show a fall that was not.
    whole = [(n + 0.5) * width for n in range(len(bins)) if (n + 1) * width <= end + 1e-9]
    return [(middle, total / width) for middle, total in zip(whole, bins, strict=False)]


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both directions, by rising x."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]
