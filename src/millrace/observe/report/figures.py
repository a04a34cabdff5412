"""What a phase showed: rates, latencies, shares of the device, and where gauges lay meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from millrace.hardware.gpus import Gpu
from millrace.observe.report.phases import RUNNING, Phase
from millrace.observe.report.replicas import (
    COMPUTE_SECONDS,
    KV_USAGE,
    MEMORY_SECONDS,
    OUTPUT,
    STEP_SECONDS,
    WAITING,
    Replica,
    replicas,
)
from millrace.observe.report.series import Samples
from millrace.observe.samples.sample import Array

PROMPT = ("millrace:prompt_tokens_total", "vllm:prompt_tokens_total")
ENDED = ("millrace:requests_finished_total", "vllm:request_success_total")
PREEMPTIONS = ("millrace:num_preemptions_total", "vllm:num_preemptions_total")
ACCEPTED = ("millrace:spec_decode_num_accepted_tokens_total",
            "vllm:spec_decode_num_accepted_tokens_total")  # fmt: skip
DRAFTED = ("millrace:spec_decode_num_draft_tokens_total",
           "vllm:spec_decode_num_draft_tokens_total")  # fmt: skip
FLOPS, READ, WRITTEN = (f"millrace:estimated_{name}_total" for name in
                        ("flops", "read_bytes", "write_bytes"))  # fmt: skip
LATENCIES = {
    "time to first token": "time_to_first_token_seconds",
    "between two tokens": "inter_token_latency_seconds",
    "whole request": "e2e_request_latency_seconds",
    "in the queue": "request_queue_time_seconds",
}
HITS = ("millrace:prefix_cache_hits_total", "vllm:prefix_cache_hits_total")
QUERIES = ("millrace:prefix_cache_queries_total", "vllm:prefix_cache_queries_total")
GATEWAY_ANSWERS = "millrace_gateway_requests_total"
GATEWAY_RETRIES = "millrace_gateway_retries_total"
GATEWAY_QUEUE = "millrace_gateway_requests_queued"
GATEWAY_FIRST_BYTE = "millrace_gateway_first_byte_seconds_bucket"


class Meter(NamedTuple):
    """Names of what one source says of GPUs; empty for what it does not say."""

    power: str
    limit: str
    energy: str
    utilization: str


# The best first: engines name their own GPUs on any host, exporters those of their hosts, and the
# observer those of its own host, which may run no engine.
METERS = (
    Meter("millrace:gpu_power_watts", "millrace:gpu_power_limit_watts",
          "millrace:gpu_energy_joules_total", "millrace:gpu_utilization_ratio"),
    Meter("DCGM_FI_DEV_POWER_USAGE", "DCGM_FI_DEV_POWER_MGMT_LIMIT", "", "DCGM_FI_DEV_GPU_UTIL"),
    Meter("gpu_package_power", "", "", "gpu_gfx_activity"),  # of AMD's exporter
    Meter("gpu_power_watts", "gpu_power_limit_watts", "gpu_energy_joules", "gpu_utilization_ratio"),
)  # fmt: skip
POWER = tuple(meter.power for meter in METERS)
OF_WHOLE_GPUS = [name for meter in METERS for name in meter[:3] if name]
TENSOR, DRAM = "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", "DCGM_FI_PROF_DRAM_ACTIVE"
LATENCY_BUCKETS = {
    title: (f"millrace:{name}_bucket", f"vllm:{name}_bucket") for title, name in LATENCIES.items()
} | {"first byte, at the gateway": (GATEWAY_FIRST_BYTE,)}
# Everything that a report reads, so that a long run's other figures stay in their files.
NAMES = {
    *RUNNING, *WAITING, *KV_USAGE, *OUTPUT, *PROMPT, *ENDED, *PREEMPTIONS, *ACCEPTED, *DRAFTED,
    STEP_SECONDS, FLOPS, READ, WRITTEN, COMPUTE_SECONDS, MEMORY_SECONDS, *HITS, *QUERIES,
    *(name for meter in METERS for name in meter if name), TENSOR, DRAM, "up", "millrace:engine_up",
    "gpu_throttle", GATEWAY_ANSWERS, GATEWAY_RETRIES, GATEWAY_QUEUE, GATEWAY_FIRST_BYTE,
    "cpu_busy_seconds", "cpu_total_seconds", "net_receive_bytes", "net_transmit_bytes",
    "gpu_memory_used_bytes", "gpu_memory_total_bytes", "millrace:peak_flops_per_second",
    "millrace:peak_memory_bytes_per_second", "process_cpu_seconds_total",
    *(f"{p}:{name}_bucket" for p in ("millrace", "vllm") for name in LATENCIES.values()),
}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Where a gauge lay: quantiles over the seconds of a phase."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Kind:
    """Work of one kind, on one GPU in the mean: FLOPs and bytes a second."""

    name: str
    unit: str
    flops: float
    moved: float


@dataclass
class Figures:
    """A phase's figures; None where nothing said it. engines: that were sampled. Shares are of one
    GPU in the mean: busy: of time in which a step ran. power: W of all GPUs."""

    phase: Phase
    engines: int = 0
    down: float = 0.0
    output_rate: float | None = None
    prompt_rate: float | None = None
    request_rate: float | None = None
    preemption_rate: float = 0.0
    acceptance: float | None = None
    running: Spread | None = None
    waiting: Spread | None = None
    kv_usage: Spread | None = None
    power: Spread | None = None
    power_limit: float | None = None
    utilization: Spread | None = None
    tensor_active: Spread | None = None
    dram_active: Spread | None = None
    throttled: float = 0.0
    cache_hits: float | None = None
    gateway_errors: float | None = None
    gateway_retries: float | None = None
    gateway_queue: Spread | None = None
    mfu: float | None = None
    mbu: float | None = None
    busy: float | None = None
    host_busy: float | None = None
    network: float = 0.0
    joules_per_token: float | None = None
    joules_per_request: float | None = None
    latencies: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    kinds: list[Kind] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        """Whether no request ran for most of the time."""
        return self.running is None or self.running.median < 0.5


def meter_of(samples: Samples) -> Meter:
    """Where the figures of GPUs are taken from."""
    return next((one for one in METERS if samples.series(one.power)), METERS[-1])


def figures(samples: Samples, phase: Phase) -> Figures:
    """What a phase showed."""
    start, end = phase.start, phase.end
    found = Figures(phase, engines=len(samples.series(*RUNNING)))
    found.replicas = replicas(samples, start, end)
    meter = meter_of(samples)

    def rate(*names: str) -> float | None:
        return samples.rate(start, end, *names)

    def spread(*names: str, combine: Callable[[Array], Array] | None = None) -> Spread | None:
        _, values = samples.over_time(start, end, *names, combine=combine)
        if not len(values):
            return None
        return Spread(*(float(x) for x in np.quantile(values, (0.05, 0.5, 0.95))))

    found.output_rate, found.prompt_rate = rate(*OUTPUT), rate(*PROMPT)
    found.request_rate, found.preemption_rate = rate(*ENDED), rate(*PREEMPTIONS) or 0.0
    drafted = samples.increase(start, end, *DRAFTED)
    if drafted:
        found.acceptance = samples.increase(start, end, *ACCEPTED) / drafted
    queries = samples.increase(start, end, *QUERIES)
    if queries:
        found.cache_hits = samples.increase(start, end, *HITS) / queries
    found.running, found.waiting = spread(*RUNNING), spread(*WAITING)
    found.kv_usage = spread(*KV_USAGE, combine=lambda table: table.max(axis=0))
    found.power = spread(meter.power)
    found.power_limit = _last_sum(samples, meter.limit)
    found.utilization = spread(meter.utilization, combine=_mean_ratio)
    found.tensor_active = spread(TENSOR, combine=_mean)
    found.dram_active = spread(DRAM, combine=_mean)
    _, limited = samples.over_time(start, end, "gpu_throttle", combine=_any_limit)
    found.throttled = float(np.mean(limited)) if len(limited) else 0.0
    found.down = _down(samples, start, end)
    _add_shares(found, samples, rate)
    if _powers_known(samples, meter, found):
        _add_energy(found, rate(meter.energy) if meter.energy else None)
    _add_kinds(found, samples)
    _add_latencies(found, samples)
    found.gateway_queue, found.gateway_retries = spread(GATEWAY_QUEUE), rate(GATEWAY_RETRIES)
    by_status = samples.rate_by("status", start, end, GATEWAY_ANSWERS)
    if by_status:
        failed = sum(one for status, one in by_status.items() if status.startswith("5"))
        found.gateway_errors = failed / sum(by_status.values())
    return found


def _powers_known(samples: Samples, meter: Meter, found: Figures) -> bool:
    """Whether the power of every engine's GPUs is known: by its own word, or by the number of GPUs
    of hosts and exporters."""
    if meter is METERS[0]:
        return {one.name for one in found.replicas} <= samples.engines.get(meter.power, set())
    return len(samples.series(meter.power)) >= found.engines


def _add_shares(found: Figures, samples: Samples, rate: Callable[..., float | None]) -> None:
    start, end = found.phase.start, found.phase.end
    engines = max(found.engines, 1)
    for name, counter in (("mfu", COMPUTE_SECONDS), ("mbu", MEMORY_SECONDS),
                          ("busy", STEP_SECONDS)):  # fmt: skip
        value = rate(counter)
        setattr(found, name, None if value is None else value / engines)
    busy, total = rate("cpu_busy_seconds"), rate("cpu_total_seconds")
    found.host_busy = busy / total if busy is not None and total else None
    wires = [
        one for one in samples.series("net_transmit_bytes") if one.labels.get("device") != "lo"
    ]
    found.network = sum(one.increase(start, end) for one in wires) / max(end - start, 1e-9)


def _add_energy(found: Figures, joules: float | None) -> None:
    """joules: a second, as a counter has it; else the power is taken."""
    if joules is None and found.power is not None:
        joules = found.power.median
    if joules is not None:
        found.joules_per_token = joules / found.output_rate if found.output_rate else None
        found.joules_per_request = joules / found.request_rate if found.request_rate else None


def _add_kinds(found: Figures, samples: Samples) -> None:
    start, end = found.phase.start, found.phase.end
    engines = max(found.engines, 1)
    units = {
        one.labels.get("kind", ""): one.labels.get("unit", "") for one in samples.series(FLOPS)
    }
    flops = samples.rate_by("kind", start, end, FLOPS)
    moved = [samples.rate_by("kind", start, end, name) for name in (READ, WRITTEN)]
    for kind in sorted({*flops, *moved[0], *moved[1]}, key=lambda kind: -flops.get(kind, 0.0)):
        bytes_moved = sum(one.get(kind, 0.0) for one in moved) / engines
        counted = flops.get(kind, 0.0) / engines
        found.kinds.append(Kind(kind, units.get(kind, ""), counted, bytes_moved))


def _add_latencies(found: Figures, samples: Samples) -> None:
    for title, names in LATENCY_BUCKETS.items():
        quantiles = [
            samples.quantile(q, found.phase.start, found.phase.end, *names)
            for q in (0.5, 0.95, 0.99)
        ]
        known = [value for value in quantiles if value is not None]
        if len(known) == 3:
            found.latencies[title] = known[0], known[1], known[2]


def _down(samples: Samples, start: float, end: float) -> float:
    """The share of seconds in which some engine was down, or did not answer."""
    seen = np.zeros(0)
    for name in ("up", "millrace:engine_up"):
        _, least = samples.over_time(start, end, name, combine=lambda table: table.min(axis=0))
        if len(least):
            seen = least if not len(seen) else np.minimum(seen, least[: len(seen)])
    return float(np.mean(seen < 1)) if len(seen) else 0.0


def _last_sum(samples: Samples, name: str) -> float | None:
    found = samples.series(name)
    return float(sum(one.values[-1] for one in found)) if found else None


def _mean(table: Array) -> Array:
    return np.asarray(table.mean(axis=0))


def _mean_ratio(table: Array) -> Array:
    """DCGM counts to 100, NVML's share to 1."""
    return _mean(table) / (100.0 if table.max(initial=0.0) > 1.5 else 1.0)


def _any_limit(table: Array) -> Array:
    """Whether power, heat or the hardware lowers the clocks: bits 2, 3, 5, 6 and 7 of NVML."""
    return np.asarray((table.astype(np.int64) & 0xEC).any(axis=0), dtype=np.float64)


def peaks(samples: Samples, gpu: Gpu | None) -> tuple[dict[str, float], float | None]:
    """Dense peaks by dtype and the memory's, of one GPU: as engines say them, else of the table."""
    flops = {
        one.labels.get("unit", ""): float(one.values[-1])
        for one in samples.series("millrace:peak_flops_per_second")
    }
    memory = samples.series("millrace:peak_memory_bytes_per_second")
    if not flops and gpu is not None:
        return {u: gpu.rate(u) for u in ("fp8", "bf16")}, gpu.bytes_per_second
    return flops, float(memory[0].values[-1]) if memory else None
