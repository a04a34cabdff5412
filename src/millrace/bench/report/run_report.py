"""The figures of a run as a table, and as the fields of its JSON file.

Names and layout follow `vllm bench serve`, so that tools for its files read these too. Figures that
it does not have are under names of their own (`steady_state`, `client`, `cancelled`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
import numpy as np

from millrace.bench.load.options import BenchOptions
from millrace.bench.load.process_pool import Outcome
from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.bursts import burst_fields
from millrace.bench.measure.client_overhead import ClientOverhead
from millrace.bench.measure.metrics import LATENCIES, Distribution, Summary, Window, successes
from millrace.bench.measure.prometheus_reader import expert_load, prefix_hits, speculation
from millrace.bench.measure.reuse import reuse_fields
from millrace.bench.measure.telemetry import Observation
from millrace.bench.report.results import hit_rate
from millrace.bench.report.tables import aligned
from millrace.bench.workload.prompts import (
    AgentSpec,
    Lengths,
    RandomSpec,
    TraceSpec,
    workload_digest,
)

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


def run_fields(
    options: BenchOptions,
    model: str,
    seen: Lengths,
    outcome: Outcome,
    summary: Summary,
    client: ClientOverhead,
    observation: Observation,
) -> dict[str, Any]:
    """All fields of a result file except provenance and accuracy."""
    done = successes(outcome.records)
    planned = options.workload.count
    if planned is None or options.duration is not None:
        planned = outcome.started
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": options.backend,
        "label": options.label or options.backend,
        "model_id": options.model_id or model,
        "tokenizer_id": options.model_id or model,
        "num_prompts": planned,
        **_load_fields(options),
        "mean_input_len": seen.mean_input,
        "mean_output_len": seen.mean_output,
        "cancelled": max(0, planned - len({r.index for r in outcome.records})),
        "interrupted": outcome.interrupted,
        "usage_missing": sum(not r.counted for r in done),
        **summary_fields(summary),
        **_per_gpu(options, summary),
        "from_due": _from_due(options, done),
        "client": msgspec.to_builtins(client),
        "server": _server_fields(observation, summary),
        "prefix_cache_hit_rate": _hit_rate(observation, done),
        **_reuse(options, outcome.records),
        **_bursts(options, outcome.records),
        **detail_fields(outcome.records),
    }


def _load_fields(options: BenchOptions) -> dict[str, Any]:
    schedule, workload = options.schedule, options.workload
    fields: dict[str, Any] = {
        "dataset_name": str(workload.__struct_config__.tag),
        "request_rate": schedule.rate if np.isfinite(schedule.rate) else "inf",
        "burstiness": schedule.burstiness,
        "max_concurrency": options.max_concurrency,
        "processes": options.processes,
        "seed": workload.seed,
        "workload": workload_digest(workload),
        "objectives": options.objectives,
        "coordinated_omission": _omission(options),
    }
    if options.duration is not None:
        fields["duration_limit"] = options.duration
    if schedule.ramp is not None:
        fields["ramp_up_strategy"] = schedule.ramp
        fields["ramp_up_start_rps"] = schedule.ramp_start
        fields["ramp_up_end_rps"] = schedule.ramp_end
    if isinstance(workload, RandomSpec):
        fields["random_range_ratio"] = workload.range_ratio
        fields["random_range_convention"] = workload.convention
        fields["random_prefix_len"] = workload.prefix_len
        fields["random_context_len"] = workload.context_len
        fields["multi_turn_turns"] = workload.turns
    return fields


def _omission(options: BenchOptions) -> str:
    """How the figures treat the time that requests spent before they were sent."""
    if not options.schedule.open_loop:
        return (
            "closed loop: a slow answer holds back the next request, so latencies are those of "
            "this concurrency and not of an arrival rate"
        )
    if options.max_concurrency is not None:
        return (
            "open loop with a limit: waiting for a free slot is not part of the latencies; "
            "`from_due` includes it"
        )
    return "open loop: requests leave when they are due; `from_due` counts from that moment"


def _from_due(options: BenchOptions, done: Sequence[RequestTiming]) -> dict[str, float] | None:
    """TTFT and E2EL counted from the moment a request was due: free of coordinated omission."""
    if not options.schedule.open_loop or not done:
        return None
    fields = {}
    for name, seconds in (
        ("ttft", [r.ttft + r.send_delay for r in done]),
        ("e2el", [r.e2el + r.send_delay for r in done]),
    ):
        fields[f"median_{name}_ms"] = 1e3 * float(np.median(seconds))
        fields[f"p99_{name}_ms"] = 1e3 * float(np.percentile(seconds, 99))
    return fields


def _reuse(options: BenchOptions, records: Sequence[RequestTiming]) -> dict[str, Any]:
    """Of workloads that say which tokens are new."""
    workload = options.workload
    bursts = isinstance(workload, TraceSpec) and workload.streams
    if bursts or not isinstance(workload, AgentSpec | TraceSpec):
        return {}
    return {"reuse": reuse_fields(records)}


def _bursts(options: BenchOptions, records: Sequence[RequestTiming]) -> dict[str, Any]:
    """Of streams with bursts of prompts beside them."""
    workload = options.workload
    if not (isinstance(workload, TraceSpec) and workload.streams):
        return {}
    return {"bursts": burst_fields(workload, records)}


def _per_gpu(options: BenchOptions, summary: Summary) -> dict[str, float]:
    """The axes of InferenceX: tokens/s per GPU and tokens/s per user."""
    tpot = summary.overall.latencies["tpot"].median
    fields = {"interactivity": 1e3 / tpot if tpot else 0.0}
    if options.gpus:
        fields["gpus"] = options.gpus
        fields["total_token_throughput_per_gpu"] = (
            summary.overall.total_token_throughput / options.gpus
        )
        fields["output_throughput_per_gpu"] = summary.overall.output_throughput / options.gpus
    return fields


def _hit_rate(observation: Observation, done: Sequence[RequestTiming]) -> float | None:
    """The share of prompt tokens found in prefix caches, by the servers' counters, else by the
    usage of the answers; None where neither says."""
    if (counted := prefix_hits(observation.totals)) is not None:
        return float(counted["hit_rate"])
    known = [record for record in done if record.cached_tokens >= 0]
    tokens = sum(record.input_tokens for record in known)
    return sum(record.cached_tokens for record in known) / tokens if tokens else None


def _server_fields(observation: Observation, summary: Summary) -> dict[str, Any]:
    tokens = summary.total_input_tokens + summary.total_output_tokens
    energy = observation.energy_j
    return {
        "replicas": observation.replicas,
        "counters": observation.totals.counters,
        "speculation": speculation(observation.totals),
        "prefix_cache": prefix_hits(observation.totals),
        "expert_load": expert_load(observation.totals),
        "gpus": observation.gpus,
        "energy_j": energy,
        "joules_per_token": energy / tokens if energy is not None and tokens else None,
        "joules_per_output_token": (
            energy / summary.total_output_tokens
            if energy is not None and summary.total_output_tokens
            else None
        ),
        "notes": observation.notes,
    }


def summary_fields(summary: Summary) -> dict[str, Any]:
    """The figures of a run under their JSON names."""
    overall = summary.overall
    return {
        "duration": overall.duration,
        "completed": overall.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": overall.request_throughput,
        "request_goodput": summary.goodput,
        "output_throughput": overall.output_throughput,
        "total_token_throughput": overall.total_token_throughput,
        "max_concurrent_requests": summary.peak_concurrency,
        **latency_fields(overall.latencies),
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


DETAIL = (
    "input_lens",
    "output_lens",
    "start_times",
    "ttfts",
    "itls",
    "errors",
)


def detail_fields(records: Sequence[RequestTiming]) -> dict[str, list[Any]]:
    """Every request, in the order of the workload; times in seconds, starts from the first."""
    ordered = sorted(records, key=lambda r: (r.index, r.turn))
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
    lines += _reuse_rows(result.get("reuse"))
    lines += _burst_rows(result.get("bursts"))
    lines += _server_rows(result)
    lines += _client_rows(result.get("client"))
    lines.append("=" * _WIDTH)
    return "\n".join(lines)


def _reuse_rows(reuse: Mapping[str, Any] | None) -> list[str]:
    """TTFT by turn, and the tokens computed again."""
    if not reuse:
        return []
    rows = [
        _row(
            f"TTFT p50 / p95 of turn {one['turns']} (ms):",
            _pair(one, "median_ttft_ms", "p95_ttft_ms"),
        )
        for one in reuse["turns"]
    ]
    for name, found in reuse["tokens"].items():
        label = "Recomputed / new tokens" + ("" if name == "all" else f", {name}")
        rows.append(_row(f"{label}:", f"{found['recomputed_over_new']:.3f}"))
    return [f"{'Conversations':-^{_WIDTH}}", *rows] if rows else []


def _burst_rows(bursts: Mapping[str, float] | None) -> list[str]:
    """Gaps of streams, and what the prompts beside them wait."""
    if not bursts:
        return []
    rows = []
    for name, label in (("stream_itl", "ITL of the streams"), ("prompt_ttft", "TTFT beside them")):
        if f"p50_{name}_ms" in bursts:
            figures = [f"{bursts[f'p{part}_{name}_ms']:.2f}" for part in (50, 95, 99)]
            rows.append(_row(f"{label}, p50 / p95 / p99 (ms):", " / ".join(figures)))
    return [f"{'Streams with bursts beside them':-^{_WIDTH}}", *rows] if rows else []


def _server_rows(result: Mapping[str, Any]) -> list[str]:
    """Acceptance, prefix hits, energy and accuracy, each where it is known."""
    server = result.get("server") or {}
    rows: dict[str, float | str | None] = {}
    if (spec := server.get("speculation")) is not None:
        rows["Acceptance rate (%):"] = 100 * spec["acceptance_rate"]
        rows["Acceptance length:"] = spec["acceptance_length"]
        shares = " ".join(f"{100 * share:.1f}" for share in spec["acceptance_by_position"])
        rows["Acceptance by position (%):"] = shares or None
        for method, one in (spec.get("methods") or {}).items():
            shares = " ".join(f"{100 * share:.1f}" for share in one["acceptance_by_position"])
            text = f"{shares} of {one['drafts']:.0f} drafts"
            rows[f"Acceptance, {method} (%):"] = text
    if (load := server.get("expert_load")) is not None:
        rows["Busiest expert over the mean:"] = f"{load['mean']:.2f}, at most {load['largest']:.2f}"
    if (hits := hit_rate(result)) is not None:
        rows["Prefix cache hit rate (%):"] = 100 * hits
    tiers = (server.get("prefix_cache") or {}).get("by_tier") or {}
    if (found := sum(tiers.values())) and found != tiers.get("device"):
        shares = " ".join(f"{tier} {100 * count / found:.1f}" for tier, count in tiers.items())
        rows["Cached tokens by tier (%):"] = shares
    rows["Energy per token (J):"] = server.get("joules_per_token")
    for task, found in (result.get("accuracy") or {}).items():
        rows[f"Accuracy, {task}:"] = found["text"]
    kept = [_row(label, value) for label, value in rows.items() if value is not None]
    return [f"{'Server':-^{_WIDTH}}", *kept] if kept else []


def _client_rows(client: Mapping[str, Any] | None) -> list[str]:
    """What the load generator cost, and the error from that."""
    if client is None:
        return []
    ttft, itl = client["error_ms"]["ttft"], client["error_ms"]["itl"]
    processes = client["processes"]
    share = f"{100 * client['cpu_share']:.0f}" + (f" x {processes}" if processes > 1 else "")
    return [
        f"{'Client':-^{_WIDTH}}",
        _row("Busiest process, CPU (% of a core):", share),
        _row("CPU a chunk (us):", client["us_per_chunk"]),
        _row(
            "Send delay median / p99 (ms):",
            _pair(client, "median_send_delay_ms", "p99_send_delay_ms"),
        ),
        _row("Error of TTFT, p50 / p99 (ms):", _pair(ttft, "p50", "p99")),
        _row("Error of ITL, p50 / p99 (ms):", _pair(itl, "p50", "p99")),
    ]


def _pair(values: Mapping[str, float], first: str, second: str) -> str:
    return f"{values[first]:.2f} / {values[second]:.2f}"


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


def _row(label: str, value: float | str) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40}{text:>{_WIDTH - 40}}"


def error_lines(records: Iterable[RequestTiming], most: int = 5) -> list[str]:
    """One line for each kind of failure, the most frequent first."""
    kinds = Counter(r.error for r in records if r.error is not None)
    lines = [f"{count} failed: {text}" for text, count in kinds.most_common(most)]
    if len(kinds) > most:
        lines.append(f"and {len(kinds) - most} other kinds of failure")
    return lines


_BENCHY = ("model", "test", "t/s", "peak t/s", "ttfr (ms)", "est_ppt (ms)", "e2e_ttft (ms)")


def benchy_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Runs in llama-benchy's columns (Markdown): a row for the prompt, one for the answer.

    pp is prompt tokens a second of one request (its prompt divided by its TTFT), tg the output
    tokens a second of all requests; peak is tg while concurrency was full. ttfr and e2e_ttft are
    both the mean TTFT: a client sees nothing before the first token.
    """
    rows = [_BENCHY, *(row for result in results for row in _benchy_rows(result))]
    return "\n".join(aligned(rows))


def _benchy_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    users = result["max_concurrency"]
    suffix = f" (c{users})" if users and users > 1 else ""
    context = result.get("random_context_len") or 0
    depth = f" @ d{context}" if context else ""
    prompt, output = round(result["mean_input_len"]) - context, round(result["mean_output_len"])
    ttft = result["mean_ttft_ms"]
    served = result["total_input_tokens"] / max(1, result["completed"])
    speed = 1e3 * served / ttft if ttft else 0.0
    steady = result["steady_state"] or result
    model, late = str(result["model_id"]), f"{ttft:.2f}"
    return [
        (model, f"pp{prompt}{depth}{suffix}", f"{speed:.2f}", "", late, late, late),
        (
            *(model, f"tg{output}{depth}{suffix}", f"{result['output_throughput']:.2f}"),
            *(f"{steady['output_throughput']:.2f}", "", "", ""),
        ),
    ]
