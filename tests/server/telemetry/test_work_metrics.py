"""FLOPs, bytes, utilisation and energy on the metrics page."""

from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from millrace.hardware.gpus import gpu
from millrace.protocol import EngineStats, PartWork, WorkStats
from millrace.server.telemetry.devices import DeviceSampler
from millrace.server.telemetry.metrics import MetricsPage, RequestMetrics
from millrace.server.telemetry.work_metrics import Utilisation, WorkMetrics, peak_seconds
from tests.support.observed.fake_nvml import fake_nvml

WORK = WorkStats(
    4.0,
    {
        "linear": PartWork("fp8", 1979e12, 4.8e12, 0.0),
        "heads": PartWork("bf16", 989e12, 0.0, 2.4e12),
        "sums": PartWork("bf16", 0.0, 0.0, 0.0),
    },
)


def samples(page: MetricsPage) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name, values of the labels that are its own) -> value."""
    found = {}
    for family in text_string_to_metric_families(page.render().decode()):
        for one in family.samples:
            own = [v for k, v in one.labels.items() if k not in ("model_name", "engine")]
            found[one.name, tuple(own)] = one.value
    return found


def page_of(work: WorkStats | None, device: str = "", **more: object) -> MetricsPage:
    return MetricsPage(
        "m", RequestMetrics(), lambda: EngineStats(work=work),
        work=WorkMetrics(lambda: work, lambda: device, **more),
    )  # fmt: skip


def test_utilisation_is_against_the_dense_peak_of_each_dtype() -> None:
    assert peak_seconds(WORK.parts, gpu("h200")) == pytest.approx((2.0, 1.5))
    found = samples(page_of(WORK, "NVIDIA H200"))
    assert found["millrace:estimated_peak_compute_seconds_total", ()] == pytest.approx(2.0)
    assert found["millrace:estimated_peak_memory_seconds_total", ()] == pytest.approx(1.5)
    assert found["millrace:peak_flops_per_second", ("fp8",)] == 1979e12
    assert found["millrace:peak_flops_per_second", ("bf16",)] == 989e12
    assert found["millrace:estimated_flops_total", ("linear", "fp8")] == 1979e12
    assert found["millrace:estimated_read_bytes_total", ("linear",)] == 4.8e12
    assert found["millrace:estimated_write_bytes_total", ("heads",)] == 2.4e12
    assert ("millrace:estimated_flops_total", ("sums", "bf16")) not in found
    assert found["millrace:step_seconds_total", ()] == 4.0
    assert found["vllm:estimated_flops_per_gpu_total", ()] == 2968e12
    assert found["vllm:estimated_read_bytes_per_gpu_total", ()] == 4.8e12
    assert found["vllm:estimated_write_bytes_per_gpu_total", ()] == 2.4e12


def test_an_unknown_device_has_work_without_utilisation() -> None:
    names = {name for name, _ in samples(page_of(WORK, "NVIDIA T4"))}
    assert "vllm:estimated_flops_per_gpu_total" in names
    assert not {name for name in names if "mfu" in name or "peak" in name}
    assert not {name for name, _ in samples(page_of(None)) if "estimated" in name}


def test_shares_are_of_the_last_seconds() -> None:
    clock = [100.0]
    shares = Utilisation(now=lambda: clock[0]).shares
    assert shares(0.0, 0.0) == (0.0, 0.0)
    for second in range(1, 31):
        clock[0] += 1.0
        busy = min(second, 10)  # half the peak for 10 seconds, then nothing
        mfu, mbu = shares(0.5 * busy, 0.25 * busy)
        if second == 10:
            assert (mfu, mbu) == pytest.approx((0.5, 0.25))
    assert (mfu, mbu) == (0.0, 0.0)
    clock[0] += 1.0
    assert shares(0.0, 0.0) == (0.0, 0.0)  # another engine
    clock[0] += 1.0
    assert shares(0.5, 0.5) == pytest.approx((0.5, 0.5))


def test_prompt_tokens_are_counted_where_they_came_from() -> None:
    """Each once: the sources of all add up to the prompts, and those of cached ones to the hits."""
    stats = EngineStats(
        prompt_tokens=100, prefix_hits=60, host_hits=10, disk_hits=5, remote_hits=20
    )
    found = samples(MetricsPage("m", RequestMetrics(), lambda: stats))

    def by_source(name: str) -> dict[str, float]:
        return {own[0]: value for (one, own), value in found.items() if one == name}

    prompts = by_source("vllm:prompt_tokens_by_source_total")
    assert prompts == {"local_compute": 40, "local_cache_hit": 40, "external_kv_transfer": 20}
    cached = by_source("vllm:prompt_tokens_cached_by_source_total")
    assert cached == {"device": 25, "host": 10, "disk": 5, "p2p": 20}


def test_an_engine_that_does_not_run_is_down() -> None:
    page = MetricsPage("m", RequestMetrics(), EngineStats, up=lambda: False)
    assert samples(page)["millrace:engine_up", ()] == 0.0
    assert samples(MetricsPage("m", RequestMetrics(), EngineStats))["millrace:engine_up", ()] == 1.0


def test_gauges_have_no_names_of_counters() -> None:
    """Names that end in _total are counters; vLLM's histogram of tokens is the exception."""
    with_all = page_of(WORK, "NVIDIA H200", samples=lambda: {("0", ""): {"energy_joules": 5.0}})
    for family in text_string_to_metric_families(with_all.render().decode()):
        if family.type in ("gauge", "histogram") and family.name.startswith("millrace"):
            assert not family.name.endswith("_total"), family.name


def test_the_engines_gpus_are_sampled_by_a_thread() -> None:
    pytest.importorskip("pynvml")
    with fake_nvml(count=2, power=650_000, energy=9_000_000):
        sampler = DeviceSampler()
        sampler.start([])
        assert sampler.samples == {}
        sampler.start(["GPU-1"])
        limit = time.monotonic() + 60
        while not sampler.samples and time.monotonic() < limit:
            time.sleep(0.01)
        sampler.close()
    found = samples(page_of(None, samples=lambda: sampler.samples))
    assert found["millrace:gpu_power_watts", ("1", "GPU-1")] == 650.0
    assert found["millrace:gpu_energy_joules_total", ("1", "GPU-1")] == 9000.0
    assert ("millrace:gpu_power_watts", ("0", "GPU-0")) not in found


def test_an_instance_of_a_divided_gpu_is_found_by_the_name_that_cuda_has() -> None:
    pytest.importorskip("pynvml")
    with fake_nvml("mig", count=1):
        sampler = DeviceSampler()
        sampler.start(["GPU-1"])  # the driver says MIG-1
        limit = time.monotonic() + 60
        while not sampler.samples and not sampler.problem and time.monotonic() < limit:
            time.sleep(0.01)
        sampler.close()
    ((key, figures),) = sampler.samples.items()
    assert key == ("0.1", "GPU-0")  # and the UUID is that of the whole GPU, whose power it has
    assert figures["memory_used_bytes"] == 2e9
