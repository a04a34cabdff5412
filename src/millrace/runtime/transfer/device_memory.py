"""Memory of a GPU that other processes of this host read in place, by CUDA IPC.

PyTorch's allocator hands out parts of larger blocks, and CUDA shares whole ones. So the memory is
the driver's own, and tensors are views of it. A process that has opened it must close it before
whoever allocated it frees it; an engine that dies takes its memory along.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * HANDLE_BYTES),)


@dataclass(frozen=True, slots=True)
class _View:
    """What torch takes as a tensor of bytes, by the CUDA array interface."""

    pointer: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.pointer, False),
                "version": 3}  # fmt: skip


def allocate(size: int, device: torch.device) -> Tensor:
    """`size` bytes of a GPU, uint8. Raises OSError if there are none."""
    pointer = ctypes.c_uint64()
    _call(device, "cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
    return torch.as_tensor(_View(pointer.value, size), device=device)


def free(memory: Tensor) -> None:
    """Give back what `allocate` gave; nobody may use it any more."""
    _call(memory.device, "cuMemFree_v2", ctypes.c_uint64(memory.data_ptr()))


def handle_of(memory: Tensor) -> bytes:
    """By which other processes open memory of `allocate`."""
    handle = _Handle()
    pointer = ctypes.c_uint64(memory.data_ptr())
    _call(memory.device, "cuIpcGetMemHandle", ctypes.byref(handle), pointer)
    return ctypes.string_at(ctypes.addressof(handle), HANDLE_BYTES)


def open_handle(handle: bytes, size: int, device: torch.device) -> Tensor:
    """Another process's memory, uint8 [size]. Raises OSError if it cannot be opened."""
    given, pointer = _Handle.from_buffer_copy(handle), ctypes.c_uint64()
    _call(
        device, "cuIpcOpenMemHandle_v2", ctypes.byref(pointer), given,
        ctypes.c_uint(_LAZY_PEER_ACCESS),
    )  # fmt: skip
    return torch.as_tensor(_View(pointer.value, size), device=device)


def close_handle(memory: Tensor) -> None:
    """Undo `open_handle`."""
    _call(memory.device, "cuIpcCloseMemHandle", ctypes.c_uint64(memory.data_ptr()))


def _call(device: torch.device, name: str, *arguments: Any) -> None:
    """Call the driver in the context that torch uses; threads begin without one."""
    driver = ctypes.CDLL("libcuda.so.1")
    number, context = ctypes.c_int(), ctypes.c_void_p()
    index = device.index if device.index is not None else torch.cuda.current_device()
    _check(driver.cuDeviceGet(ctypes.byref(number), index), "cuDeviceGet")
    error = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
    _check(error, "cuDevicePrimaryCtxRetain")
    _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    _check(getattr(driver, name)(*arguments), name)


def _check(error: int, name: str) -> None:
    if error:
        raise OSError(f"{name}: CUDA error {error}")
