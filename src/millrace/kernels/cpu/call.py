"""Calling the compiled functions with tensors: what they take, and how it is handed over."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from millrace.kernels.cpu.build import library

LANES = 16  # head sizes are multiples of it
KINDS = (torch.float32, torch.bfloat16)


def function(name: str) -> Callable[..., Any] | None:
    """A function of the library by its name without the prefix; None where there is none."""
    compiled = library()
    return None if compiled is None else getattr(compiled, f"millrace_{name}")


def at(x: Tensor | None) -> ctypes.c_void_p:
    """A tensor's memory."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def long(x: int) -> ctypes.c_int64:
    """An int64_t argument."""
    return ctypes.c_int64(x)


def real(x: float) -> ctypes.c_float:
    """A float argument."""
    return ctypes.c_float(x)


def is_bf16(x: Tensor) -> int:
    """The flag that tells a function of a tensor's dtype."""
    return int(x.dtype == torch.bfloat16)


def plain(*tensors: Tensor) -> bool:
    """Whether all are float32 or bfloat16 and lie in memory in the order of their indices."""
    return all(x.dtype in KINDS and x.is_contiguous() for x in tensors)


def row_wise(x: Tensor) -> bool:
    """Whether each row of a float32 or bfloat16 tensor is one piece, however far apart they lie."""
    if x.dtype not in KINDS or not x.shape[0]:
        return False
    return x[0].is_contiguous()


def threads() -> int:
    """How many threads a function may use."""
    return torch.get_num_threads()
