"""What a run looks like on paper: the table, and the JSON that other tools read.

Names and layout follow `vllm bench serve`, so that its readers read ours; what only we know stands
under names of its own (`steady_state`, `client`, `cancelled`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from millrace.bench.metrics import LATENCIES, Distribution, Record, Summary, Window

_TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
_WIDTH = 50


def percentile_name(percentile: float) -> str:
    """p99 for 99.0, p99.9 for 99.9."""
    return f"p{percentile:g}"


def latency_fields(latencies: Mapping[str, Distribution]) -> dict[str, float]:
    """{mean,median,std,pNN}_{ttft,tpot,itl,e2el}_ms."""
    fields: dict[str, float] = {}
    for name in LATENCIES:
        seen = latencies[name]
        fields |= {f"mean_{name}_ms": seen.mean, f"median_{name}_ms": seen.median}
        fields[f"std_{name}_ms"] = seen.std
        for percentile, value in seen.percentiles.items():
            fields[f"{percentile_name(percentile)}_{name}_ms"] = value
    return fields


def summary_fields(summary: Summary) -> dict[str, Any]:
    """The figures of a run under their JSON names."""
    whole = summary.whole
    return {
        "duration": whole.duration,
        "completed": whole.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": whole.request_throughput,
        "request_goodput": summary.goodput,
        "output_throughput": whole.output_throughput,
        "total_token_throughput": whole.total_token_throughput,
        "max_concurrent_requests": summary.peak_concurrency,
        **latency_fields(whole.latencies),
        "steady_state": _steady_fields(summary.steady),
    }


def _steady_fields(steady: Window | None) -> dict[str, Any] | None:
    if steady is None:
        return None
    return {
        "duration": steady.duration,
        "completed": steady.completed,
        "request_throughput": steady.request_throughput,
        "output_throughput": steady.output_throughput,
        "total_token_throughput": steady.total_token_throughput,
        **latency_fields(steady.latencies),
    }


def detail_fields(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Every request, in the order of the workload; times in seconds, starts from the first."""
    ordered = sorted(records, key=lambda r: r.index)
    first = min((r.start_ns for r in ordered), default=0)
    return {
        "input_lens": [r.input_tokens for r in ordered],
        "output_lens": [r.output_tokens for r in ordered],
        "start_times": [(r.start_ns - first) / 1e9 for r in ordered],
        "ttfts": [r.ttft if r.chunk_ns else 0.0 for r in ordered],
        "itls": [r.itls for r in ordered],
        "errors": [r.error or "" for r in ordered],
    }


def table(result: Mapping[str, Any], shown: Iterable[str], percentiles: Sequence[float]) -> str:
    """The result table of one run; `result` holds the fields of its JSON file."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
    lines += _counts(result)
    for name in shown:
        short, title = _TITLES[name]
        lines.append(f"{title:-^{_WIDTH}}")
        for figure in ("mean", "median", *(percentile_name(p) for p in percentiles)):
            label = f"{figure.capitalize()} {short} (ms):"
            lines.append(_row(label, result[f"{figure}_{name}_ms"]))
    steady = result.get("steady_state")
    if steady is not None:
        lines.append(f"{'Steady state (full concurrency)':-^{_WIDTH}}")
        lines.append(_row("Duration (s):", steady["duration"]))
        lines.append(_row("Output token throughput (tok/s):", steady["output_throughput"]))
        lines.append(_row("Total token throughput (tok/s):", steady["total_token_throughput"]))
    lines.append("=" * _WIDTH)
    return "\n".join(lines)


def _counts(result: Mapping[str, Any]) -> list[str]:
    rows = {
        "Successful requests:": result["completed"],
        "Failed requests:": result["failed"],
        "Cancelled requests:": result["cancelled"] or None,
        "Maximum request concurrency:": result["max_concurrency"],
        "Request rate configured (RPS):": _finite(result["request_rate"]),
        "Benchmark duration (s):": result["duration"],
        "Total input tokens:": result["total_input_tokens"],
        "Total generated tokens:": result["total_output_tokens"],
        "Request throughput (req/s):": result["request_throughput"],
        "Request goodput (req/s):": result["request_goodput"],
        "Output token throughput (tok/s):": result["output_throughput"],
        "Total token throughput (tok/s):": result["total_token_throughput"],
        "Peak concurrent requests:": result["max_concurrent_requests"],
    }
    return [_row(label, value) for label, value in rows.items() if value is not None]


def _finite(rate: float | str) -> float | None:
    return None if isinstance(rate, str) else rate


def _row(label: str, value: float) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40}{text:>{_WIDTH - 40}}"


def error_lines(records: Iterable[Record], most: int = 5) -> list[str]:
    """One line for each kind of failure, the most frequent first."""
    kinds = Counter(r.error for r in records if r.error is not None)
    lines = [f"{count} failed: {text}" for text, count in kinds.most_common(most)]
    if len(kinds) > most:
        lines.append(f"and {len(kinds) - most} other kinds of failure")
    return lines
