"""Figures of this host: processors, memory, pressure, network and InfiniBand ports, GPUs.

NVIDIA's GPUs are read through NVML, AMD's through the files of their driver, where AMD SMI reads
them too. What a host does not have is left out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from millrace.hardware.nvml import Nvml, shared_memory
from millrace.observe.samples.sample import Row, rows_of

SOURCE = "host"
_WORD = 4  # bytes that InfiniBand counts data in


class Host:
    """Reads everything once a call. root: where /proc and /sys are. nvml: the GPUs."""

    def __init__(self, root: Path = Path("/"), nvml: Nvml | None = None) -> None:
        self._root = root
        self._nvml = nvml if nvml is not None else Nvml()

    @property
    def problems(self) -> list[str]:
        return [f"GPUs are left out: {self._nvml.problem}"] if self._nvml.problem else []

    def gpus(self) -> dict[str, str]:
        """Names of the GPUs by their numbers."""
        found = {device.label: device.name for device in self._nvml.devices}
        return found | {f"amd{n}": "AMD GPU" for n, _ in enumerate(self._amd_devices())}

    def read(self, t: float) -> list[Row]:
        return [
            *rows_of(t, SOURCE, self._processors()),
            *rows_of(t, SOURCE, shared_memory(self._root / "proc/meminfo")),
            *self._pressure(t),
            *self._network(t),
            *self._nvidia(t),
            *self._amd(t),
        ]

    def _processors(self) -> dict[str, float]:
        """cpu_busy_seconds, cpu_total_seconds: counters over all cores; load1."""
        found: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError, IndexError):
            times = [
                int(x) for x in (self._root / "proc/stat").read_text().split("\n")[0].split()[1:]
            ]
            tick = os.sysconf("SC_CLK_TCK")
            idle = times[3] + times[4]
            found["cpu_busy_seconds"] = (sum(times[:8]) - idle) / tick
            found["cpu_total_seconds"] = sum(times[:8]) / tick
        with contextlib.suppress(OSError, ValueError):
            found["load1"] = float((self._root / "proc/loadavg").read_text().split()[0])
        return found

    def _pressure(self, t: float) -> Iterator[Row]:
        """Microseconds in which some task waited for a resource."""
        for what in ("cpu", "memory", "io"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                line = (self._root / f"proc/pressure/{what}").read_text().split("\n")[0]
                total = float(line.rpartition("total=")[2])
                yield from rows_of(t, SOURCE, {"pressure_us": total}, resource=what)

    def _network(self, t: float) -> Iterator[Row]:
        with contextlib.suppress(OSError):
            for line in (self._root / "proc/net/dev").read_text().splitlines()[2:]:
                name, _, rest = line.partition(":")
                numbers = rest.split()
                if len(numbers) >= 9:
                    figures = {"net_receive_bytes": float(numbers[0]),
                               "net_transmit_bytes": float(numbers[8])}  # fmt: skip
                    yield from rows_of(t, SOURCE, figures, device=name.strip())
        for port in sorted((self._root / "sys/class/infiniband").glob("*/ports/*/counters")):
            figures = {}
            for name, file in (("net_receive_bytes", "port_rcv_data"),
                               ("net_transmit_bytes", "port_xmit_data")):  # fmt: skip
                with contextlib.suppress(OSError, ValueError):
                    figures[name] = _WORD * float((port / file).read_text())
            device = f"{port.parents[2].name}/{port.parent.name}"
            yield from rows_of(t, SOURCE, figures, device=device)

    def _nvidia(self, t: float) -> Iterator[Row]:
        for device in self._nvml.devices:
            figures = {f"gpu_{name}": v for name, v in self._nvml.sample(device).items()}
            yield from rows_of(t, SOURCE, figures, gpu=device.label, uuid=device.gpu_uuid)

    def _amd_devices(self) -> list[Path]:
        cards = (self._root / "sys/class/drm").glob("card*/device/mem_info_vram_total")
        return sorted(path.parent for path in cards)

    def _amd(self, t: float) -> Iterator[Row]:
        for number, card in enumerate(self._amd_devices()):
            figures = {}
            for name, pattern, scale in (
                ("gpu_utilization_ratio", "gpu_busy_percent", 0.01),
                ("gpu_memory_utilization_ratio", "mem_busy_percent", 0.01),
                ("gpu_memory_used_bytes", "mem_info_vram_used", 1.0),
                ("gpu_memory_total_bytes", "mem_info_vram_total", 1.0),
                ("gpu_power_watts", "hwmon/hwmon*/power1_average", 1e-6),
                ("gpu_power_limit_watts", "hwmon/hwmon*/power1_cap", 1e-6),
                ("gpu_temperature_celsius", "hwmon/hwmon*/temp1_input", 1e-3),
            ):
                for path in sorted(card.glob(pattern))[:1]:
                    with contextlib.suppress(OSError, ValueError):
                        figures[name] = float(path.read_text()) * scale
            yield from rows_of(t, SOURCE, figures, gpu=f"amd{number}")
