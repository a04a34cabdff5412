"""A run as a table, as JSON and as one HTML page with time lines.

Names of figures follow the result files of `millrace bench serve`. Beyond what a fleet can take,
latencies only say how long the run was; so where the number of waiting requests grows through an
open-loop run, that is said, and no TTFT is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np

from millrace.bench.report.chart import Point, Series, chart, cumulative
from millrace.bench.report.page import Chart, Page, Section, environment
from millrace.simulate.common.outcome import (
    Figures,
    Latency,
    Outcome,
    Records,
    Sample,
    figures,
    samples_mean,
)
from millrace.version import __version__

_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
_GROWTH = 1.5  # in flight in the last quarter, against the second one, of a run that is too fast
_MOST_POINTS = 300
_SHARES = np.linspace(0.0, 1.0, 201)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What is reported. facts: what was simulated, by name. dollars: for a million tokens."""

    facts: dict[str, str]
    outcome: Outcome
    figures: Figures
    saturated: bool
    dollars: float | None


def result_of(
    outcome: Outcome,
    facts: dict[str, str],
    *,
    begin: float,
    end: float | None,
    open_loop: bool,
    objectives: dict[str, float],
    price: float | None,
) -> Result:
    """The figures from `begin` to `end` (None: the end of the run). price: of a replica, $/h."""
    last = outcome.seconds if end is None else min(end, outcome.seconds)
    seen = figures(outcome.records, begin, last, objectives)
    dollars = None
    if price is not None and seen.total_rate:
        per_second = outcome.replica_seconds / max(outcome.seconds, 1e-9) * price / 3600
        dollars = per_second / seen.total_rate * 1e6
    return Result(
        facts=facts,
        outcome=outcome,
        figures=seen,
        saturated=open_loop and is_saturated(outcome.samples, begin, last),
        dollars=dollars,
    )


def is_saturated(samples: Sequence[Sample], begin: float, end: float) -> bool:
    """Whether ever more requests are in the fleet while it is loaded."""
    quarter = (end - begin) / 4
    early = [one for one in samples if begin + quarter <= one.at < begin + 2 * quarter]
    late = [one for one in samples if begin + 3 * quarter <= one.at < end]
    if len(early) < 3 or len(late) < 3:
        return False
    before, after = _waiting(early), _waiting(late)
    return after > 8 and after > _GROWTH * before


def _waiting(samples: Sequence[Sample]) -> float:
    return samples_mean(samples, "waiting") + samples_mean(samples, "queued")


# --- for people --------------------------------------------------------------------------------


def rows(result: Result) -> list[tuple[str, str]]:
    """(name, value) of each line of the table."""
    seen, outcome = result.figures, result.outcome
    found = [
        *result.facts.items(),
        ("simulated time", f"{outcome.seconds:,.1f} s, computed in {outcome.wall_seconds:.1f} s"),
        ("requests", f"{seen.completed:,} completed, {seen.failed:,} failed"),
        ("request throughput", f"{seen.requests_rate:,.2f} /s"),
        ("output tokens", f"{seen.output_rate:,.0f} /s"),
        ("total tokens", f"{seen.total_rate:,.0f} /s"),
        ("in flight, mean", f"{seen.in_flight:,.1f}"),
    ]
    if seen.good is not None:
        found.append(("goodput", f"{seen.good:,.2f} /s"))
    if seen.cached:
        found.append(("prompt tokens cached", f"{100 * seen.cached:.1f}%"))
    for name, title in _LATENCIES.items():
        hidden = result.saturated and name in ("ttft", "e2el")
        found.append((title, "-" if hidden else _latency_text(getattr(seen, name))))
    replicas = outcome.replica_seconds / max(outcome.seconds, 1e-9)
    found.append(("replicas, mean", f"{replicas:,.2f}, busy {100 * outcome.busy:.0f}%"))
    found += [
        (name.replace("_", " "), f"{count:,}")
        for name, count in outcome.counts.items()
        if count and name in _EVENTS
    ]
    if result.dollars is not None:
        found.append(("per million tokens", f"${result.dollars:.3f}"))
    return found


_EVENTS = (
    *("preemptions", "retries", "resumed", "cut_off", "refused"),
    *("crashes", "reclaims", "starts", "page_shortages"),
)


def warnings(result: Result) -> list[str]:
    """What must be said beside the figures."""
    found = []
    if result.saturated:
        found.append(
            "More and more requests wait: the fleet cannot keep up with this rate, so TTFT and "
            "E2EL only say how long the run is and are left out. Use a lower --request-rate."
        )
    if shortages := result.outcome.counts.get("page_shortages", 0):
        found.append(
            f"The KV cache was full in {shortages:,} steps of engines. The aggregated mode "
            "preempts nobody, so its figures are too good: use --mode event, or more --num-pages."
        )
    if not result.outcome.ended:
        found.append("Some requests had not ended when the simulation was cut off.")
    return found


def _latency_text(seen: Latency) -> str:
    values = (seen.mean, seen.p50, seen.p90, seen.p99)
    mean, p50, p90, p99 = (_milliseconds(value) for value in values)
    return f"{mean} mean, {p50} p50, {p90} p90, {p99} p99 ms"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:,.1f}"


