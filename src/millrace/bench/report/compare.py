"""Two servers, or two versions of one, compared over repeated runs.

Every figure gets a ratio with a 95% confidence interval. A difference is claimed only where the
interval does not contain 1. The interval is Welch's on the logarithms: figures of runs are
positive, vary by factors, and are few. Resampling three values would give too narrow intervals.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec

from millrace.bench.report.results import LOAD_FIELDS, ResultFile, grouped, hit_rate, load_label
from millrace.bench.report.tables import aligned
from millrace.errors import UserError

HIGHER = ("request_throughput", "output_throughput", "total_token_throughput", "request_goodput")
LOWER = tuple(
    f"{figure}_{name}_ms"
    for name in ("ttft", "tpot", "itl", "e2el")
    for figure in ("mean", "median", "p99")
)
# Student's t at 97.5%, by degrees of freedom from 1 on. Beyond the table its last value is used,
# which makes intervals slightly too wide.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


_EQUAL_HITS = 0.02  # hit rates that differ by no more come from the same work


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """B relative to A for one figure. low and high: 95% interval, None for fewer than two runs of
    either. better: whether a higher ratio is a better one."""

    figure: str
    a: float
    b: float
    ratio: float
    low: float | None
    high: float | None
    higher_is_better: bool

    @property
    def differs(self) -> bool:
        """Whether the runs show a difference."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high

    @property
    def verdict(self) -> str:
        """In words: better, worse, or no difference shown."""
        if self.low is None:
            return "one run: no interval"
        if not self.differs:
            return "no difference shown"
        return f"B {self.direction} by {abs(self.ratio - 1):.1%}"

    @property
    def direction(self) -> str:
        """Whether B's figure is the better or the worse one."""
        return "better" if (self.ratio > 1) == self.higher_is_better else "worse"


class Comparison(msgspec.Struct, frozen=True):
    """One load that was measured on both: the number of runs of each, and all ratios.

    hit_rates: of the prefix caches, the lowest and the highest of A's runs and of B's; None where
    unknown.
    """

    load: str
    runs: tuple[int, int]
    ratios: list[Ratio]
    hit_rates: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None)

    @property
    def warning(self) -> str | None:
        """A line where the runs found different shares of their prompts in prefix caches."""
        known = [rate for pair in self.hit_rates if pair is not None for rate in pair]
        if not known or max(known) - min(known) <= _EQUAL_HITS:
            return None
        return (
            f"warning: prefix cache hits differ between runs ({min(known):.1%} to "
            f"{max(known):.1%}): these are not repeats of the same work"
        )


ENOUGH = 3  # runs of each; the interval of two is so wide that it shows factors alone


def too_few(comparisons: Sequence[Comparison]) -> str | None:
    """What to say first where there are too few runs to tell a difference from noise."""
    least = min(count for one in comparisons for count in one.runs)
    if least >= ENOUGH:
        return None
    runs = "one run is" if least == 1 else "two runs are"
    why = "there is no interval" if least == 1 else "intervals are too wide to show what differs"
    return f"{runs} too few: {why}; measure again with --num-runs 5"


def differing_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """What differs, a line for each load, the lightest first."""
    lines = []
    for one in comparisons:
        differing = [ratio for ratio in one.ratios if ratio.differs]
        found = [f"{r.figure} {r.ratio - 1:+.1%} ({r.direction})" for r in differing]
        words = ", ".join(found) or f"no difference shown in {len(one.ratios)} figures"
        lines.append(f"{one.load}: {words}")
    return lines


def unmatched(a: Sequence[ResultFile], b: Sequence[ResultFile]) -> list[str]:
    """A line for each load that only one of the sets has."""
    of_a, of_b = grouped(a, among=b), grouped(b, among=a)
    return [
        f"{load_label(runs[0].fields)}: in {name} alone"
        for name, own, other in (("A", of_a, of_b), ("B", of_b, of_a))
        for key, runs in own.items()
        if key not in other
    ]


def compare(a: Sequence[ResultFile], b: Sequence[ResultFile]) -> list[Comparison]:
    """Every load that was measured on both, the lightest first.

    Raises UserError when there is none, naming what differs.
    """
    of_a, of_b = grouped(a, among=b), grouped(b, among=a)
    common = [key for key in of_a if key in of_b]
    if not common:
        raise UserError(f"A and B have no load in common{_what_differs(of_a, of_b)}")
    return [_one(of_a[key], of_b[key]) for key in common]


