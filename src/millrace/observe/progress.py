"""A line of figures while samples are taken: what runs, how fast, and at what power."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from millrace.observe.report.figures import POWER
from millrace.observe.report.phases import RUNNING
from millrace.observe.report.replicas import OUTPUT, WAITING
from millrace.observe.samples.sample import Row


class Progress:
    """Knows the newest rows, and the ones of its last line, for the rate between them."""

    def __init__(self) -> None:
        self._rows: Sequence[Row] = ()
        self._last: dict[tuple[str, str], Row] = {}

    def add(self, rows: Sequence[Row]) -> None:
        """The rows of one moment."""
        self._rows = rows
        if not self._last:
            self._output_rate()

    def line(self) -> str:
        """`2 of 3 targets answer; 5,210 tok/s out; 64 running, 3 waiting; 1,310 W`."""
        up = [row.value for row in self._rows if row.name == "up"]
        parts = [f"{sum(up):.0f} of {len(up)} targets answer"] if up else []
        rate = self._output_rate()
        if rate is not None:
            parts.append(f"{rate:,.0f} tok/s out")
        running, waiting = (_sum(self._rows, names) for names in (RUNNING, WAITING))
        if running is not None:
            parts.append(f"{running:,.0f} running, {waiting or 0:,.0f} waiting")
        watts = _sum(self._rows, POWER)
        if watts is not None:
            parts.append(f"{watts:,.0f} W")
        return "; ".join(parts) or "this host is sampled"

    def _output_rate(self) -> float | None:
        """Output tokens a second since the last line; None before there is one. An engine that was
        started again counts from then on."""
        found = {(row.source, row.labels): row for row in _named(self._rows, OUTPUT)}
        rates = [
            max(row.value - before.value, 0.0) / (row.t - before.t)
            for key, row in found.items()
            if (before := self._last.get(key)) is not None and row.t > before.t
        ]
        self._last = found
        return sum(rates) if rates else None


def _named(rows: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """The rows of the first of these names that there is."""
    rows = list(rows)
    for name in names:
        if found := [row for row in rows if row.name == name]:
            return found
    return []


def _sum(rows: Iterable[Row], names: Sequence[str]) -> float | None:
    found = _named(rows, names)
    return sum(row.value for row in found) if found else None
