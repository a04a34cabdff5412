"""The report of a run as one HTML file: phases, the wall of each in words, utilisation, charts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from millrace.hardware.gpus import Gpu, gpu_of_device
from millrace.observe.report.charts import Line, bars, chart, short
from millrace.observe.report.figures import (
    LATENCY_BUCKETS,
    NAMES,
    OF_WHOLE_GPUS,
    Figures,
    Kind,
    Spread,
    figures,
    meter_of,
    peaks,
)
from millrace.observe.report.findings import contradictions, walls
from millrace.observe.report.phases import RUNNING, Phase, phases
from millrace.observe.report.replicas import KV_USAGE, OUTPUT, WAITING, Replica
from millrace.observe.report.roofline import roofline
from millrace.observe.report.series import Samples
from millrace.observe.samples.sample import Array
from millrace.observe.samples.store import read_events, read_meta, read_points

REPORT = "report.html"


def write_report(directory: Path) -> tuple[Path, list[Figures]]:
    """Write report.html into a run's directory; returns it, and what each phase showed. Raises
    UserError for a directory without samples."""
    meta = read_meta(directory)
    samples = Samples(read_points(directory, NAMES), OF_WHOLE_GPUS)
    found = [figures(samples, phase) for phase in phases(samples, read_events(directory))]
    gpu = _gpu(meta)
    context = _context(meta, samples, found) | {
        "phases": [_phase(one, samples, *peaks(samples, gpu)) for one in found],
        "charts": _charts(samples, [one.phase for one in found]),
    }
    from jinja2 import Environment
    from markupsafe import Markup

    text = (
        resources.files("millrace.observe.report").joinpath("templates/report.html.j2").read_text()
    )
    for one in (*context["charts"], *(one for phase in context["phases"] for one in phase["bars"])):
        one["svg"] = Markup(one["svg"])  # made by us, of escaped names
    for one in context["phases"]:
        one["roofline"] = Markup(one["roofline"])
    target = directory / REPORT
    target.write_text(Environment(autoescape=True).from_string(text).render(context))
    return target, found


def _gpu(meta: dict[str, Any]) -> Gpu | None:
    names = list(meta.get("gpus", {}).values())
    return gpu_of_device(names[0]) if names else None


def _context(meta: dict[str, Any], samples: Samples, found: Sequence[Figures]) -> dict[str, Any]:
    targets = [
        {
            "name": name, "kind": one["kind"], "restarts": one["restarts"],
            "offset": _offset(one["clock_offset"], one["clock_error"]),
        }
        for name, one in meta.get("targets", {}).items()
    ]  # fmt: skip
    names = sorted(meta.get("gpus", {}).values())
    counts = {name: names.count(name) for name in names}
    return {
        "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(samples.start)),
        "seconds": f"{samples.end - samples.start:.0f}",
        "interval": f"{meta.get('interval', 1):g}",
        "targets": targets,
        "gpus": ", ".join(f"{count} x {name}" for name, count in counts.items()),
        "problems": meta.get("problems", []),
    }


def _offset(offset: float | None, error: float | None) -> str:
    if offset is None or error is None:
        return ""
    return f"{offset * 1000:+.0f} ms, within {error * 1000:.0f}"


def _phase(
    f: Figures, samples: Samples, peak_flops: dict[str, float], peak_bytes: float | None
) -> dict[str, Any]:
    kinds = [] if f.idle else f.kinds
    return {
        "bars": [] if f.idle else _bars(f.phase, samples),
        "roofline": roofline(kinds, peak_flops, peak_bytes),
        "replicas": [_replica(one) for one in f.replicas] if len(f.replicas) > 1 else [],
        "name": f.phase.name,
        "seconds": f"{f.phase.end - f.phase.start:.0f}",
        "walls": walls(f),
        "contradictions": contradictions(f),
        "rows": _rows(f),
        "latencies": [
            (name, *(f"{1000 * value:,.0f} ms" for value in quantiles))
            for name, quantiles in f.latencies.items()
        ],
        "kinds": [_kind(kind, peak_flops, peak_bytes) for kind in kinds],
    }


def _bars(phase: Phase, samples: Samples) -> list[dict[str, str]]:
    """Histograms of latencies."""
    found = [
        {"title": title, "svg": bars(title, samples.cumulative(phase.start, phase.end, *names))}
        for title, names in LATENCY_BUCKETS.items()
    ]
    return [one for one in found if one["svg"]]


def _replica(one: Replica) -> tuple[str, ...]:
    """A row of the table of replicas."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    def number(value: float | None) -> str:
        return "" if value is None else short(value)

    return (
        one.name, share(one.up), number(one.running), number(one.waiting), share(one.kv_usage),
        number(one.output_rate), share(one.busy), share(one.mfu), share(one.mbu),
    )  # fmt: skip


