"""From samples to phases, figures, the wall in words, and a page: over runs made up by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from millrace.observe.report.charts import Line, bars, chart, short
from millrace.observe.report.figures import OF_WHOLE_GPUS, Figures, Kind, Spread, figures
from millrace.observe.report.findings import contradictions, walls
from millrace.observe.report.page import write_report
from millrace.observe.report.phases import Phase, phases
from millrace.observe.report.roofline import roofline
from millrace.observe.report.series import Samples, Series, quantile_of
from millrace.observe.samples.pages import read
from millrace.observe.samples.sample import Row, labels_text, points_of
from millrace.observe.samples.store import Store, mark

T0 = 1_700_000_000.0
ENGINE, GPU = {"model_name": "m", "engine": "0"}, {"gpu": "0"}


def made(seconds: int = 60, **changes: Callable[[int], float]) -> list[Row]:
    """A minute of one engine on one H200: idle, a ramp of 10 s, load at second 20 to 50, idle."""

    def load(s: int) -> float:
        return min(max((s - 10) / 10, 0.0), 1.0) if s < 50 else 0.0

    def total(s: int) -> float:
        return sum(load(n) for n in range(s + 1))

    gauges: dict[str, tuple[dict[str, str], Callable[[int], float]]] = {
        "millrace:num_requests_running": (ENGINE, lambda s: 100 * load(s)),
        "millrace:num_requests_waiting": (ENGINE, lambda s: 0),
        "millrace:kv_cache_usage_perc": (ENGINE, lambda s: 0.6 * load(s)),
        "millrace:engine_up": (ENGINE, lambda s: 1),
        "millrace:generation_tokens_total": (ENGINE, lambda s: 5000 * total(s)),
        "millrace:requests_finished_total": (ENGINE, lambda s: 10 * total(s)),
        "millrace:step_seconds_total": (ENGINE, lambda s: 0.98 * total(s)),
        "millrace:estimated_peak_compute_seconds_total": (ENGINE, lambda s: 0.3 * total(s)),
        "millrace:estimated_peak_memory_seconds_total": (ENGINE, lambda s: 0.7 * total(s)),
        "millrace:peak_flops_per_second": (ENGINE | {"unit": "fp8"}, lambda s: 1979e12),
        "millrace:peak_memory_bytes_per_second": (ENGINE, lambda s: 4.8e12),
        "millrace:estimated_flops_total": (
            ENGINE | {"kind": "linear", "unit": "fp8"}, lambda s: 0.3 * 1979e12 * total(s),
        ),
        "millrace:estimated_read_bytes_total": (
            ENGINE | {"kind": "linear"}, lambda s: 0.5 * 4.8e12 * total(s),
        ),
        "gpu_power_watts": (GPU, lambda s: 100 + 500 * load(s)),
        "gpu_power_limit_watts": (GPU, lambda s: 700),
        "gpu_energy_joules": (GPU, lambda s: 600 * total(s)),
        "gpu_utilization_ratio": (GPU, load),
        "gpu_throttle": (GPU, lambda s: 0),
    }  # fmt: skip
    for bound, share in (("0.1", 0.5), ("1.0", 0.96), ("+Inf", 1.0)):
        gauges[f"bucket {bound}"] = (
            ENGINE | {"le": bound}, lambda s, share=share: share * 10 * total(s),
        )  # fmt: skip
    rows = []
    for name, (labels, value) in gauges.items():
        value = changes.get(name.rpartition(":")[2], value)
        name = "millrace:time_to_first_token_seconds_bucket" if "bucket" in name else name
        rows += [Row(T0 + s, "e", name, labels_text(labels), value(s)) for s in range(seconds)]
    return rows


def steady(**changes: Callable[[int], float]) -> Figures:
    samples = Samples(points_of(made(**changes)))
    (phase,) = [p for p in phases(samples, []) if p.name == "steady"]
    return figures(samples, phase)


def test_counters_survive_restarts() -> None:
    one = Series("a", "", np.arange(4.0), np.array([0.0, 10.0, 3.0, 8.0]))
    assert one.increase(0, 3) == 18.0
    assert one.rate(np.arange(3.0)).tolist() == [10.0, 3.0, 5.0]
    assert quantile_of(0.5, [(0.1, 50.0), (1.0, 96.0), (float("inf"), 100.0)]) == 0.1
    assert quantile_of(0.99, [(0.1, 50.0), (1.0, 96.0), (float("inf"), 100.0)]) == 1.0
    assert quantile_of(0.5, []) is None


def test_phases_are_found_and_marked_ones_win() -> None:
    samples = Samples(points_of(made()))
    found = [(p.name, round(p.start - T0), round(p.end - T0)) for p in phases(samples, [])]
    assert found == [("idle", 0, 11), ("ramp", 11, 18), ("steady", 18, 50), ("idle", 50, 59)]
    marked = phases(samples, [(T0 + 5, "warm-up"), (T0 + 30, "run")])
    assert [(p.name, p.end - p.start) for p in marked] == [
        ("before", 5), ("warm-up", 25), ("run", 29),
    ]  # fmt: skip


def test_figures_of_a_phase() -> None:
    f = steady()
    assert f.output_rate == pytest.approx(5000, rel=0.05)
    assert f.request_rate == pytest.approx(10, rel=0.05)
    assert f.mfu == pytest.approx(0.3, rel=0.05)
    assert f.mbu == pytest.approx(0.7, rel=0.05)
    assert f.busy == pytest.approx(0.98, rel=0.05)
    assert f.joules_per_token == pytest.approx(0.12, rel=0.05)
    assert f.joules_per_request == pytest.approx(60, rel=0.05)
    assert f.power is not None
    assert f.power.median == 600.0
    p50, p95, p99 = f.latencies["time to first token"]
    assert (p50, p99) == (pytest.approx(0.1), 1.0)
    assert 0.9 < p95 < 1.0
    (linear,) = f.kinds
    assert (linear.unit, linear.flops) == ("fp8", pytest.approx(0.3 * 1979e12, rel=0.05))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "Memory bandwidth: 68%"),
        ({"estimated_peak_compute_seconds_total": lambda s: 0.8 * s}, "Compute: 80%"),
        ({"gpu_power_watts": lambda s: 698.0}, "Power: the GPUs are at their limit, 698 W"),
        ({"num_requests_waiting": lambda s: 9, "kv_cache_usage_perc": lambda s: 0.99,
          "estimated_peak_memory_seconds_total": lambda s: 0.3 * s},
         "KV cache: 99% of its pages"),
        ({"num_requests_waiting": lambda s: 9, "step_seconds_total": lambda s: 0.4 * s,
          "estimated_peak_memory_seconds_total": lambda s: 0.2 * s}, "The host: requests wait"),
        ({"step_seconds_total": lambda s: 0.2 * s,
          "estimated_peak_memory_seconds_total": lambda s: 0.1 * s}, "The load: nothing waits"),
        ({"estimated_peak_memory_seconds_total": lambda s: 0.2 * s}, "In between: steps run"),
        ({"engine_up": lambda s: float(s % 2)}, "Engines were down or silent for 5"),
    ],
)  # fmt: skip
def test_the_wall_is_said_in_words(changes: dict[str, Callable[[int], float]], said: str) -> None:
    found = walls(steady(**changes))
    assert said in found[0], found


def test_a_phase_without_load_or_engines_says_so() -> None:
    samples = Samples(points_of(made()))
    idle = figures(samples, Phase("idle", T0, T0 + 9))
    assert walls(idle) == ["No load: no request ran for most of the time."]
    assert walls(Figures(idle.phase)) == ["No engine was sampled, so nothing is known of the work."]


def fleet(*shares: float) -> list[Row]:
    """Replicas on a GPU each, which say themselves what that takes; each with its share of load."""
    rows = []
    for number, share in enumerate(shares):
        for row in made():
            name = f"millrace:{row.name}" if row.name.startswith("gpu_") else row.name
            name = name.replace("energy_joules", "energy_joules_total")
            value = row.value * (share if "generation" in name else 1.0)
            rows.append(Row(row.t, f"r{number}", name, row.labels, value))
    return rows


def steady_of(rows: list[Row]) -> Figures:
    return figures(Samples(points_of(rows)), Phase("steady", T0 + 20, T0 + 50))


def test_shares_are_those_of_one_gpu_however_many_there_are() -> None:
    one, three = steady_of(fleet(1.0)), steady_of(fleet(1.0, 1.0, 1.0))
    assert three.engines == len(three.replicas) == 3
    assert three.output_rate == pytest.approx(3 * one.output_rate)
    assert three.power is not None
    assert three.power.median == 1800.0
    for name in ("mfu", "mbu", "busy", "joules_per_token"):
        assert getattr(three, name) == pytest.approx(getattr(one, name)), name
    assert three.kinds[0].flops == pytest.approx(one.kinds[0].flops)
    assert walls(three) == walls(one)


def test_gpus_of_engines_go_before_those_of_the_observers_host() -> None:
    """Its host may run no engine; and of engines whose GPUs are unknown no joules are said."""
    power = [row for row in made() if row.name == "gpu_power_watts"]
    here = [Row(row.t, "host", row.name, row.labels, 50.0) for row in power]
    found = steady_of([*fleet(1.0, 1.0), *here])
    assert found.power is not None
    assert found.power.median == 1200.0
    bare = [row for row in fleet(1.0, 1.0) if "gpu_" not in row.name]
    unknown = steady_of([*bare, *here])
    assert unknown.joules_per_token is None


def test_a_gpu_that_several_engines_name_counts_once() -> None:
    """As instances of it, or together."""

    def named(row: Row, uuid: str) -> Row:
        labels = labels_text({"gpu": f"0.{row.source[1:]}", "uuid": uuid})
        return Row(row.t, row.source, row.name, labels, row.value) if "gpu_" in row.name else row

    shared = [named(row, "GPU-a") for row in fleet(1.0, 1.0)]
    apart = [named(row, f"GPU-{row.source}") for row in fleet(1.0, 1.0)]
    for rows, watts in ((shared, 600.0), (apart, 1200.0)):
        samples = Samples(points_of(rows), OF_WHOLE_GPUS)
        found = figures(samples, Phase("steady", T0 + 20, T0 + 50))
        assert found.power is not None
        assert found.power.median == watts
        assert found.power_limit == watts * 7 / 6
        assert found.joules_per_token == pytest.approx(watts / 2 / 5000, rel=0.05)


def test_gpus_of_exporters_are_found() -> None:
    """Of AMD's, with the prefix that it may have, and of DCGM's; both count utilisation to 100."""
    bare = [row for row in fleet(1.0) if "gpu_" not in row.name]
    for text in (
        'amd_gpu_package_power{gpu_id="0"} 748\namd_gpu_gfx_activity{gpu_id="0"} 90\n',
        'DCGM_FI_DEV_POWER_USAGE{gpu="0"} 748\nDCGM_FI_DEV_GPU_UTIL{gpu="0"} 90\n',
    ):
        rows = [row for s in range(60) for row in read(T0 + s, "exporter", text)]
        found = steady_of([*bare, *rows])
        assert found.power is not None
        assert found.power.median == 748.0
        assert found.utilization is not None
        assert found.utilization.median == 0.9
        assert found.joules_per_token == pytest.approx(748 / 4900, rel=0.05)


def test_a_replica_that_lags_is_named() -> None:
    found = steady_of(fleet(1.0, 0.4, 1.0))
    assert [round(one.output_rate or 0, -2) for one in found.replicas] == [4800, 1900, 4800]
    assert any("Imbalance: r2 makes" in said and "and r1 1," in said for said in walls(found))
    assert not any("Imbalance" in said for said in walls(steady_of(fleet(1.0, 0.8))))


def test_requests_that_wait_at_the_gateway_are_no_load_that_is_missing() -> None:
    rows = fleet(1.0)
    for s in range(60):
        labels = '{"service_class":"interactive"}'
        rows.append(Row(T0 + s, "gw", "millrace_gateway_requests_queued", labels, 7.0))
        for status, each in (("200", 9), ("503", 1)):
            name, labels = "millrace_gateway_requests_total", f'{{"status":"{status}"}}'
            rows.append(Row(T0 + s, "gw", name, labels, float(each * s)))
    found = steady_of(rows)
    assert found.gateway_errors == pytest.approx(0.1)
    assert any(said.startswith("The gateway: 7 requests wait there") for said in walls(found))


def test_histograms_with_other_buckets_are_added() -> None:
    rows = []
    for source, name, buckets in (
        ("a", "millrace:x_bucket", {"1.0": 50.0, "2.0": 100.0, "+Inf": 100.0}),
        ("b", "vllm:x_bucket", {"4.0": 100.0, "+Inf": 100.0}),
    ):
        for bound, count in buckets.items():
            rows += [Row(t, source, name, f'{{"le":"{bound}"}}', count * t) for t in (0.0, 1.0)]
    found = Samples(points_of(rows)).cumulative(0.0, 1.0, "millrace:x_bucket", "vllm:x_bucket")
    assert found == [(1.0, 75.0), (2.0, 150.0), (4.0, 200.0), (float("inf"), 200.0)]


def test_the_roof_is_above_what_can_be_reached() -> None:
    kinds = [Kind("a<b", "fp8", 1e14, 1e12), Kind("lookups", "", 0.0, 1e9)]
    picture = roofline(kinds, {"fp8": 2e15, "bf16": 1e15}, 4e12)
    assert picture.count("<polyline") == 2
    assert picture.count("<circle") == 1
    assert "a&lt;b" in picture
    point = re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)"', picture)
    assert point is not None
    corners = re.findall(r"([\d.]+),([\d.]+)", picture)
    assert all(float(point[2]) > min(float(y) for _, y in corners[n : n + 3]) for n in (0, 3))
    assert roofline(kinds, {}, None) == ""


def test_a_histogram_shows_the_buckets_that_matter() -> None:
    picture = bars(
        "t", [(0.1, 0.0), (0.5, 60.0), (2.0, 99.99), (8.0, 100.0), (float("inf"), 100.0)]
    )
    assert picture.count("<rect") == 2
    assert "up to 500 ms: 60.0%" in picture
    assert bars("t", [(1.0, 0.0)]) == bars("t", []) == ""


def test_figures_that_contradict_each_other_are_said() -> None:
    fine = steady()
    assert contradictions(fine) == []
    quiet = replace(fine, mfu=0.02, mbu=0.03)
    assert "another program uses them" in contradictions(quiet)[0]
    asleep = replace(fine, tensor_active=Spread(0.0, 0.01, 0.02), mfu=0.01)
    assert "DCGM calls the tensor pipes 1% active" in contradictions(asleep)[0]
    assert "which cannot be" in contradictions(replace(fine, mfu=1.3))[0]
    assert (
        "too much work is counted"
        in (contradictions(replace(fine, mfu=0.9, tensor_active=Spread(0.3, 0.4, 0.5)))[0])
    )
    assert (
        "other GPUs than those of the engines"
        in (contradictions(replace(fine, utilization=Spread(0.0, 0.05, 0.1)))[0])
    )


def test_the_report_has_phases_walls_and_the_roofline(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(made())
    store.flush()
    store.note(
        {
            "gpus": {"0": "NVIDIA H200"},
            "targets": {
                "a:1<b>": {
                    "kind": "engine",
                    "restarts": 2,
                    "clock_offset": 0.25,
                    "clock_error": 0.02,
                }
            },
        }
    )
    mark(tmp_path, T0 + 20, "run & measure")
    target, found = write_report(tmp_path)
    text = target.read_text()
    assert [f.phase.name for f in found] == ["before", "run & measure"]
    assert "run &amp; measure" in text
    assert "a:1&lt;b&gt; (engine, started again 2 times, clock +250 ms, within 20)" in text
    assert "1 x NVIDIA H200" in text
    assert text.count("<svg") == 5 + 2  # of the run; of the phase under load: times, the roofline
    assert re.search(r"<td>linear</td><td>fp8</td>.*<td>memory</td>", text)
    assert "<script" not in text
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", text)  # it needs nothing from elsewhere


def test_charts_keep_peaks_and_escape_names() -> None:
    t = np.arange(5000.0)
    values = np.zeros(5000)
    values[4321] = 7e3
    made_chart = chart("x", "W", [Line("<b>", t, values)], [Phase("a&b", 0, 10)])
    assert "a&amp;b" in made_chart
    assert "<title>&lt;b&gt;" in made_chart
    points = re.findall(r"([\d.]+),([\d.]+)", made_chart)
    assert len(points) <= 720
    assert min(float(y) for _, y in points) == 8.0
    assert chart("x", "", [Line("none", t[:0], t[:0])], []) == ""
    assert (short(12_345.0), short(1.5e15), short(0.25)) == ("12.3 k", "1.5 P", "0.25 ")
