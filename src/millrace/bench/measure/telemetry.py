"""Samples of servers and GPUs during a run: /metrics pages and NVML, once a second.

A source that is not available is left out, with a note of one line. No failure here ends a run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from itertools import pairwise
from time import perf_counter_ns

import msgspec

from millrace.bench.load.options import BenchOptions
from millrace.bench.measure.prometheus_reader import (
    MetricsPage,
    Totals,
    difference,
    read_dcgm,
    read_page,
)
from millrace.common.http_client import Target, fetch, parse_url
from millrace.errors import UserError
from millrace.hardware.nvml import Nvml

_EVERY_S = 1.0
_LIMIT_S = 2.0  # for one page
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Sample(msgspec.Struct, frozen=True):
    """One sample: at_ns on the monotonic clock; server: gauges and counters summed over replicas
    (kv_cache_usage_perc is their mean); gpu: power in W over all GPUs, shares as means. running:
    requests that run at each replica that says so."""

    at_ns: int
    server: dict[str, float] = {}
    gpu: dict[str, float] = {}
    running: tuple[float, ...] = ()


class Observation(msgspec.Struct, frozen=True):
    """What was sampled of servers and GPUs. energy_j: joules of all GPUs, None where unknown."""

    replicas: list[str] = []
    totals: Totals = Totals()
    samples: list[Sample] = []
    energy_j: float | None = None
    gpus: list[str] = []
    notes: list[str] = []


no_observation = Observation()


class Telemetry:
    """A context that takes samples while it is open; `observation` is set afterwards."""

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self._targets: list[Target] = []
        self._before: list[MetricsPage] = []
        self._samples: list[Sample] = []
        self._gpus = Gpus() if options.target.host in _LOOPBACK else None
        self._task: asyncio.Task[None] | None = None
        self.observation = no_observation

    async def __aenter__(self) -> Telemetry:
        self._targets = await find_replicas(self._options)
        self._before = await self._read()
        self._energy = self._gpus.energy_j() if self._gpus else None
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        after = await self._read()
        notes = [] if self._gpus is None else self._gpus.notes
        if not any(page.counters for page in after):
            notes = [*notes, "no replica has counters at /metrics; see --metrics-url"]
        self.observation = Observation(
            replicas=[str(target) for target in self._targets],
            totals=difference(self._before, after),
            samples=self._samples,
            energy_j=self._energy_used(),
            gpus=self._gpus.names if self._gpus else [],
            notes=list(notes),
        )

    async def _read(self) -> list[MetricsPage]:
        return list(await asyncio.gather(*(self._page(target) for target in self._targets)))

    async def _page(self, target: Target) -> MetricsPage:
        return read_page(await _text(target, self._options.headers))

    async def _sample(self) -> None:
        while True:
            at = perf_counter_ns()
            pages = await self._read()
            gpu = self._gpus.sample() if self._gpus else {}
            if self._options.dcgm_url:
                gpu = gpu | read_dcgm(await _text(parse_url(self._options.dcgm_url)))
            self._samples.append(Sample(at, _combined(pages), gpu, _running(pages)))
            await asyncio.sleep(max(0.0, _EVERY_S - (perf_counter_ns() - at) / 1e9))

    def _energy_used(self) -> float | None:
        """From the GPUs' energy counters, else from the sampled power."""
        now = self._gpus.energy_j() if self._gpus else None
        if now is not None and self._energy is not None:
            return now - self._energy
        return integrate([(s.at_ns, s.gpu["power_w"]) for s in self._samples if "power_w" in s.gpu])


def integrate(powers: list[tuple[int, float]]) -> float | None:
    """Joules of (ns, W) samples by the trapezoidal rule; None for fewer than two."""
    if len(powers) < 2:
        return None
    return sum((b - a) / 1e9 * (low + high) / 2 for (a, low), (b, high) in pairwise(powers))


async def find_replicas(options: BenchOptions) -> list[Target]:
    """All replicas: those of --metrics-url, else those that a Millrace gateway lists, else what is
    loaded."""
    verify = options.target.verify
    if options.metrics_urls:
        named = [parse_url(url) for url in options.metrics_urls]
        return [msgspec.structs.replace(target, verify=verify) for target in named]
    if options.others:
        return [msgspec.structs.replace(one, prefix="", query="") for one in options.targets]
    root = msgspec.structs.replace(options.target, prefix="", query="")
    try:
        response = await fetch(root, "/gateway/replicas", timeout=_LIMIT_S)
        found = msgspec.json.decode(response.body) if response.status == 200 else {}
        named = [parse_url(str(replica["url"])) for replica in found.get("replicas", ())]
    except (OSError, msgspec.DecodeError, LookupError, TypeError, AttributeError, UserError):
        named = []
    return named or [root]


async def _text(target: Target, headers: tuple[tuple[str, str], ...] = ()) -> str:
    """A target's metrics page; empty where there is none."""
    path = "" if target.prefix.endswith("/metrics") else "/metrics"
    try:
        response = await fetch(target, path, headers=headers, timeout=_LIMIT_S)
    except OSError:
        return ""
    return response.body.decode("utf-8", "replace") if response.status == 200 else ""


def _combined(pages: list[MetricsPage]) -> dict[str, float]:
    whole: dict[str, float] = {}
    for page in pages:
        for name, value in (*page.gauges.items(), *page.counters.items()):
            whole[name] = whole.get(name, 0.0) + value
    used = [p.gauges["kv_cache_usage_perc"] for p in pages if "kv_cache_usage_perc" in p.gauges]
    if used:
        whole["kv_cache_usage_perc"] = sum(used) / len(used)
    return whole


def _running(pages: list[MetricsPage]) -> tuple[float, ...]:
    found = (page.gauges.get("num_requests_running") for page in pages)
    return tuple(value for value in found if value is not None)


class Gpus:
    """This host's GPUs, together. A library that is missing where there is a driver is a note."""

    def __init__(self) -> None:
        self._nvml = Nvml()
        problem = self._nvml.problem
        self.names = [device.name for device in self._nvml.devices]
        self.notes = [f"power of GPUs is left out: {problem}"] if problem else []

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded, of all GPUs; None where one has no counter."""
        return self._nvml.energy_joules()

    def sample(self) -> dict[str, float]:
        """Power in W and memory in bytes over all GPUs, utilisation as a mean share."""
        devices = self._nvml.devices
        samples = [self._nvml.sample(device) for device in devices]
        found = {}
        whole = {device.index: one for device, one in zip(devices, samples, strict=True)}
        if power := _known(whole.values(), "power_watts"):
            found["power_w"] = sum(power)
        if shares := _known(samples, "utilization_ratio"):
            found["utilization"] = sum(shares) / len(shares)
        if memory := _known(samples, "memory_used_bytes"):
            found["memory_used"] = sum(memory)
        return found


def _known(samples: Iterable[Mapping[str, float]], name: str) -> list[float]:
    """A figure of all samples that have it."""
    return [sample[name] for sample in samples if name in sample]
