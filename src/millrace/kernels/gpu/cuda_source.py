"""CUDA sources beside this module, compiled at run time by PyTorch's bundled compiler.

A source takes its constants by name; each set of them is another kernel. Callers keep what they
were given, so that nothing is compiled twice. PyTorch launches them, which takes the host 170 us;
with DIRECT_LAUNCHES, and where a launch may be early, the driver is called from here.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DIRECT_LAUNCHES = False  # until a GPU has compared: `benchmarks/early_launch_h200.py`
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_..., of the driver's interface


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a union of 64 bytes, of which this one uses the first number."""

    _fields_ = (("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


_EARLY = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))


class CudaKernel:
    """A compiled kernel. by_torch: PyTorch's object, which owns the code."""

    def __init__(self, by_torch: Any) -> None:
        self._by_torch = by_torch

    def __call__(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Tensor | int],
        early: bool = False,
    ) -> None:
        """Launch it on the current stream. args: tensors, as pointers, and ints of 32 bits. early:
        it may be launched before the kernel in front has ended, and waits for that by itself."""
        if early or DIRECT_LAUNCHES:
            self._launch(grid, block, args, early)
        else:
            self._by_torch(grid=grid, block=block, args=args)

    def _launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Tensor | int],
        early: bool,
    ) -> None:
        count = len(args)
        # A parameter is read from the front of its 8 bytes, whichever its size.
        values = (ctypes.c_int64 * count)(
            *(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
        )
        first = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        stream = torch.cuda.current_stream().cuda_stream
        attributes = ctypes.pointer(_EARLY) if early else None
        config = _Config(grid, block, 0, stream, attributes, int(early))
        failed = _driver().cuLaunchKernelEx(
            ctypes.byref(config), self._by_torch.func, pointers, None
        )
        if failed:
            raise RuntimeError(f"a kernel could not be launched: CUDA driver error {failed}")


def read(file: str, constants: Mapping[str, int]) -> str:
    """The text of `file` after its constants, whose names it writes in capitals."""
    head = "".join(f"#define {name.upper()} {int(value)}\n" for name, value in constants.items())
    return head + resources.files(__package__).joinpath(file).read_text()


def compiled(text: str, name: str) -> CudaKernel | None:
    """The kernel `name` of a source; None, and a warning, where this machine cannot compile it."""
    compiler = getattr(torch.cuda, "_compile_kernel", None)
    if compiler is None:
        _warn(name, f"PyTorch {torch.__version__} has no torch.cuda._compile_kernel")
        return None
    try:
        return CudaKernel(compiler(text, name))
    except (RuntimeError, OSError) as error:  # no compiler library on this machine
        _warn(name, error)
        return None


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _warn(name: str, why: object) -> None:
    logger.warning("the kernel %s cannot be compiled; a slower one runs: %s", name, why)
