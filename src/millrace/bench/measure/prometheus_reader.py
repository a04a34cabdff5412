"""Parsing /metrics pages: a replica's counters and gauges, under vLLM's names or Millrace's. Pure.

Counters are summed over the labels of a page. A figure that a page has under two names (as
Millrace's do) is counted once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

# A figure's name behind the prefix; prefixes in order of preference.
COUNTERS = (
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
)
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
# By the method that drafted, and some by position: name -> what it is called of a method here.
BY_METHOD = {
    "spec_decode_num_drafts_by_method": "drafts",
    "spec_decode_num_draft_tokens_by_method": "draft_tokens",
    "spec_decode_num_accepted_tokens_by_method": "accepted",
}
CACHED_BY_TIER = (
    "prompt_tokens_cached_by_source"  # by where they were found: device, host, disk, p2p
)
EXPERT_TOKENS = "millrace:expert_tokens"  # by layer and expert
PER_POSITION = "spec_decode_num_accepted_tokens_per_pos"
_PREFIXES = ("vllm:", "millrace:", "millrace_")
DCGM = {
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": "tensor_active",
    "DCGM_FI_PROF_DRAM_ACTIVE": "dram_active",
    "DCGM_FI_PROF_NVLINK_TX_BYTES": "nvlink_tx_bytes",
    "DCGM_FI_PROF_NVLINK_RX_BYTES": "nvlink_rx_bytes",
    "DCGM_FI_DEV_POWER_USAGE": "power_w",
    "DCGM_FI_DEV_GPU_UTIL": "utilization",
}


class MetricsPage(msgspec.Struct, frozen=True):
    """The figures of one page: counters (totals), gauges, and accepted drafts by position.

    methods: (method, figure, position, or -1) -> total, figures as in BY_METHOD. experts: (layer,
    expert) -> tokens. tiers: cached prompt tokens by the tier that they came from.
    """

    counters: dict[str, float] = {}
    gauges: dict[str, float] = {}
    accepted: dict[int, float] = {}
    methods: dict[tuple[str, str, int], float] = {}
    experts: dict[tuple[str, str], float] = {}
    tiers: dict[str, float] = {}


class Totals(msgspec.Struct, frozen=True):
    """What all replicas did between two readings. accepted: drafts by position. methods, experts,
    tiers: as of a page."""

    counters: dict[str, float] = {}
    accepted: list[float] = []
    methods: dict[tuple[str, str, int], float] = {}
    experts: dict[tuple[str, str], float] = {}
    tiers: dict[str, float] = {}


def read_page(text: str) -> MetricsPage:
    """The figures of a page. Figures that it lacks are left out; what cannot be parsed has none."""
    found: dict[str, float] = {}
    accepted: dict[str, dict[int, float]] = {}
    methods: dict[tuple[str, str, int], float] = {}
    experts: dict[tuple[str, str], float] = {}
    tiers: dict[str, dict[str, float]] = {}
    for name, labels, value in _samples(text, _PREFIXES):
        name = name.removesuffix("_total")
        found[name] = found.get(name, 0.0) + value
        if name.endswith(PER_POSITION) and labels.get("position", "").isdigit():
            by_position = accepted.setdefault(name, {})
            position = int(labels["position"])
            by_position[position] = by_position.get(position, 0.0) + value
        if name.endswith(CACHED_BY_TIER) and "source" in labels:
            by_tier = tiers.setdefault(name, {})
            by_tier[labels["source"]] = by_tier.get(labels["source"], 0.0) + value
        if name == EXPERT_TOKENS:
            experts[labels.get("layer", ""), labels.get("expert", "")] = value
        if figure := BY_METHOD.get(name.removeprefix("millrace:")):
            position = int(labels["position"]) if "position" in labels else -1
            key = labels.get("method", ""), figure, position
            methods[key] = methods.get(key, 0.0) + value
    return MetricsPage(
        counters=_named(found, COUNTERS),
        gauges=_named(found, GAUGES),
        accepted=next(
            (accepted[p + PER_POSITION] for p in _PREFIXES if p + PER_POSITION in accepted), {}
        ),
        methods=methods,
        experts=experts,
        tiers=next(
            (tiers[p + CACHED_BY_TIER] for p in _PREFIXES if p + CACHED_BY_TIER in tiers), {}
        ),
    )


def _named(found: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    named = {}
    for name in names:
        first = next((p + name for p in _PREFIXES if p + name in found), None)
        if first is not None:
            named[name] = found[first]
    return named


def _samples(text: str, prefixes: tuple[str, ...]) -> Iterable[tuple[str, dict[str, str], float]]:
    """Samples whose names have one of these prefixes; the other lines are not parsed."""
    kept = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(prefixes))
    try:
        for family in text_string_to_metric_families(kept):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value
    except ValueError:
        return


def difference(before: Sequence[MetricsPage], after: Sequence[MetricsPage]) -> Totals:
    """What happened between two readings of the same replicas. A counter that fell (the replica
    was restarted) counts from zero."""
    counters: dict[str, float] = {}
    accepted: dict[int, float] = {}
    methods: dict[tuple[str, str, int], float] = {}
    experts: dict[tuple[str, str], float] = {}
    tiers: dict[str, float] = {}
    for first, last in zip(before, after, strict=True):
        for name, value in last.counters.items():
            counters[name] = counters.get(name, 0.0) + _increase(
                first.counters.get(name, 0.0), value
            )
        for position, value in last.accepted.items():
            increase = _increase(first.accepted.get(position, 0.0), value)
            accepted[position] = accepted.get(position, 0.0) + increase
        for key, value in last.methods.items():
            increase = _increase(first.methods.get(key, 0.0), value)
            methods[key] = methods.get(key, 0.0) + increase
        for expert, value in last.experts.items():
            increase = _increase(first.experts.get(expert, 0.0), value)
            experts[expert] = experts.get(expert, 0.0) + increase
        for tier, value in last.tiers.items():
            increase = _increase(first.tiers.get(tier, 0.0), value)
            tiers[tier] = tiers.get(tier, 0.0) + increase
    most = max(accepted, default=-1)
    by_position = [accepted.get(position, 0.0) for position in range(most + 1)]
    return Totals(counters, by_position, methods, experts, tiers)


def _increase(before: float, after: float) -> float:
    return after - before if after >= before else after


def speculation(totals: Totals) -> dict[str, Any] | None:
    """Acceptance: its length (1 + accepted / drafts), its rate over draft tokens, by position, and
    the same by method where the server says so. None where there was no draft."""
    drafts = totals.counters.get("spec_decode_num_drafts", 0.0)
    if drafts <= 0:
        return None
    tokens = totals.counters.get("spec_decode_num_draft_tokens", 0.0)
    accepted = totals.counters.get("spec_decode_num_accepted_tokens", sum(totals.accepted))
    return {
        "drafts": drafts,
        "draft_tokens": tokens,
        "accepted_tokens": accepted,
        "acceptance_rate": accepted / tokens if tokens else 0.0,
        "acceptance_length": 1 + accepted / drafts,
        "acceptance_by_position": [count / drafts for count in totals.accepted],
        **({"methods": methods} if (methods := _by_method(totals)) else {}),
    }


def _by_method(totals: Totals) -> dict[str, Any]:
    """Rows, tokens and acceptance of each method that made drafts."""
    found: dict[str, Any] = {}
    for method in dict.fromkeys(method for method, _, _ in totals.methods):
        drafts, tokens = (
            totals.methods.get((method, name, -1), 0.0) for name in ("drafts", "draft_tokens")
        )
        if not drafts:
            continue
        by_position = sorted(
            (position, count)
            for (name, figure, position), count in totals.methods.items()
            if name == method and figure == "accepted"
        )
        accepted = sum(count for _, count in by_position)
        found[method] = {
            "drafts": drafts,
            "draft_tokens": tokens,
            "acceptance_rate": accepted / tokens if tokens else 0.0,
            "acceptance_length": 1 + accepted / drafts,
            "acceptance_by_position": [count / drafts for _, count in by_position],
        }
    return found


def expert_load(totals: Totals) -> dict[str, Any] | None:
    """By layer the tokens of each expert, and by how much the busiest is above the mean; over all
    layers the mean and the largest of that. None where no server counts them."""
    layers: dict[str, dict[str, float]] = {}
    for (layer, expert), count in totals.experts.items():
        layers.setdefault(layer, {})[expert] = count
    ratios = {
        layer: max(load.values()) * len(load) / total
        for layer, load in layers.items()
        if (total := sum(load.values())) > 0
    }
    if not ratios:
        return None
    found = {
        layer: {"imbalance": ratio, "tokens": layers[layer]} for layer, ratio in ratios.items()
    }
    mean = sum(ratios.values()) / len(ratios)
    return {"mean": mean, "largest": max(ratios.values()), "layers": found}


def prefix_hits(totals: Totals) -> dict[str, Any] | None:
    """Prompt tokens looked up and found in prefix caches, and by tier where servers say so; None
    where none were looked up."""
    queries = totals.counters.get("prefix_cache_queries", 0.0)
    if queries <= 0:
        return None
    hits = totals.counters.get("prefix_cache_hits", 0.0)
    by_tier = {"by_tier": totals.tiers} if totals.tiers else {}
    return {"queries": queries, "hits": hits, "hit_rate": hits / queries, **by_tier}


def read_dcgm(text: str) -> dict[str, float]:
    """A DCGM exporter's page: power and NVLink bytes summed over GPUs, the others their mean."""
    values: dict[str, list[float]] = {}
    for name, _, value in _samples(text, tuple(DCGM)):
        if name in DCGM:
            values.setdefault(DCGM[name], []).append(value)
    summed = ("power_w", "nvlink_tx_bytes", "nvlink_rx_bytes")
    return {
        name: sum(seen) if name in summed else sum(seen) / len(seen)
        for name, seen in values.items()
    }