# --- for programs ------------------------------------------------------------------------------


def fields(result: Result) -> dict[str, Any]:
    """The result as JSON. Latencies are in milliseconds; those left out are null."""
    seen, outcome = result.figures, result.outcome
    found: dict[str, Any] = {
        "simulated": True,
        "mode": outcome.mode,
        "version": __version__,
        **{name.replace(" ", "_"): text for name, text in result.facts.items()},
        "duration": seen.seconds,
        "wall_seconds": outcome.wall_seconds,
        "completed": seen.completed,
        "failed": seen.failed,
        "total_input_tokens": seen.prompt_tokens,
        "total_output_tokens": seen.output_tokens,
        "request_throughput": seen.requests_rate,
        "output_throughput": seen.output_rate,
        "total_token_throughput": seen.total_rate,
        "request_goodput": seen.good,
        "mean_in_flight": seen.in_flight,
        "cached_share": seen.cached,
        "saturated": result.saturated,
        "replica_seconds": outcome.replica_seconds,
        "busy": outcome.busy,
        "dollars_per_million_tokens": result.dollars,
        "counts": outcome.counts,
        "warnings": warnings(result),
    }
    for name in _LATENCIES:
        hidden = result.saturated and name in ("ttft", "e2el")
        for part in ("mean", "p50", "p90", "p99"):
            label = {"p50": "median"}.get(part, part)
            value = None if hidden else 1e3 * getattr(getattr(seen, name), part)
            found[f"{label}_{name}_ms"] = value
    found["time_line"] = [msgspec.structs.asdict(one) for one in outcome.samples]
    return found


# --- the page ----------------------------------------------------------------------------------


def page(result: Result) -> str:
    """One HTML file, without scripts and without requests."""
    model = result.facts.get("model", "fleet")
    sections = [
        Section(
            title="Figures",
            table=[("figure", "value"), *rows(result)],
            warnings=warnings(result),
            notes=[
                "Every figure is computed, none is measured. The scheduler and the policies are "
                "those that serve; the time of a step is the step model's."
            ],
        ),
        Section(title="Over time", charts=_over_time(result)),
        Section(title="Latencies", charts=_distributions(result)),
    ]
    made = Page(
        models=[model],
        files=0,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        sections=[section for section in sections if not section.empty],
        title="Simulation",
    )
    return environment().get_template("report.html.j2").render(page=made)


def _over_time(result: Result) -> list[Chart]:
    outcome = result.outcome
    samples, records = outcome.samples, outcome.records
    found = [
        ("Output tokens per second", [Series("output tokens", _token_points(records))]),
        (
            "Requests",
            [
                Series(name, _points(samples, name))
                for name in ("running", "waiting", "queued")
                if any(getattr(one, name) for one in samples)
            ],
        ),
        (
            "Replicas",
            [
                Series(name, _points(samples, name))
                for name in ("up", "starting", "draining")
                if any(getattr(one, name) for one in samples)
            ],
        ),
        ("Share of KV pages in use", [Series("KV pages", _points(samples, "kv_used"))]),
        ("TTFT of requests sent at a time, s", [Series("TTFT", _first_tokens(records), dots=True)]),
    ]
    return [
        Chart(title, drawn)
        for title, series in found
        if (drawn := chart(series, x="seconds", y=title)) is not None
    ]


def _distributions(result: Result) -> list[Chart]:
    records = result.outcome.records
    first, due, ended = (np.array(a) for a in (records.first, records.due, records.ended))
    output = np.array(records.output)
    done = (ended >= 0) & (first >= 0)
    several = done & (output > 1)
    values = {
        "TTFT, s": (first - due)[done],
        "TPOT, s": (ended - first)[several] / (output[several] - 1),
        "E2EL, s": (ended - due)[done],
    }
    found = []
    for title, seen in values.items():
        line = cumulative(np.quantile(seen, _SHARES).tolist() if len(seen) else [])
        drawn = chart([Series(title, line)], x=title, y="share of requests")
        if drawn is not None and not (result.saturated and not title.startswith("TPOT")):
            found.append(Chart(title, drawn))
    return found


def _points(samples: Sequence[Sample], name: str) -> list[Point]:
    return _thinned([(one.at, float(getattr(one, name))) for one in samples])


def _token_points(records: Records) -> list[Point]:
    values = list(records.tokens.values)
    width = max(1, math.ceil(len(values) / _MOST_POINTS))
    whole = len(values) // width * width
    return [(at + width / 2, sum(values[at : at + width]) / width) for at in range(0, whole, width)]


def _first_tokens(records: Records) -> list[Point]:
    sent, first, due = (np.array(a) for a in (records.sent, records.first, records.due))
    begun = np.flatnonzero(first >= 0)
    begun = begun[:: max(1, math.ceil(len(begun) / (4 * _MOST_POINTS)))]
    return sorted(zip(sent[begun].tolist(), (first - due)[begun].tolist(), strict=True))


def _thinned(points: list[Point], most: int = _MOST_POINTS) -> list[Point]:
    step = max(1, math.ceil(len(points) / most))
    return points[::step]
