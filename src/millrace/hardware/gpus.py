"""GPUs: memory, dense rates, bandwidth, links, power. The table is gpus.json, with its sources."""

from __future__ import annotations

import functools
from importlib import resources

import msgspec

from millrace.errors import ConfigError

TERA, GIGA = 1e12, 1e9


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One device. memory: bytes. bandwidth: GB/s. bf16 .. fp32: dense TFLOP/s; 0: no such unit.
    link_gb_s: to another GPU of the host, or to the next host where a host has one GPU; one
    direction. shared_memory: with the host, so that its programs take a part."""

    name: str
    title: str
    memory: int
    bandwidth: float
    bf16: float
    watts: float
    idle_watts: float
    link: str
    link_gb_s: float
    source: str
    fp8: float = 0.0
    fp4: float = 0.0
    fp32: float = 0.0
    nvlink: bool = False
    shared_memory: bool = False
    cpu: bool = False

    def rate(self, unit: str) -> float:
        """Dense FLOP/s of a unit; what a device has no unit for is widened to the next one."""
        rates = {"fp4": self.fp4, "fp8": self.fp8, "bf16": self.bf16}
        order = ("fp4", "fp8", "bf16")
        if unit == "fp32":
            return (self.fp32 or self.bf16 / 8) * TERA
        found = next(rates[name] for name in order[order.index(unit) :] if rates[name])
        return found * TERA

    @property
    def bytes_per_second(self) -> float:
        return self.bandwidth * GIGA


class _Table(msgspec.Struct, frozen=True):
    note: str
    date: str
    gpus: list[Gpu]


@functools.cache
def gpus() -> dict[str, Gpu]:
    """All devices by name."""
    text = resources.files("millrace.hardware").joinpath("gpus.json").read_bytes()
    return {gpu.name: gpu for gpu in msgspec.json.decode(text, type=_Table).gpus}


def gpu(name: str) -> Gpu:
    """A device by its name. Raises ConfigError with the names that there are."""
    found = gpus().get(name.lower().replace("_", "-"))
    if found is None:
        raise ConfigError(f"unknown GPU {name!r}; known are {', '.join(gpus())}")
    return found


def gpu_of_device(device_name: str) -> Gpu | None:
    """The row of a device by the name that its driver gives, such as "NVIDIA H100 80GB HBM3"; None
    where the table has none, or where several would do."""
    words = device_name.lower().replace("-", " ").replace("_", " ").split()
    if "a100" in words:
        return gpus()["a100-80" if "80gb" in words else "a100-40"]
    if "rtx" in words and "pro" in words and "6000" in words:
        return gpus()["rtx-pro-6000"]
    return next((found for name, found in gpus().items() if name in words), None)
