"""The figures of a report, worked out from its steps alone: pure functions.

So a reader can work them out again, which `verify` does.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from millrace.bench.report.compare import HIGHER, paired_interval
from millrace.report.sections.load import PREFIXES
from millrace.report.sections.logprobs import compared
from millrace.report.sections.versus import OURS
from millrace.report.steps.document import StepRecord

RUN_FIGURES = (
    *("total_token_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms"),
    *("median_tpot_ms", "median_itl_ms", "p99_itl_ms"),
)
VERSUS_FIGURES = (
    *("output_throughput", "total_token_throughput"),
    *("median_ttft_ms", "median_tpot_ms", "p99_itl_ms"),
)
_DEPTHS = (1, 2, 3, 4, 5)
NO_COUNTER = "no energy counter: power is read from NVIDIA's driver, and none answered here"

Steps = Sequence[StepRecord]


def summary_of(records: Iterable[StepRecord]) -> dict[str, Any]:
    """Every section's figures; a section without a step that is done is left out."""
    by_section: dict[str, list[StepRecord]] = defaultdict(list)
    every = [record for record in records if record.status == "done"]
    for record in every:
        by_section[record.section].append(record)
    parts: Mapping[str, Callable[[Steps], Any]] = {
        "environment": _environment,
        "client": _selftest,
        "accuracy": _accuracy,
        "batches": _runs,
        "prefix": _prefix,
        "logprobs": _logprobs,
        "acceptance": _acceptance,
        "throughput": _runs,
        "long": _runs,
        "startup": _startup,
        "versus": _versus,
    }
    found = {name: part(by_section[name]) for name, part in parts.items() if by_section[name]}
    runs = dict(bench_runs(every))
    if runs:
        found["energy"] = _energy(runs)
        found["client_error"] = _client_error(runs)
    return {name: value for name, value in found.items() if value}


def bench_runs(records: Iterable[StepRecord]) -> Iterable[tuple[str, dict[str, Any]]]:
    """(name, fields) of every run of the load generator."""
    for record in records:
        result = record.result
        if record.status != "done" or not isinstance(result, dict):
            continue
        if record.section == "versus":
            yield from ((f"{record.name}/{load}", fields) for load, fields in result.items())
        elif "total_token_throughput" in result:
            yield record.name, result


# --- sections ------------------------------------------------------------------------------------


def _environment(records: Steps) -> Any:
    (record,) = records
    findings = record.result["findings"]
    warned = [f for f in findings if f["verdict"] != "ok"]
    named = {f["name"]: f["value"] for f in findings if f["topic"] == "devices"}
    return {"ok": record.result["ok"], "devices": named, "warnings": warned}


def _selftest(records: Steps) -> Any:
    (record,) = records
    return [
        {
            "streams": level["streams"],
            "within": level["within"],
            "errors": level["errors"],
            "throughput_error": level["throughput_error"],
        }
        for level in record.result
    ]


def _accuracy(records: Steps) -> Any:
    found: dict[str, Any] = {}
    for record in records:
        name = record.name.split("/", 1)[1]
        if "summary" in record.result:
            found[name] = record.result["summary"]["items"]
        else:
            found[name] = record.result.get("results")
    return found


