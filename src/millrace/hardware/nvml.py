"""This host's NVIDIA GPUs, read through NVML: names, memory, power, energy, clocks, utilisation.

A figure that a device does not have is left out of its sample. GB10 shares the host's memory and
reports no size: the host's own is used. Instances of a divided GPU (MIG) have memory of their own;
power and energy are those of the whole GPU. Nothing here keeps a process or waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.common.optional import probe

DRIVER = Path("/proc/driver/nvidia")  # exists where NVIDIA's driver is loaded
MEMINFO = Path("/proc/meminfo")
# Causes of lower clocks, bit by bit, as NVML has them.
THROTTLES = {0x4: "power", 0x8: "hardware", 0x20: "thermal", 0x40: "thermal", 0x80: "power_brake"}


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or one instance of a divided GPU. index: of the GPU; instance: -1 for a whole one.
    uuid: its own; gpu_uuid: of the whole GPU, whose power it reports. handle, parent: NVML's;
    parent: of the whole GPU."""

    index: int
    instance: int
    name: str
    uuid: str
    gpu_uuid: str
    handle: Any
    parent: Any

    @property
    def label(self) -> str:
        return str(self.index) if self.instance < 0 else f"{self.index}.{self.instance}"


class Nvml:
    """The GPUs that the driver shows. problem: why there are none, where there should be some; a
    host without a driver is no problem."""

    def __init__(self) -> None:
        self.devices: list[Device] = []
        self.problem = ""
        self._nvml: Any = None
        found, driver = probe("pynvml"), DRIVER.exists()
        if found.module is None:
            if driver or found.state == "broken":
                self.problem = f"{found.problem}; {found.remedy}"
            return
        self._nvml = found.module
        try:
            self._nvml.nvmlInit()
            self.devices = list(self._find())
        except Exception as error:  # no driver, or one that does not answer
            if driver:
                self.problem = f"{type(error).__name__}: {error}"

    def _find(self) -> Iterable[Device]:
        nvml = self._nvml
        for index in range(nvml.nvmlDeviceGetCount()):
            whole = nvml.nvmlDeviceGetHandleByIndex(index)
            parts = list(self._instances(whole))
            gpu_uuid = str(self._ask("nvmlDeviceGetUUID", whole) or "")
            for instance, handle in enumerate(parts) if parts else [(-1, whole)]:
                name = str(nvml.nvmlDeviceGetName(handle))
                uuid = str(self._ask("nvmlDeviceGetUUID", handle) or "")
                yield Device(index, instance, name, uuid, gpu_uuid, handle, whole)

    def _instances(self, handle: Any) -> Iterable[Any]:
        """The instances of a divided GPU; none of a whole one."""
        mode = self._ask("nvmlDeviceGetMigMode", handle)
        if not mode or not mode[0]:
            return
        for at in range(self._ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            instance = self._ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, at)
            if instance is not None:
                yield instance

    def _ask(self, what: str, *arguments: Any) -> Any:
        """An answer of the driver; None where the device, or an older library, has none."""
        with contextlib.suppress(Exception):
            return getattr(self._nvml, what)(*arguments)
        return None

    def sample(self, device: Device) -> dict[str, float]:
        """Figures of now: power_watts, power_limit_watts, energy_joules, utilization_ratio,
        memory_utilization_ratio, memory_used_bytes, memory_total_bytes, temperature_celsius,
        sm_clock_mhz, memory_clock_mhz, throttle (bits of THROTTLES)."""
        found: dict[str, float] = {}
        for name, read, scale in (
            ("power_watts", "nvmlDeviceGetPowerUsage", 1e-3),
            ("power_limit_watts", "nvmlDeviceGetEnforcedPowerLimit", 1e-3),
            ("energy_joules", "nvmlDeviceGetTotalEnergyConsumption", 1e-3),
            ("throttle", "nvmlDeviceGetCurrentClocksEventReasons", 1.0),
        ):
            value = self._ask(read, device.parent)
            if value is not None:
                found[name] = value * scale
        for name, read, argument in (
            ("temperature_celsius", "nvmlDeviceGetTemperature", 0),
            ("sm_clock_mhz", "nvmlDeviceGetClockInfo", 1),
            ("memory_clock_mhz", "nvmlDeviceGetClockInfo", 2),
        ):
            value = self._ask(read, device.parent, argument)
            if value is not None:
                found[name] = float(value)
        rates = self._ask("nvmlDeviceGetUtilizationRates", device.handle)
        if rates is not None:
            found["utilization_ratio"] = rates.gpu / 100
            found["memory_utilization_ratio"] = rates.memory / 100
        memory = self._ask("nvmlDeviceGetMemoryInfo", device.handle)
        if memory is not None:
            found["memory_used_bytes"] = float(memory.used)
            found["memory_total_bytes"] = float(memory.total)
        elif device.instance < 0:
            found |= shared_memory()
        return found

    def energy_joules(self) -> float | None:
        """Of all GPUs since the driver was loaded; None where one has no counter."""
        seen = {d.index: self.sample(d).get("energy_joules") for d in self.devices}
        known = [value for value in seen.values() if value is not None]
        return sum(known) if known and len(known) == len(seen) else None


def shared_memory(path: Path = MEMINFO) -> dict[str, float]:
    """The host's memory, for a GPU that shares it."""
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(":")
            found[name] = int(rest.split()[0]) * 1024.0
        return {
            "memory_used_bytes": found["MemTotal"] - found["MemAvailable"],
            "memory_total_bytes": found["MemTotal"],
        }
    return {}


def throttles(bits: float) -> list[str]:
    """What lowers the clocks, in words."""
    return sorted({name for bit, name in THROTTLES.items() if int(bits) & bit})
