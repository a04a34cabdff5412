"""Memory of the host that other processes of this user can map: a file without a name.

Whoever gets its descriptor over a Unix socket reads it in place; nobody else can open it.
"""

from __future__ import annotations

import mmap
import os
import warnings

import torch
from torch import Tensor


def new_file(size: int) -> int:
    """The descriptor of a new file of `size` bytes in memory."""
    descriptor = os.memfd_create("millrace-records", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


def mapped(descriptor: int, size: int) -> mmap.mmap:
    """The file's memory, to read and write."""
    return mmap.mmap(descriptor, size)


def read_only(descriptor: int) -> int:
    """Another descriptor of the file, which cannot write to it."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def mapped_read_only(descriptor: int, size: int) -> Tensor:
    """Another process's memory as uint8 [size]; the descriptor may be closed then.

    Raises ValueError if the file is shorter.
    """
    if os.fstat(descriptor).st_size < size:
        raise ValueError(f"the other engine's memory has fewer than {size} bytes")
    pages = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nothing writes to this tensor
        return torch.frombuffer(pages, dtype=torch.uint8)