def _rows(f: Figures) -> list[tuple[str, ...]]:
    """(figure, value, and 5%, median and 95% of a gauge)."""
    rows: list[tuple[str, ...]] = []

    def add(name: str, value: float | None, unit: str = "", share: bool = False) -> None:
        if value is not None:
            text = f"{value:.1%}" if share else f"{short(value)}{unit}"
            rows.append((name, text, "", "", ""))

    def lies(name: str, spread: Spread | None, unit: str = "", share: bool = False) -> None:
        if spread is not None:
            cells = (spread.low, spread.median, spread.high)
            texts = [f"{c:.1%}" if share else f"{short(c)}{unit}" for c in cells]
            rows.append((name, "", *texts))

    add("output tokens / s", f.output_rate)
    add("prompt tokens / s", f.prompt_rate)
    add("requests / s", f.request_rate)
    add("MFU, of the dense peak", f.mfu, share=True)
    add("MBU, of the memory's peak", f.mbu, share=True)
    add("time in which a step ran", f.busy, share=True)
    add("accepted drafts", f.acceptance, share=True)
    add("prompt tokens found in the cache", f.cache_hits, share=True)
    add("failed answers of the gateway", f.gateway_errors, share=True)
    add("retries of the gateway / s", f.gateway_retries)
    add("energy of an output token", f.joules_per_token, "J")
    add("energy of a request", f.joules_per_request, "J")
    add("processors of this host", f.host_busy, share=True)
    add("sent over the network / s", f.network or None, "B")
    lies("running requests", f.running)
    lies("waiting requests", f.waiting)
    lies("waiting at the gateway", f.gateway_queue)
    lies("KV cache, fullest engine", f.kv_usage, share=True)
    lies("power of all GPUs", f.power, "W")
    lies("GPU busy, as the driver says", f.utilization, share=True)
    lies("tensor pipes active (DCGM)", f.tensor_active, share=True)
    lies("DRAM active (DCGM)", f.dram_active, share=True)
    return rows


def _kind(kind: Kind, peak_flops: dict[str, float], peak_bytes: float | None) -> dict[str, str]:
    """A row of the roofline table."""
    compute = kind.flops / peak_flops[kind.unit] if peak_flops.get(kind.unit) else None
    memory = kind.moved / peak_bytes if peak_bytes else None
    bound = "" if compute is None or memory is None else "compute" if compute > memory else "memory"
    return {
        "name": kind.name,
        "unit": kind.unit if kind.flops else "",
        "flops": short(kind.flops),
        "mfu": "" if compute is None else f"{compute:.1%}",
        "moved": f"{short(kind.moved)}B",
        "mbu": "" if memory is None else f"{memory:.1%}",
        "intensity": f"{kind.flops / kind.moved:.3g}" if kind.moved else "",
        "bound": bound,
    }


def _charts(samples: Samples, shown: Sequence[Phase]) -> list[dict[str, str]]:
    def gauge(name: str, *names: str, largest: bool = False) -> Line:
        combine = (lambda table: table.max(axis=0)) if largest else None
        t, values = samples.over_time(samples.start, samples.end, *names, combine=combine)
        return Line(name, t, values)

    def rate(name: str, *names: str) -> Line:
        grid: Array = np.arange(samples.start, samples.end, 1.0, dtype=np.float64)
        found = samples.series(*names)
        if not found or not len(grid):
            return Line(name, grid[:0], grid[:0])
        return Line(name, grid, np.asarray(sum(one.rate(grid) for one in found)))

    meter = meter_of(samples)
    wanted = (
        ("Output tokens / s", "", [rate("output", *OUTPUT)]),
        (
            "Requests: running, waiting",
            "",
            [gauge("running", *RUNNING), gauge("waiting", *WAITING)],
        ),
        ("KV cache, fullest engine", "", [gauge("KV cache", *KV_USAGE, largest=True)]),
        ("Power of all GPUs", "W", [gauge("power", meter.power)]),
        ("GPUs busy, summed", "", [gauge("busy", meter.utilization)]),
    )
    found = [
        {"title": title, "svg": chart(title, unit, lines, shown)} for title, unit, lines in wanted
    ]
    return [one for one in found if one["svg"]]
