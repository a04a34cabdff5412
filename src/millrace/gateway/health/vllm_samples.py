"""Samples of a replica that is another server, from the page that it has for Prometheus.

Only names of vLLM are read; a figure that a server does not have stays 0.
"""

from __future__ import annotations

import re
import time

from millrace.dashboard.sample import BOUNDS, Buckets, Sample

_LINE = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|prompt_tokens_total"
    rb"|generation_tokens_total|prefix_cache_queries_total|prefix_cache_hits_total"
    rb"|spec_decode_num_drafts_total|spec_decode_num_draft_tokens_total"
    rb"|spec_decode_num_accepted_tokens_per_pos_total|request_success_total"
    rb"|time_to_first_token_seconds_bucket|inter_token_latency_seconds_bucket"
    rb"|request_time_per_output_token_seconds_bucket)(?:\{([^}]*)\})? ([0-9.eE+-]+)",
    re.M,
)
_LABEL = re.compile(rb'\b(le|position)="([^"]*)"')
_PERMILLE = 1000  # usage of the KV cache comes as a share: so many pages stand for all
_BUCKETS = {
    "ttft": "time_to_first_token_seconds_bucket",
    "itl": "inter_token_latency_seconds_bucket",
    "tpot": "request_time_per_output_token_seconds_bucket",
}


class VllmSamples:
    """What each page of one replica brought since the page before."""

    def __init__(self) -> None:
        self._before: dict[str, float] | None = None

    def read(self, page: bytes) -> list[Sample]:
        """The sample since the last page; none from the first one, and after a restart."""
        totals = _totals(page)
        before, self._before = self._before, totals
        name = "generation_tokens_total"
        if before is None or totals.get(name, 0.0) < before.get(name, 0.0):
            return []

        def new(name: str) -> int:
            return max(0, int(totals.get(name, 0.0) - before.get(name, 0.0)))

        position = "spec_decode_num_accepted_tokens_per_pos_total"
        positions = sum(key.startswith(f"{position} ") for key in totals)
        return [
            Sample(
                at=int(time.time()),
                tokens_in=new("prompt_tokens_total"),
                tokens_out=new(name),
                running=int(totals.get("num_requests_running", 0)),
                waiting=int(totals.get("num_requests_waiting", 0)),
                pages=(round(_PERMILLE * totals.get("kv_cache_usage_perc", 0)), _PERMILLE),
                queries=new("prefix_cache_queries_total"),
                hits=new("prefix_cache_hits_total"),
                drafts=new("spec_decode_num_drafts_total"),
                draft_tokens=new("spec_decode_num_draft_tokens_total"),
                accepted=[new(f"{position} {at}") for at in range(positions)],
                ended=new("request_success_total"),
                ttft=_buckets("ttft", before, totals),
                itl=_buckets("itl", before, totals),
                tpot=_buckets("tpot", before, totals),
            )
        ]


def _totals(page: bytes) -> dict[str, float]:
    """Name, with the bound of a bucket or the position of a draft -> value over all labels."""
    totals: dict[str, float] = {}
    for name, labels, value in _LINE.findall(page):
        label = _LABEL.search(labels)
        key = name.decode() if label is None else f"{name.decode()} {label[2].decode()}"
        totals[key] = totals.get(key, 0.0) + float(value)
    return totals


def _buckets(kind: str, before: dict[str, float], totals: dict[str, float]) -> Buckets:
    """Values by bucket of BOUNDS[kind]; a bound that we do not have goes to the next one."""
    bounds, found, below = BOUNDS[kind], dict[int, int](), 0.0
    rows = [
        (float(key.rpartition(" ")[2]), value - before.get(key, 0.0))
        for key, value in totals.items()
        if key.startswith(f"{_BUCKETS[kind]} ")
    ]
    for bound, fresh in sorted(rows):
        at = next((i for i, ours in enumerate(bounds) if ours >= bound), len(bounds))
        if fresh > below:
            found[at] = found.get(at, 0) + int(fresh - below)
        below = fresh
    return sorted(found.items())
