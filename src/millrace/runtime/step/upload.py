"""Host integers onto the device without waiting for it.

On a GPU a copy from ordinary memory would wait for all work before it; from pinned memory it is
queued like a kernel. The caching host allocator keeps a pinned block until its copy has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A new tensor of `values` (numbers, nested or not) on `device`, in stream order."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    pinned = torch.tensor(values, dtype=dtype, pin_memory=True)
    return pinned.to(device, non_blocking=True)
