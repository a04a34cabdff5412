"""Grafana dashboards by audience, made from short descriptions of their panels.

service: for who uses a service: is it there, how fast does it answer. operations: for who keeps it
running: engines, queues, memory, errors, replicas. performance: for who makes it faster: MFU and
MBU, work by kind, drafts, caches. energy: for who pays: power, joules, tokens by GPU.

Each query works on replicas that are scraped one by one and on a gateway's page of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT, COLUMNS = 8, 8, 3
# What a query selects by the dashboard's variables.
WHERE = 'job=~"$job", model_name=~"$model_name"'
BY = "instance, replica"
LEGEND = "{{replica}} {{instance}}"


@dataclass(frozen=True)
class Panel:
    """One panel. queries: PromQL -> legend. unit: Grafana's name of it."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    about: str = ""
    kind: str = "timeseries"


@dataclass(frozen=True)
class Dashboard:
    """name: of the file. title: in Grafana."""

    name: str
    title: str
    about: str
    panels: Sequence[Panel] = field(default_factory=list)


def _quantiles(metric: str, by: str = "") -> dict[str, str]:
    """The quantiles of a histogram, over all replicas."""
    groups = f"le, {by}" if by else "le"
    rate = f"sum by ({groups}) (rate({metric}_bucket{{{WHERE}}}[$__rate_interval]))"
    return {f"histogram_quantile({q}, {rate})": f"p{100 * q:g}" for q in (0.5, 0.95, 0.99)}


def _rate(metric: str, by: str = BY, where: str = WHERE) -> str:
    return f"sum by ({by}) (rate({metric}{{{where}}}[$__rate_interval]))"


def _gauge(metric: str, by: str = BY) -> str:
    return f"sum by ({by}) ({metric}{{{WHERE}}})"


def _share(above: str, below: str, by: str = BY) -> str:
    return f"{_rate(above, by)} / ({_rate(below, by)} > 0)"


_FAILED = (
    f'(sum(rate(vllm:request_success_total{{{WHERE}, finished_reason="error"}}[$__rate_interval]))'
    f" / (sum(rate(vllm:request_success_total{{{WHERE}}}[$__rate_interval])) > 0))"
)

SERVICE = Dashboard(
    "service",
    "Millrace: service",
    "Is each model there, how fast does it answer, and does it fail.",
    [
        Panel("Engines that run", {f"sum(millrace:engine_up{{{WHERE}}})": "engines"}, kind="stat"),
        Panel("Requests / s", {f"sum({_rate('vllm:request_success_total')})": "all"}, "reqps"),
        Panel("Failed requests", {_FAILED: "share"}, "percentunit"),
        Panel("Time to first token", _quantiles("vllm:time_to_first_token_seconds"), "s"),
        Panel("Between two tokens", _quantiles("vllm:inter_token_latency_seconds"), "s"),
        Panel("Whole request", _quantiles("vllm:e2e_request_latency_seconds"), "s"),
        Panel(
            "Tokens / s",
            {
                f"sum({_rate('vllm:generation_tokens_total')})": "output",
                f"sum({_rate('vllm:prompt_tokens_total')})": "prompt",
            },
        ),
        Panel("In the queue", _quantiles("vllm:request_queue_time_seconds"), "s"),
        Panel(
            "Output tokens / s of a stream",
            {
                f"sum({_rate('vllm:generation_tokens_total')}) / "
                f"(sum({_gauge('vllm:num_requests_running')}) > 0)": "mean"
            },
        ),
    ],
)

OPERATIONS = Dashboard(
    "operations",
    "Millrace: operations",
    "Engines, queues, memory, errors and the balance between replicas.",
    [
        Panel("Engine up", {f"max by ({BY}) (millrace:engine_up{{{WHERE}}})": LEGEND}),
        Panel("Running requests", {_gauge("vllm:num_requests_running"): LEGEND}),
        Panel("Waiting requests", {_gauge("vllm:num_requests_waiting"): LEGEND}),
        Panel(
            "KV cache in use",
            {f"max by ({BY}) (vllm:kv_cache_usage_perc{{{WHERE}}})": LEGEND},
            "percentunit",
        ),
        Panel(
            "Steps / s",
            {_rate("vllm:iteration_tokens_total_count"): LEGEND},
            about="A running engine whose line is at 0 is stuck.",
        ),
        Panel("Preemptions / s", {_rate("vllm:num_preemptions_total"): LEGEND}),
        Panel(
            "Ends of requests / s",
            {_rate("vllm:request_success_total", "finished_reason"): "{{finished_reason}}"},
            "reqps",
        ),
        Panel(
            "HTTP answers / s",
            {_rate("http_requests_total", "status", 'job=~"$job"'): "{{status}}"},
            "reqps",
        ),
        Panel("Engine restarts", {_gauge("millrace:engine_restarts_total"): LEGEND}),
        Panel("Refused requests / s", {_rate("millrace:requests_rejected_total"): LEGEND}, "reqps"),
        Panel(
            "Resident memory of servers",
            {'process_resident_memory_bytes{job=~"$job"}': "{{instance}}"},
            "bytes",
        ),
        Panel("NaN rows", {f"sum(increase(vllm:corrupted_requests_total{{{WHERE}}}[1h]))": "1 h"}),
    ],
)

