"""The table of several runs of one server, a row for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from millrace.bench.report.results import hit_rate, hit_text, interactivity, mean_lengths
from millrace.bench.report.tables import aligned

_FIGURES = ("mean", "median", "p99")


def sweep_rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Headings, then a row for each run: what was asked, what was served, how late."""
    gpus = any("gpus" in result for result in results)
    rates = any(result["request_rate"] != "inf" for result in results)
    head = ["users", *(["req/s asked"] if rates else []), "in", "out", "req/s served"]
    head += ["total tok/s", "output tok/s"]
    head += [*(["tok/s/GPU"] if gpus else []), "tok/s/user", "TTFT ms", "TPOT ms", "ITL ms"]
    hits = any(hit_rate(result) is not None for result in results)
    head += ["prefix hits"] if hits else []
    return [(*head, "failed"), *(_row(result, rates, gpus, hits) for result in results)]


def _row(result: Mapping[str, Any], rates: bool, gpus: bool, hits: bool) -> tuple[str, ...]:
    rate = result["request_rate"]
    cells = [
        str(result["max_concurrency"] or ""),
        *(["" if rate == "inf" else f"{rate:g}"] if rates else []),
        *(f"{length:.0f}" for length in mean_lengths(result)),
        f"{result['request_throughput']:.2f}",
        f"{result['total_token_throughput']:,.0f}",
        f"{result['output_throughput']:,.0f}",
    ]
    if gpus:
        cells.append(f"{result.get('total_token_throughput_per_gpu', 0.0):,.0f}")
    cells.append(f"{interactivity(result):.1f}")
    for name in ("ttft", "tpot", "itl"):
        shown = [f"{figure}_{name}_ms" for figure in _FIGURES]
        cells.append(" / ".join(f"{result[key]:,.1f}" for key in shown if key in result))
    if hits:
        cells.append(hit_text(hit_rate(result)))
    return (*cells, str(result["failed"]))


def sweep_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of a sweep; latencies are mean / median / p99."""
    return "\n".join(aligned(sweep_rows(results)))
