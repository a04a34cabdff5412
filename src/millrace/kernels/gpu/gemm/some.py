"""FP8 products of 9 to 128 tokens, by a CUDA kernel for Hopper that is compiled at run time.

So many tokens still cost little more than reading the weight, but a tile of outputs to a
multiprocessor leaves some without one, and reads the tokens again for few rows of the weight.
some.cu gives every multiprocessor an equal share of the weight, and says how. It is compiled for
each of TOKENS; a token's result is the same in all of them, bit for bit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.dispatch import remembered
from millrace.kernels.gpu import cuda_source
from millrace.kernels.gpu.cuda_source import CudaKernel, TensorMap
from millrace.kernels.gpu.device import gpu
from millrace.kernels.gpu.gemm.few import MAX_TOKENS
from millrace.kernels.gpu.quantize import chains_launches
from millrace.kernels.quantize import GROUP, Quantized

TOKENS = (16, 32, 64, 128)  # that a kernel is compiled for
MOST_TOKENS = 0  # that `fp8_matmul` gives it: none until a GPU has compared
ROWS = 128  # of the weight, a tile
MULTIPLIERS = 256  # threads, beside a warp that fetches
SHARED_MEMORY = 227 * 1024  # bytes that a block may have


class Form(NamedTuple):
    """A kernel, how many tokens it takes, and the bytes of shared memory of a block."""

    kernel: CudaKernel
    tokens: int
    shared_bytes: int


def some_matmul(x: Quantized, weight: Tensor, scale: Tensor) -> Tensor | None:
    """x @ weight^T in bfloat16; None where the kernel does not take these, or cannot be compiled.

    weight: e4m3 [out, in], both multiples of 128; scale: float32 [out / 128, in / 128].
    """
    form = _compiled(size_for(len(x.values))) if takes(x, weight, scale) else None
    if form is None:
        return None
    values, scales = x
    tokens, (outputs, width) = len(values), weight.shape
    out = torch.empty(tokens, outputs, dtype=torch.bfloat16, device=weight.device)
    blocks = min(gpu().multiprocessors, outputs // ROWS * (width // GROUP))
    form.kernel(
        grid=(blocks, 1, 1), block=(MULTIPLIERS + 32, 1, 1),
        args=[_boxes(weight, ROWS), _boxes(values, form.tokens), scales, scale, out,
              *_left(weight.device), tokens, outputs, width, scales.stride(1),
              scale.stride(0)],
        early=chains_launches(), shared_bytes=form.shared_bytes,
    )  # fmt: skip
    return out


def is_compiled() -> bool:
    """Whether this machine has the kernels; they are compiled now, and what they share is made."""
    if not all(_compiled(tokens) for tokens in TOKENS):
        return False
    _left(torch.device("cuda", torch.cuda.current_device()))
    return True


def size_for(tokens: int) -> int:
    """The least of TOKENS that holds so many."""
    return next(size for size in TOKENS if size >= tokens)


def takes(x: Quantized, weight: Tensor, scale: Tensor) -> bool:
    """Whether the kernel multiplies these; arguments as in `some_matmul`."""
    values, scales = x
    tokens, (outputs, width) = len(values), weight.shape
    in_order = values.is_contiguous() and weight.is_contiguous() and scale.stride(1) == 1
    aligned = values.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return (
        MAX_TOKENS < tokens <= TOKENS[-1] and outputs % ROWS == 0 and width % GROUP == 0
        and in_order and aligned and scales.stride(0) == 1 and scale.dtype == torch.float32
    )  # fmt: skip


def stages(tokens: int) -> int:
    """How many there is room for."""
    one = (ROWS + tokens) * GROUP + 4 * (tokens + 4) + 16
    return (SHARED_MEMORY - 1024 - tokens * (ROWS + 8) * 2) // one


def shared_bytes(tokens: int) -> int:
    """Of a block, and what may be lost in front until an address is aligned as TMA wants it."""
    count = stages(tokens)
    one = (ROWS + tokens) * GROUP + 4 * (tokens + 4) + 16
    return count * one + tokens * (ROWS + 8) * 2 + 8


def source(tokens: int) -> str:
    """The kernel `gemm_some` for up to so many tokens."""
    constants = {"tokens": tokens, "stages": stages(tokens)}
    return _product(tokens) + cuda_source.read("gemm/some.cu", constants)


def _product(tokens: int) -> str:
    """wgmma(sums, a, b, add): the product of 64 rows and 32 channels, behind descriptors a and b of
    shared memory, added to the sums or put there."""
    count = tokens // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return f"""#ifndef EMULATED
__device__ __forceinline__ void wgmma(float* sums, unsigned long long a, unsigned long long b,
                                      int add) {{
  asm volatile("{{ .reg .pred add; setp.ne.b32 add, %{count + 2}, 0;"
               "wgmma.mma_async.sync.aligned.m64n{tokens}k32.f32.e4m3.e4m3 {{{registers}}},"
               "%{count}, %{count + 1}, add, 1, 1; }}"
               : {outputs}
               : "l"(a), "l"(b), "r"(add));
}}
#endif
"""


@remembered
def _compiled(tokens: int) -> Form | None:
    """None where there is no compiler, or no Hopper GPU."""
    if not gpu().is_hopper:
        return None
    size = shared_bytes(tokens)
    kernel = cuda_source.compiled(source(tokens), "gemm_some", "90a", size)
    return None if kernel is None else Form(kernel, tokens, size)


def _boxes(x: Tensor, rows: int) -> TensorMap:
    """Boxes of so many rows and a group of channels of an e4m3 matrix."""
    return _map(x.data_ptr(), *x.shape, rows)


@functools.lru_cache(4096)
def _map(address: int, height: int, width: int, rows: int) -> TensorMap:
    return TensorMap.of_bytes(address, (height, width), (rows, GROUP))


@remembered
def _left(device: torch.device) -> tuple[Tensor, Tensor]:
    """For what blocks leave to each other, and flags that are 0 between products: of which one
    runs at a time. Made before graphs are captured, else the zeros would be part of one."""
    blocks = gpu().multiprocessors
    sums = torch.empty(blocks, TOKENS[-1] // 2 * MULTIPLIERS, dtype=torch.float32, device=device)
    return sums, torch.zeros(blocks, dtype=torch.int32, device=device)
