"""The GPU of this process, as far as the choice of a kernel depends on it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from millrace.hardware.nvml import shared_memory
from millrace.kernels.dispatch import remembered


class Gpu(NamedTuple):
    """name: as `torch.cuda.get_device_name` tells it. multiprocessors: that this process has."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int

    @property
    def is_hopper(self) -> bool:
        return self.capability[0] == 9


@remembered
def gpu() -> Gpu:
    """The current device; asked once."""
    count = torch.cuda.get_device_properties().multi_processor_count
    return Gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), count)


def device_name() -> str:
    """Its name, which tables of measured choices go by; "" without a GPU, as in an interpreter."""
    return gpu().name if torch.cuda.is_available() else ""


@remembered
def is_unified() -> bool:
    """Whether the current device has no memory of its own, but shares the host's, as GB10 does."""
    return bool(getattr(torch.cuda.get_device_properties(), "is_integrated", False))


def memory() -> tuple[int, int]:
    """Bytes of the current device that are free, and all of them.

    Of unified memory the driver counts as used what the host's file cache holds, and would give up;
    so there the host's own figures are taken.
    """
    free, total = torch.cuda.mem_get_info()
    host = shared_memory() if is_unified() else {}
    if host:
        total = min(total, int(host["memory_total_bytes"]))
        free = min(total, int(host["memory_total_bytes"] - host["memory_used_bytes"]))
    return free, total
