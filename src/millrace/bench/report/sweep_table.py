"""The table of several runs of one server: a row for each load, the median of its repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.bench.report.loads import Load, loads_of
from millrace.bench.report.results import ResultFile, hit_rate, hit_text, mean_lengths
from millrace.bench.report.tables import aligned

_LATENCIES = ("ttft", "tpot", "itl")


def sweep_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of a sweep; latencies are median / p99. Under it, what the runs are."""
    files = [ResultFile(Path(), dict(result)) for result in results]
    loads = loads_of({"": files})
    rows = [_headings(files), *(_row(load, files) for load in loads)]
    lines = aligned(rows, keys=1 + _has_rates(files))
    if any(len(load.runs) > 1 for load in loads):
        lines.append("medians over runs; spread: of total tok/s, highest less lowest")
    return "\n".join(lines)


def _has_rates(files: Sequence[ResultFile]) -> bool:
    return any(file.fields["request_rate"] != "inf" for file in files)


def _has_gpus(files: Sequence[ResultFile]) -> bool:
    return any("gpus" in file.fields for file in files)


def _has_hits(files: Sequence[ResultFile]) -> bool:
    return any(hit_rate(file.fields) is not None for file in files)


def _has_repeats(files: Sequence[ResultFile]) -> bool:
    return any(len(load.runs) > 1 for load in loads_of({"": files}))


def _headings(files: Sequence[ResultFile]) -> tuple[str, ...]:
    return (
        *("users", *(["asked/s"] if _has_rates(files) else []), "in", "out"),
        *(["runs", "spread"] if _has_repeats(files) else []),
        *("req/s", "total tok/s", "out tok/s", *(["tok/s/GPU"] if _has_gpus(files) else [])),
        *("tok/s/user", "TTFT ms", "TPOT ms", "ITL ms"),
        *(["prefix hits"] if _has_hits(files) else []),
        "failed",
    )


def _row(load: Load, files: Sequence[ResultFile]) -> tuple[str, ...]:
    fields = load.middle.fields
    rate = fields["request_rate"]
    asked = ["" if rate == "inf" else f"{rate:g}"] if _has_rates(files) else []
    known = sorted(rate for run in load.shown if (rate := hit_rate(run.fields)) is not None)
    hits = [hit_text(known[len(known) // 2] if known else None)] if _has_hits(files) else []
    gpus = [f"{_median(load, 'total_token_throughput_per_gpu'):,.0f}"] if _has_gpus(files) else []
    return (
        *(str(fields["max_concurrency"] or ""), *asked),
        *(f"{length:.0f}" for length in mean_lengths(fields)),
        *([str(len(load.runs)), _spread(load)] if _has_repeats(files) else []),
        f"{_median(load, 'request_throughput'):.2f}",
        f"{_median(load, 'total_token_throughput'):,.0f}",
        f"{_median(load, 'output_throughput'):,.0f}",
        *gpus,
        f"{_median(load, 'interactivity'):.1f}",
        *(_latency(load, name) for name in _LATENCIES),
        *hits,
        str(sum(run.fields["failed"] for run in load.runs)),
    )


def _median(load: Load, figure: str) -> float:
    found = load.spread(figure)
    return found.median if found else 0.0


def _spread(load: Load) -> str:
    found = load.spread("total_token_throughput")
    return f"{(found.high - found.low) / found.median:.0%}" if found and found.median else ""


def _latency(load: Load, name: str) -> str:
    spreads = [load.spread(f"{figure}_{name}_ms") for figure in ("median", "p99")]
    return " / ".join(_milliseconds(found.median) for found in spreads if found)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
