"""Charts: from points to a picture in pixels, on linear or logarithmic axes.

This module computes where everything goes. The templates draw it as SVG, and the style sheet gives
the colours their values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

Point = tuple[float, float]


class Series(msgspec.Struct, frozen=True):
    """Points under a name. dots: draw the points and not the line between them; labels: one for
    each point, shown beside it; hollow: as rings; colour: its number, None for the next one."""

    name: str
    points: list[Point]
    dots: bool = False
    labels: list[str] = []
    hollow: bool = False
    colour: int | None = None


class Frame(msgspec.Struct, frozen=True):
    """A picture's size and the edges of its plot, in pixels; y grows downwards."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


class Tick(msgspec.Struct, frozen=True):
    """A value beside an axis: its pixel and its text."""

    at: float
    text: str


class Label(msgspec.Struct, frozen=True):
    """A text beside a point, in pixels. at_end: the text ends there, and does not begin."""

    x: float
    y: float
    text: str
    at_end: bool


class DrawnSeries(msgspec.Struct, frozen=True):
    """A series in pixels, with the number of its colour."""

    name: str
    colour: int
    points: list[Point]
    dots: bool
    labels: list[Label]
    hollow: bool = False


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A chart, laid out: all that a template needs to draw it."""

    label: str
    x_name: str
    y_name: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    series: list[DrawnSeries]

    @property
    def frame(self) -> Frame:
        return FRAME


FRAME = Frame(width=560, height=300, left=58, right=546, top=12, bottom=258)
COLOURS = 6


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
        found = _log_ticks(self.low, self.high) if self.log else []
        # Between two neighbouring powers there may be no round value of a logarithmic axis.
        return found if len(found) > 1 else _ticks(self.low, self.high)


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
) -> Picture | None:
    """The series laid out; None for no points.

    x and y name the axes. title is for readers that do not see the picture.
    """
    shown = [one for one in series if one.points]
    if log_x:
        shown = [_positive(one) for one in shown]
    every = [point for one in shown for point in one.points]
    if not every:
        return None
    x_axis, y_axis = _axes(every, log_x, from_zero)
    taken: list[Label] = []
    return Picture(
        label=title or y,
        x_name=x,
        y_name=y,
        x_ticks=[Tick(x_axis.at(value), number(value)) for value in x_axis.ticks()],
        y_ticks=[Tick(y_axis.at(value), number(value)) for value in y_axis.ticks()],
        series=[_drawn(one, index, x_axis, y_axis, taken) for index, one in enumerate(shown)],
    )


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
        Axis(low_x, high_x, FRAME.left, FRAME.right, log_x),
        Axis(low_y, high_y, FRAME.bottom, FRAME.top),
    )


def _drawn(
    series: Series, index: int, x_axis: Axis, y_axis: Axis, taken: list[Label]
) -> DrawnSeries:
    """A series in pixels. taken: the labels of the picture so far; its own are added."""
    points = [(x_axis.at(x), y_axis.at(y)) for x, y in series.points]
    labels = []
    for point, text in zip(points, series.labels, strict=False):
        labels.append(_label(point, text, taken))
        taken.append(labels[-1])
    colour = (index if series.colour is None else series.colour) % COLOURS
    return DrawnSeries(series.name, colour, points, series.dots, labels, series.hollow)


_LETTER, _LINE = 8.0, 14.0  # pixels that a letter and a line of a label take at most


def _label(point: Point, text: str, taken: Sequence[Label]) -> Label:
    """A text beside a point, where it lies in the picture and, if there is such a place, on none
    of the others."""
    x, y = point
    places = [
        Label(x - 7 if at_end else x + 7, y + down, text, at_end)
        for down in (-6, 14, 4, -20, 28)
        for at_end in (False, True)
    ]
    inside = [one for one in places if _extent(one)[0] >= 0 and _extent(one)[1] <= FRAME.width]
    free = [one for one in inside if not any(_overlap(one, other) for other in taken)]
    return next(iter([*free, *inside, *places]))


def _overlap(one: Label, other: Label) -> bool:
    (left, right), (begin, end) = _extent(one), _extent(other)
    return left < end and begin < right and abs(one.y - other.y) < _LINE


def _extent(label: Label) -> tuple[float, float]:
    """Where a label begins and ends."""
    width = _LETTER * len(label.text)
    return (label.x - width, label.x) if label.at_end else (label.x, label.x + width)


def cumulative(values: Sequence[float], most: int = 200) -> list[Point]:
    """(value, share of the values up to it), at most so many points."""
    ordered = sorted(values)
    count = len(ordered)
    if count == 0:
        return []
    indices = sorted({round(n * (count - 1) / most) for n in range(most + 1)})
    return [(ordered[i], (i + 1) / count) for i in indices]


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
