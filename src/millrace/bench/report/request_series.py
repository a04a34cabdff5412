"""From the raw data beside a result file to series over time and samples of latencies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any

from millrace.bench.report.chart import Point, binned
from millrace.bench.report.results import ResultFile
from millrace.bench.report.save import read_table

Columns = Mapping[str, list[Any]]


def read_requests(run: ResultFile) -> Columns | None:
    """The columns of a run's successful requests; None where there are no raw data.

    Raises UserError, OSError or ValueError for a file that cannot be read.
    """
    path = run.raw("requests")
    if path is None:
        return None
    table = read_table(path)
    good = [e is None and bool(c) for e, c in zip(table["error"], table["chunk_ns"], strict=True)]
    return {
        name: [value for value, is_good in zip(column, good, strict=True) if is_good]
        for name, column in table.items()
    }


def sample_series(run: ResultFile, names: Iterable[str]) -> dict[str, list[Point]]:
    """(seconds, value) of each of these figures that was sampled. Raises as `read_requests`."""
    path = run.raw("samples")
    table = read_table(path) if path else {}
    begin = min(table.get("at_ns") or [0])
    found = {}
    for name in names:
        if name in table:
            pairs = zip(table["at_ns"], table[name], strict=True)
            found[name] = [((at - begin) / 1e9, float(v)) for at, v in pairs if v is not None]
    return found


def token_rate(table: Columns) -> list[Point]:
    """Output tokens a second over time; those of an answer are spread evenly over its chunks."""
    begin, end = min(table["start_ns"], default=0), max(table["end_ns"], default=0)
    seconds = (end - begin) / 1e9
    events = [
        ((at - begin) / 1e9, tokens / len(chunks))
        for chunks, tokens in zip(table["chunk_ns"], table["output_tokens"], strict=True)
        for at in chunks
    ]
    return binned(events, max(0.25, seconds / 120), seconds)


def in_flight(table: Columns, most: int = 400) -> list[Point]:
    """Requests in flight over time, at about so many points at most."""
    begin = min(table["start_ns"], default=0)
    edges = sorted([(t, 1) for t in table["start_ns"]] + [(t, -1) for t in table["end_ns"]])
    levels = accumulate(change for _, change in edges)
    changes = [((at - begin) / 1e9, float(n)) for (at, _), n in zip(edges, levels, strict=True)]
    kept = changes[:: max(1, len(changes) // most)]
    points: list[Point] = kept[:1]
    for (_, before), (at, after) in pairwise(kept):  # a step, not a slope
        points += [(at, before), (at, after)]
    return points


def latencies_ms(table: Columns) -> dict[str, list[float]]:
    """TTFT, TPOT and ITL in ms."""
    rows = list(zip(table["start_ns"], table["chunk_ns"], table["output_tokens"], strict=True))
    return {
        "TTFT": [(chunks[0] - start) / 1e6 for start, chunks, _ in rows],
        "TPOT": [(c[-1] - c[0]) / 1e6 / (n - 1) for _, c, n in rows if n > 1],
        "ITL": [(b - a) / 1e6 for _, c, _ in rows for a, b in pairwise(c)],
    }
