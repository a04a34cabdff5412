"""CUDA sources beside this module, compiled at run time by PyTorch's bundled compiler.

A source takes its constants by name; each set of them is another kernel. Callers keep what they
were given, so that nothing is compiled twice. PyTorch launches them, which takes the host 170 us;
with DIRECT_LAUNCHES, and where a launch may be early, the driver is called from here.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DIRECT_LAUNCHES = True  # `benchmarks/early_launch_h200.py` compares
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_..., of the driver's interface
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...
CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_...
BYTES, FLOAT16, FLOAT32, BFLOAT16 = 0, 6, 7, 9  # CU_TENSOR_MAP_..., as what follows
SWIZZLES = {0: 0, 16: 0, 32: 1, 64: 2, 128: 3}
L2_PROMOTION_256B = 3


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


class TensorMap:
    """Boxes of a matrix in GPU memory, for a kernel that has them fetched: CUtensorMap."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(128 + 64)
        first = ctypes.addressof(self._memory)
        self.address = first + -first % 64  # where the driver wants it

    @classmethod
    def of(
        cls, address: int, kind: int, shape: tuple[int, int], stride: int, box: tuple[int, int],
        swizzle: int,
    ) -> TensorMap:  # fmt: skip
        """kind: BYTES, FLOAT16, FLOAT32 or BFLOAT16. shape, box: rows and elements of one. stride:
        bytes from row to row, a multiple of 16. swizzle: bytes of the pattern in shared memory, 128
        to 16, which is none, as 0. What lies outside is read as zeros."""
        found = cls()
        (height, width), (rows, elements) = shape, box
        failed = cuda_driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(found.address), kind, 2, ctypes.c_void_p(address),
            (ctypes.c_uint64 * 2)(width, height), (ctypes.c_uint64 * 1)(stride),
            (ctypes.c_uint32 * 2)(elements, rows), (ctypes.c_uint32 * 2)(1, 1),
            0, SWIZZLES[swizzle], L2_PROMOTION_256B, 0,
        )  # fmt: skip
        if failed:
            raise RuntimeError(f"a tensor map could not be made: CUDA driver error {failed}")
        return found


def _attributes(early: bool, cluster: int) -> list[_Attribute]:
    found = []
    if early:
        found.append(_Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1)))
    if cluster > 1:
        found.append(_Attribute(CLUSTER_DIMENSION, 0, (ctypes.c_int * 16)(cluster, 1, 1)))
    return found


class CudaKernel:
    """A compiled kernel. by_torch: PyTorch's object, which owns the code."""

    def __init__(self, by_torch: Any) -> None:
        self._by_torch = by_torch

    @classmethod
    def load(cls, cubin: bytes, shared_bytes: int) -> CudaKernel:
        """The only kernel of a cubin, whose blocks may have so much shared memory beside what they
        declare. Raises RuntimeError."""
        name = re.search(rb"\.text\.(_Z\w+)", cubin)
        if name is None:
            raise RuntimeError("there is no kernel in a cubin")
        driver, found = (
            cuda_driver(),
            SimpleNamespace(module=ctypes.c_void_p(), func=ctypes.c_void_p()),
        )
        failed = driver.cuModuleLoadData(ctypes.byref(found.module), cubin)
        failed = failed or driver.cuModuleGetFunction(
            ctypes.byref(found.func), found.module, name[1]
        )
        failed = failed or driver.cuFuncSetAttribute(
            found.func, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
        )
        if failed:
            raise RuntimeError(f"a kernel could not be loaded: CUDA driver error {failed}")
        return cls(found)

    def allow(self, shared_bytes: int) -> None:
        """Blocks may have so much shared memory beside what they declare. Raises RuntimeError."""
        failed = cuda_driver().cuFuncSetAttribute(
            self._by_torch.func, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
        )
        if failed:
            raise RuntimeError(f"{shared_bytes} bytes of shared memory: CUDA driver error {failed}")

    def __call__(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Tensor | int | TensorMap],
        early: bool = False,
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:
        """Launch it on the current stream. args: tensors, as pointers, ints of 32 bits, and tensor
        maps. early: it may be launched before the kernel in front has ended, and waits for that by
        itself. shared_bytes: of memory that a block has beside what it declares. cluster: blocks
        that run beside each other."""
        if early or shared_bytes or cluster > 1 or DIRECT_LAUNCHES:
            self._launch(grid, block, args, early, shared_bytes, cluster)
        else:
            self._by_torch(grid=grid, block=block, args=args)

    def _launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Tensor | int | TensorMap],
        early: bool,
        shared_bytes: int,
        cluster: int,
    ) -> None:
        count = len(args)
        # A parameter is read from the front of its 8 bytes, whichever its size; a map lies apart.
        values = (ctypes.c_int64 * count)(
            *(
                arg.data_ptr() if isinstance(arg, Tensor) else arg if isinstance(arg, int) else 0
                for arg in args
            )
        )
        first = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * count)(
            *(
                arg.address if isinstance(arg, TensorMap) else first + 8 * i
                for i, arg in enumerate(args)
            )
        )
        stream = torch.cuda.current_stream().cuda_stream
        given = _attributes(early, cluster)
        attributes = (_Attribute * max(1, len(given)))(*given)
        config = _Config(grid, block, shared_bytes, stream, attributes, len(given))
        failed = cuda_driver().cuLaunchKernelEx(
            ctypes.byref(config), self._by_torch.func, pointers, None
        )
        if failed:
            raise RuntimeError(f"a kernel could not be launched: CUDA driver error {failed}")


def read(constants: Mapping[str, int], *files: str) -> str:
    """A source: constants, whose names it writes in capitals, then `common.cuh`, then `files`."""
    head = "".join(f"#define {name.upper()} {int(value)}\n" for name, value in constants.items())
    folder = resources.files(__package__)
    return head + "".join(folder.joinpath(file).read_text() for file in ("common.cuh", *files))


def compiled(
    text: str, name: str, architecture: str | None = None, shared_bytes: int = 0
) -> CudaKernel | None:
    """The kernel `name` of a source; None, and a warning, where this machine cannot compile it.

    architecture: such as "90a"; None: the device's. shared_bytes: that launches may ask for.
    """
    compiler = getattr(torch.cuda, "_compile_kernel", None)
    if compiler is None:
        _warn(name, f"PyTorch {torch.__version__} has no torch.cuda._compile_kernel")
        return None
    try:
        options = {"compute_capability": architecture} if architecture else {}
        kernel = CudaKernel(compiler(text, name, **options))
        if shared_bytes:
            kernel.allow(shared_bytes)
        return kernel
    except (RuntimeError, OSError) as error:  # no compiler library on this machine
        _warn(name, error)
        return None


@functools.cache
def cuda_driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _warn(name: str, why: object) -> None:
    logger.warning("the kernel %s cannot be compiled; a slower one runs: %s", name, why)