def _runs(records: Steps) -> Any:
    """Repeats of each load together: the median, and the least and the most."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record.name.split("/")[1]].append(record.result)
    return {name: _of_runs(runs) for name, runs in groups.items()}


def _of_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"runs": len(runs), "failed": sum(run["failed"] for run in runs)}
    for figure in RUN_FIGURES:
        values = [float(run[figure]) for run in runs]
        found[figure] = _spread(values)
    lengths = [spec["acceptance_length"] for run in runs if (spec := _speculation(run))]
    if lengths:
        found["acceptance_length"] = _spread(lengths)
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _speculation(run: Mapping[str, Any]) -> dict[str, Any] | None:
    return (run.get("server") or {}).get("speculation")


def _prefix(records: Steps) -> Any:
    """TTFT of the prompts that began a prefix, and of those that found it. The second prompt of a
    prefix is neither: a cache of snapshots learns from it where two prompts part."""
    (record,) = records
    ttfts = record.result["ttfts"]
    return {
        "cold_ttft_ms": 1e3 * statistics.median(ttfts[:PREFIXES]),
        "cached_ttft_ms": 1e3 * statistics.median(ttfts[2 * PREFIXES :]),
        "hit_rate": record.result["prefix_cache_hit_rate"],
        "input_tokens": statistics.median(record.result["input_lens"]),
    }


def _logprobs(records: Steps) -> Any:
    by_name = {record.name: record.result for record in records}
    if len(by_name) < 2:
        return None
    return compared(by_name["logprobs/engine"], by_name["logprobs/transformers"])


def _acceptance(records: Steps) -> Any:
    """By kind of text and temperature: shares by position, and the length at each depth."""
    found: dict[str, Any] = {}
    for record in records:
        spec = _speculation(record.result)
        if spec is None:
            continue
        shares = spec["acceptance_by_position"]
        _, kind, temperature = record.name.split("/")
        found.setdefault(kind, {})[temperature] = {
            "drafts": (record.result["server"]["counters"] or {}).get("spec_decode_num_drafts"),
            "by_position": shares,
            "length_at_depth": {
                str(depth): 1.0 + sum(shares[:depth]) for depth in _DEPTHS if depth <= len(shares)
            },
        }
    return found


def _startup(records: Steps) -> Any:
    cold = [record.result for record in records if record.name == "startup/cold"]
    warm = [record.result for record in records if record.name != "startup/cold"]
    found = {}
    for name, starts in (("cold", cold), ("warm", warm)):
        if starts:
            found[name] = {
                figure: _spread([start[figure] for start in starts])
                for figure in ("healthy_seconds", "first_answer_seconds")
            }
    return found


# --- of all runs ---------------------------------------------------------------------------------


def _energy(runs: Mapping[str, Mapping[str, Any]]) -> Any:
    found: dict[str, Any] = {}
    for name, run in runs.items():
        server = run.get("server") or {}
        if server.get("energy_j") is not None:
            found[name] = {
                "joules_per_token": server["joules_per_token"],
                "joules_per_output_token": server["joules_per_output_token"],
            }
    return found if found else {"absent": NO_COUNTER}


def _client_error(runs: Mapping[str, Mapping[str, Any]]) -> Any:
    """The largest errors that the load generator itself adds, over all runs."""
    clients = {name: run["client"] for name, run in runs.items() if run.get("client")}
    if not clients:
        return None
    return {
        "runs": len(clients),
        "client_bound": sorted(name for name, one in clients.items() if one["client_bound"]),
        "worst": {
            figure: {
                part: max(one["error_ms"][figure][part] for one in clients.values())
                for part in ("p50", "p99")
            }
            for figure in ("ttft", "itl")
        },
    }


# --- versus --------------------------------------------------------------------------------------


def _versus(records: Steps) -> Any:
    """Of each peer and load: our figure over the peer's, paired by rounds, with its interval."""
    rounds: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for record in records:
        _, server, number = record.name.split("/")
        rounds[server][int(number)] = record.result
    ours = rounds.get(OURS, {})
    found: dict[str, Any] = {"medians": {name: _medians(one) for name, one in rounds.items()}}
    found["ratios"] = {
        name: _ratios(ours, theirs) for name, theirs in rounds.items() if name != OURS
    }
    return found


def _medians(rounds: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    loads = {load for result in rounds.values() for load in result}
    return {
        load: {
            figure: statistics.median(float(result[load][figure]) for result in rounds.values())
            for figure in VERSUS_FIGURES
        }
        for load in sorted(loads)
    }


def _ratios(
    ours: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return {}
    return {
        load: {
            figure: _ratio(figure, [(ours[n][load], theirs[n][load]) for n in shared])
            for figure in VERSUS_FIGURES
        }
        for load in ours[shared[0]]
    }


def _ratio(figure: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Any:
    """Ours over theirs. The interval is wider by the load generator's own error."""
    values = [(float(a[figure]), float(b[figure])) for a, b in pairs]
    if any(a <= 0 or b <= 0 for a, b in values):
        return None
    error = max(_late(run) for pair in pairs for run in pair)
    ratio, low, high = paired_interval([math.log(a / b) for a, b in values], error)
    return {
        "ratio": ratio,
        "low": low,
        "high": high,
        "rounds": len(values),
        "higher_is_better": figure in HIGHER,
    }


def _late(run: Mapping[str, Any]) -> float:
    """The share of a request's time by which the client was late to send the next one."""
    mean = float(run.get("mean_e2el_ms") or 0.0)
    lag = float(run["client"]["lag_ms"]["p50"]) if run.get("client") else 0.0
    return min(1.0, lag / mean) if mean > 0 else 0.0
