"""Figures of Prometheus pages: engines (Millrace, vLLM), gateways, exporters (DCGM, AMD, nodes).

A page is recognised by what stands on it. Of an engine that has Millrace's names, vLLM's are left
out, as they say the same; a gateway's page may have engines of both kinds. Of histograms with many
buckets only those of latencies keep them. AMD's exporter may begin its names with `amd_`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from prometheus_client.parser import text_string_to_metric_families

from millrace.observe.samples.sample import Row, labels_text

KINDS = {
    "engine": ("millrace:", "vllm:"),
    "gateway": ("millrace_gateway_",),
    "dcgm": ("DCGM_FI_",),
    "amd": ("amd_", "gpu_"),
    "node": ("node_",),
}
# Of a node's exporter: what the host's own figures are, too.
_NODE = re.compile(
    r"node_(cpu_seconds_total|memory_Mem(Total|Available)_bytes|load1|network_(receive|transmit)_bytes_total"
    r"|pressure_.*|infiniband_port_data_.*)"
)
_PROCESS = ("process_cpu_seconds_total", "process_resident_memory_bytes",
            "process_start_time_seconds", "process_open_fds")  # fmt: skip
_BUCKETS = re.compile(
    r"(millrace|vllm):(time_to_first_token|inter_token_latency|e2e_request_latency"
    r"|request_queue_time)_seconds_bucket|millrace_gateway_first_byte_seconds_bucket"
)
_CREATED = "_created"
_SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(\{.*\})? +([^\s{}]+)(?: +-?\d+)?\s*")
_REPLICA = re.compile(r'replica="[^"]*"')
_OURS = re.compile(r"^millrace:num_requests_running\b.*", re.MULTILINE)


def kind_of(text: str) -> str:
    """What a page is of; empty for an unknown one. A gateway's may have engines' figures too."""
    for kind in ("gateway", "engine", "dcgm", "node", "amd"):
        if any(re.search(f"^{re.escape(prefix)}", text, re.MULTILINE) for prefix in KINDS[kind]):
            return kind
    return ""


def read(t: float, source: str, text: str) -> Iterator[Row]:
    """The figures of a page that are kept. Raises ValueError for a page that cannot be parsed."""
    ours = {_replica(line) for line in _OURS.findall(text)}
    for line in text.splitlines():
        if _kept(line, ours):
            found = _SAMPLE.fullmatch(line)
            if found is None:
                raise ValueError(f"{line[:80]!r} is no sample")
            name, labels, value = found.groups()
            if value != "NaN":  # it says nothing, and a sum with it neither
                name = name.removeprefix("amd_") if name.startswith("amd_gpu_") else name
                yield Row(t, source, name, _labels(labels) if labels else "", float(value))


@functools.lru_cache(maxsize=100_000)  # the same in every second
def _labels(text: str) -> str:
    (family,) = text_string_to_metric_families(f"x{text} 0\n")
    return labels_text(family.samples[0].labels)


def _kept(line: str, ours: AbstractSet[str]) -> bool:
    """ours: replicas that have Millrace's names."""
    if line.startswith("#") or not line.strip():
        return False
    name = re.split(r"[{ ]", line, maxsplit=1)[0]
    if name.endswith(_CREATED):
        return False
    if name.startswith("vllm:") and _replica(line) in ours:
        return False
    if name.endswith("_bucket"):
        return _BUCKETS.fullmatch(name) is not None
    if name.startswith("node_"):
        return _NODE.fullmatch(name) is not None
    if name.startswith("process_"):
        return name in _PROCESS
    return any(name.startswith(prefix) for kind in KINDS.values() for prefix in kind)


def _replica(line: str) -> str:
    """The label of a sample's replica on a gateway's page; empty for an engine's own page."""
    found = _REPLICA.search(line)
    return found.group() if found else ""
