"""The GPU of this process, as far as the choice of a kernel depends on it."""

from __future__ import annotations

from typing import NamedTuple

import torch

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