def _what_differs(of_a: dict[Any, list[ResultFile]], of_b: dict[Any, list[ResultFile]]) -> str:
    if not of_a or not of_b:
        return ": one of them has no run of a server"
    first, second = (next(iter(groups.values()))[0].fields for groups in (of_a, of_b))
    differing = [
        f"{name} {first.get(name)!r} and {second.get(name)!r}"
        for name in LOAD_FIELDS
        if name != "model_id" and first.get(name) != second.get(name)
    ]
    return f": they differ in {', '.join(differing)}"


def _one(a: Sequence[ResultFile], b: Sequence[ResultFile]) -> Comparison:
    ratios = []
    for figure in (*HIGHER, *LOWER):
        values_a, values_b = ([_figure(r, figure) for r in side] for side in (a, b))
        if all(v is not None and v > 0 for v in (*values_a, *values_b)):
            numbers = [[float(v) for v in side if v] for side in (values_a, values_b)]
            ratios.append(ratio_of(figure, *numbers))
    hits = (_hit_range(a), _hit_range(b))
    return Comparison(load_label(a[0].fields), (len(a), len(b)), ratios, hits)


def _hit_range(results: Sequence[ResultFile]) -> tuple[float, float] | None:
    known = [rate for result in results if (rate := hit_rate(result.fields)) is not None]
    return (min(known), max(known)) if known else None


def _figure(result: ResultFile, name: str) -> float | None:
    value = result.fields.get(name)
    return float(value) if isinstance(value, int | float) else None


def ratio_of(figure: str, a: Sequence[float], b: Sequence[float]) -> Ratio:
    """The ratio of geometric means, B to A, with its interval; all values are above 0."""
    logs_a, logs_b = ([math.log(value) for value in side] for side in (a, b))
    middle = statistics.fmean(logs_b) - statistics.fmean(logs_a)
    low = high = None
    if min(len(a), len(b)) > 1:
        half = _half_width(logs_a, logs_b)
        low, high = math.exp(middle - half), math.exp(middle + half)
    return Ratio(
        figure=figure,
        a=math.exp(statistics.fmean(logs_a)),
        b=math.exp(statistics.fmean(logs_b)),
        ratio=math.exp(middle),
        low=low,
        high=high,
        higher_is_better=figure in HIGHER,
    )


def paired_interval(
    logs: Sequence[float], error: float = 0.0
) -> tuple[float, float | None, float | None]:
    """A ratio of values measured by turns, with its 95% interval: None for fewer than two.

    logs: of the ratio in each turn. error: relative, of what measures; the interval is wider by it.
    """
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(middle), None, None
    half = student_t(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    half += math.log1p(error)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def _half_width(a: Sequence[float], b: Sequence[float]) -> float:
    """Half of Welch's 95% interval for the difference of two means."""
    parts = [statistics.variance(side) / len(side) for side in (a, b)]
    total = sum(parts)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(
        part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True)
    )
    return student_t(freedom) * math.sqrt(total)


def student_t(freedom: float) -> float:
    """Student's t at 97.5% for so many degrees of freedom."""
    return _T[min(max(1, math.floor(freedom)), len(_T)) - 1]


def comparison_table(comparison: Comparison) -> str:
    """The table of one load."""
    rows = [("figure", "A", "B", "B / A", "95% interval", "verdict")]
    for r in comparison.ratios:
        interval = "" if r.low is None else f"{r.low:.3f} .. {r.high:.3f}"
        cells = (r.figure, f"{r.a:,.2f}", f"{r.b:,.2f}", f"{r.ratio:.3f}", interval, r.verdict)
        rows.append(cells)
    runs = f"{comparison.runs[0]} run(s) of A, {comparison.runs[1]} of B"
    lines = [f"{comparison.load}: {runs}", *aligned(rows)]
    for name, rates in zip("AB", comparison.hit_rates, strict=True):
        if rates is not None:
            lines.append(f"prefix hits of {name}: {rates[0]:.1%} to {rates[1]:.1%}")
    if comparison.warning is not None:
        lines.append(comparison.warning)
    return "\n".join(lines)
