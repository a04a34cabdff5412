"""Large memory of the host that a GPU copies from and to without a wait.

PyTorch's own allocator of pinned memory rounds up to a power of two: 84 GiB would take 128. So the
memory is mapped here, in large pages where the kernel has them, and registered with the driver.
"""

from __future__ import annotations

import logging
import mmap
import time

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def pinned_memory(size: int, descriptor: int = -1) -> Tensor:
    """`size` bytes, uint8. If they cannot be pinned, a warning says so, and steps wait for copies.

    descriptor: of the file that they are, if other processes share them.
    """
    began = time.perf_counter()
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(descriptor, size, flags=private if descriptor < 0 else mmap.MAP_SHARED)
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        pages.madvise(advice)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    memory.zero_()  # by all threads: the driver would touch page after page
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
    if error:
        logger.warning(
            "host_cache_gb: %.2f GiB cannot be pinned (CUDA error %d), so copies are slow and stop "
            "the steps; give less", size / 2**30, error,
        )  # fmt: skip
    else:
        logger.info("%.2f GiB pinned in %.1f s", size / 2**30, time.perf_counter() - began)
    return memory


def unpin(memory: Tensor) -> None:
    """Undo the registration of `pinned_memory`."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
