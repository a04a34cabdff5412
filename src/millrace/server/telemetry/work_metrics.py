"""What steps compute and move, how much of the device that is, and the energy that it takes.

FLOPs and bytes are those of the work model, of one rank. Utilisation is measured against the dense
peak of the dtype that each part multiplies in (MFU), and against the memory's peak (MBU). Where the
device is not in the table of GPUs, FLOPs and bytes stand alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from millrace.hardware.gpus import Gpu, gpu_of_device
from millrace.protocol import PartWork, WorkStats

WINDOW = 10.0  # seconds that MFU and MBU cover at least, once so long is known
UNITS = ("fp4", "fp8", "bf16", "fp32")


def peak_seconds(parts: Mapping[str, PartWork], gpu: Gpu) -> tuple[float, float]:
    """Seconds that the FLOPs of all parts take at the dense peak of their dtypes, and that their
    bytes take at the peak of the memory."""
    compute = sum(part.flops / gpu.rate(part.unit) for part in parts.values())
    moved = sum(part.read + part.written for part in parts.values())
    return compute, moved / gpu.bytes_per_second


class Utilisation:
    """Shares of the last seconds, from totals at the times when somebody asks."""

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self._seen: deque[tuple[float, float, float]] = deque()

    def shares(self, compute: float, memory: float) -> tuple[float, float]:
        """(MFU, MBU) since the newest call that is WINDOW or longer ago, else since the first.
        compute, memory: totals of seconds at peak. An engine that was started again begins anew."""
        now = self._now()
        if self._seen and compute < self._seen[-1][1]:
            self._seen.clear()
        if not self._seen or now - self._seen[-1][0] >= 1.0:
            self._seen.append((now, compute, memory))
        while len(self._seen) > 1 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()
        at, *before = self._seen[0]
        if now <= at:
            return 0.0, 0.0
        return (compute - before[0]) / (now - at), (memory - before[1]) / (now - at)


class WorkMetrics:
    """Families of the metrics page.

    work: the engine's totals, None where its model's work is not counted. device_name: as its
    driver says it. samples: of its GPUs by number and UUID, as `hardware.nvml` has them.
    """

    def __init__(
        self,
        work: Callable[[], WorkStats | None],
        device_name: Callable[[], str] = str,
        samples: Callable[[], Mapping[tuple[str, str], Mapping[str, float]]] = dict,
    ) -> None:
        self._work, self._device_name, self._samples = work, device_name, samples
        self._utilisation = Utilisation()

    def collect(self, labels: Mapping[str, str]) -> Iterator[Metric]:
        """labels: that every sample has."""
        yield from self._devices(labels)
        work = self._work()
        if work is None:
            return
        yield from _totals(work, labels)
        gpu = gpu_of_device(self._device_name())
        if gpu is not None:
            yield from self._against_peaks(work, gpu, labels)

    def _against_peaks(
        self, work: WorkStats, gpu: Gpu, labels: Mapping[str, str]
    ) -> Iterator[Metric]:
        compute, memory = peak_seconds(work.parts, gpu)
        for name, text, value in (
            ("estimated_peak_compute_seconds", "Seconds that the FLOPs of all steps take at the "
             "dense peak of their dtypes; its rate is MFU.", compute),
            ("estimated_peak_memory_seconds", "Seconds that the bytes of all steps take at the "
             "memory's peak; its rate is MBU.", memory),
        ):  # fmt: skip
            yield _counter(f"millrace:{name}", text, labels, {(): value})
        mfu, mbu = self._utilisation.shares(compute, memory)
        for name, text, value in (
            ("mfu_ratio", "FLOPs of the last seconds over the dense peak of their dtypes.", mfu),
            ("mbu_ratio", "Bytes of the last seconds over the memory's peak.", mbu),
            ("peak_memory_bytes_per_second", "The memory's peak.", gpu.bytes_per_second),
        ):
            yield _gauge(f"millrace:{name}", text, labels, {(): value})
        used = {part.unit for part in work.parts.values() if part.flops}
        peaks = {(unit,): gpu.rate(unit) for unit in UNITS if unit in used}
        text = "Dense peak of the dtypes in use."
        yield _gauge("millrace:peak_flops_per_second", text, labels, peaks, "unit")

    def _devices(self, labels: Mapping[str, str]) -> Iterator[Metric]:
        samples = self._samples()
        if not samples:
            return
        for name, text in (
            ("power_watts", "Power of a GPU of the engine."),
            ("power_limit_watts", "The power that it may take."),
            ("utilization_ratio", "Share of time in which some kernel ran."),
            ("memory_used_bytes", "Memory in use; the host's where it is shared."),
            ("sm_clock_mhz", "Clock of its multiprocessors."),
        ):
            values = {gpu: found[name] for gpu, found in samples.items() if name in found}
            yield _gauge(f"millrace:gpu_{name}", text, labels, values, "gpu", "uuid")
        energy = {
            gpu: found["energy_joules"]
            for gpu, found in samples.items()
            if "energy_joules" in found
        }
        text = "Energy that a GPU of the engine has taken since its driver was loaded."
        yield _counter("millrace:gpu_energy_joules", text, labels, energy, "gpu", "uuid")


def _totals(work: WorkStats, labels: Mapping[str, str]) -> Iterator[Metric]:
    parts = work.parts
    text = "Seconds in which a step ran."
    yield _counter("millrace:step_seconds", text, labels, {(): work.seconds})
    flops = {(kind, part.unit): part.flops for kind, part in parts.items() if part.flops}
    text = "FLOPs of all steps on one GPU, by kind of work and by the dtype that multiplies."
    yield _counter("millrace:estimated_flops", text, labels, flops, "kind", "unit")
    sums = [("flops", "FLOPs", sum(part.flops for part in parts.values()))]
    for name, what, values in (
        ("read_bytes", "read", {kind: part.read for kind, part in parts.items()}),
        ("write_bytes", "written", {kind: part.written for kind, part in parts.items()}),
    ):
        text = f"Bytes of its memory {what} by all steps on one GPU, by kind of work."
        moved = {(kind,): count for kind, count in values.items() if count}
        yield _counter(f"millrace:estimated_{name}", text, labels, moved, "kind")
        sums.append((name, f"Bytes {what}", sum(values.values())))
    for name, what, total in sums:
        text = f"{what} of all steps on one GPU, drafts and recurrent layers among them."
        yield _counter(f"vllm:estimated_{name}_per_gpu", text, labels, {(): total})


def _gauge(
    name: str, text: str, labels: Mapping[str, str], values: Mapping[Any, float],
    *more: str,
) -> Metric:  # fmt: skip
    family = GaugeMetricFamily(name, text, labels=[*labels, *more])
    for own, value in values.items():
        family.add_metric([*labels.values(), *own], value)
    return family


def _counter(
    name: str, text: str, labels: Mapping[str, str], values: Mapping[Any, float],
    *more: str,
) -> Metric:  # fmt: skip
    family = CounterMetricFamily(name, text, labels=[*labels, *more])
    for own, value in values.items():
        family.add_metric([*labels.values(), *own], value)
    return family
