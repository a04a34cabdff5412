"""What drivers say of GPUs: whole ones, divided ones, and those that share the host's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.hardware.nvml import Nvml, shared_memory, throttles
from tests.support.observed.fake_nvml import fake_nvml

pytest.importorskip("pynvml")


def test_whole_gpus() -> None:
    with fake_nvml(count=2, energy=7_000_000):
        nvml = Nvml()
        assert [(d.label, d.name, d.uuid) for d in nvml.devices] == [
            ("0", "NVIDIA H200", "GPU-0"), ("1", "NVIDIA H200", "GPU-1"),
        ]  # fmt: skip
        assert nvml.sample(nvml.devices[1]) == {
            "power_watts": 500.0, "power_limit_watts": 700.0, "energy_joules": 7000.0,
            "throttle": 4.0, "temperature_celsius": 60.0, "sm_clock_mhz": 1980.0,
            "memory_clock_mhz": 3201.0, "utilization_ratio": 0.9, "memory_utilization_ratio": 0.4,
            "memory_used_bytes": 2e9, "memory_total_bytes": 150e9,
        }  # fmt: skip
        assert nvml.energy_joules() == 14_000.0
        assert throttles(4 + 0x40) == ["power", "thermal"]


def test_instances_have_memory_of_their_own_and_the_whole_gpus_power() -> None:
    with fake_nvml("mig"):
        nvml = Nvml()
        assert [d.label for d in nvml.devices] == ["0.0", "0.1"]
        samples = [nvml.sample(device) for device in nvml.devices]
        assert [s["memory_used_bytes"] for s in samples] == [1e9, 2e9]
        assert [s["power_watts"] for s in samples] == [500.0, 500.0]
        assert all("utilization_ratio" not in sample for sample in samples)
        assert nvml.energy_joules() == 1000.0  # once for the GPU, not for each instance


def test_a_gpu_without_memory_of_its_own_reports_the_hosts(tmp_path: Path) -> None:
    with fake_nvml("gb10"):
        nvml = Nvml()
        sample = nvml.sample(nvml.devices[0])
        total = shared_memory()["memory_total_bytes"]
        assert sample["memory_total_bytes"] == total
        assert 0 < sample["memory_used_bytes"] < total
        assert nvml.energy_joules() is None
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 40 kB\n")
    assert shared_memory(tmp_path / "meminfo") == {
        "memory_used_bytes": 60 * 1024.0, "memory_total_bytes": 100 * 1024.0,
    }  # fmt: skip
    assert shared_memory(tmp_path / "absent") == {}


def test_a_host_without_gpus_is_no_problem() -> None:
    with fake_nvml(count=0):
        nvml = Nvml()
        assert (nvml.devices, nvml.problem) == ([], "")
        assert nvml.energy_joules() is None