PERFORMANCE = Dashboard(
    "performance",
    "Millrace: performance",
    "How much of the device the steps use, what they compute, and what drafts and caches bring.",
    [
        Panel(
            "MFU (dense peak)",
            {_rate("millrace:estimated_peak_compute_seconds_total"): LEGEND},
            "percentunit",
        ),
        Panel(
            "MBU",
            {_rate("millrace:estimated_peak_memory_seconds_total"): LEGEND},
            "percentunit",
        ),
        Panel(
            "Time in which a step runs",
            {_rate("millrace:step_seconds_total"): LEGEND},
            "percentunit",
        ),
        Panel(
            "FLOP/s by kind", {_rate("millrace:estimated_flops_total", "kind"): "{{kind}}"}, "flops"
        ),
        Panel(
            "Bytes read / s by kind",
            {_rate("millrace:estimated_read_bytes_total", "kind"): "{{kind}}"},
            "Bps",
        ),
        Panel(
            "Tokens of a step",
            {
                f"{_rate('vllm:iteration_tokens_total_sum')} / "
                f"({_rate('vllm:iteration_tokens_total_count')} > 0)": LEGEND
            },
        ),
        Panel(
            "Acceptance of drafts",
            {
                _share(
                    "vllm:spec_decode_num_accepted_tokens_total",
                    "vllm:spec_decode_num_draft_tokens_total",
                ): LEGEND
            },
            "percentunit",
        ),
        Panel(
            "Accepted by position / s",
            {
                _rate(
                    "vllm:spec_decode_num_accepted_tokens_per_pos_total", "position"
                ): "{{position}}"
            },
        ),
        Panel(
            "Prefix cache hits",
            {_share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"): LEGEND},
            "percentunit",
        ),
        Panel("Prefill of a request", _quantiles("vllm:request_prefill_time_seconds"), "s"),
        Panel("Decode of a request", _quantiles("vllm:request_decode_time_seconds"), "s"),
        Panel("Snapshots", {_gauge("millrace:snapshots_used"): LEGEND}),
    ],
)

ENERGY = Dashboard(
    "energy",
    "Millrace: energy and cost",
    "Power of the GPUs, and what tokens and requests take of it.",
    [
        Panel("Power", {_gauge("millrace:gpu_power_watts"): LEGEND}, "watt"),
        Panel(
            "Power over its limit",
            {
                f"{_gauge('millrace:gpu_power_watts')} / "
                f"{_gauge('millrace:gpu_power_limit_watts')}": LEGEND
            },
            "percentunit",
            "High beside low MFU and MBU: the figures contradict each other.",
        ),
        Panel(
            "Joules / output token",
            {
                _share(
                    "millrace:gpu_energy_joules_total", "millrace:generation_tokens_total"
                ): LEGEND
            },
            "joule",
        ),
        Panel(
            "Joules / request",
            {
                _share(
                    "millrace:gpu_energy_joules_total", "millrace:requests_finished_total"
                ): LEGEND
            },
            "joule",
        ),
        Panel(
            "Output tokens / s",
            {_rate("vllm:generation_tokens_total", "model_name"): "{{model_name}}"},
        ),
        Panel(
            "GPU memory in use", {_gauge("millrace:gpu_memory_used_bytes"): LEGEND}, "bytes"
        ),
    ],
)  # fmt: skip

DASHBOARDS = (SERVICE, OPERATIONS, PERFORMANCE, ENERGY)


def document(dashboard: Dashboard) -> dict[str, Any]:
    """As Grafana imports it."""
    return {
        "uid": f"millrace-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["millrace"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": [_panel(at, panel) for at, panel in enumerate(dashboard.panels)],
    }


def _variables() -> list[dict[str, Any]]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    found: list[dict[str, Any]] = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    ]
    for name, query in (
        ("job", "label_values(vllm:num_requests_running, job)"),
        ("model_name", 'label_values(vllm:num_requests_running{job=~"$job"}, model_name)'),
    ):
        found.append(
            {
                "name": name, "type": "query", "datasource": source, "query": query,
                "definition": query, "refresh": 2, "multi": True, "includeAll": True,
                "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            }
        )  # fmt: skip
    return found


def _panel(at: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(at, COLUMNS)
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": at + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": source,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + n), "expr": expr, "legendFormat": legend, "datasource": source}
            for n, (expr, legend) in enumerate(panel.queries.items())
        ],
    }  # fmt: skip
