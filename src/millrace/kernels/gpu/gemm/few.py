"""FP8 products of at most 8 tokens, by a CUDA kernel that is compiled at run time.

So few tokens cost what reading the weight costs. few.cu keeps a multiprocessor's share of the
memory bandwidth in flight in registers, and says how. A token's result does not depend on the
tokens beside it, bit for bit: not on their number, nor on what they hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.dispatch import remembered
from millrace.kernels.gpu import cuda_source
from millrace.kernels.gpu.cuda_source import CudaKernel
from millrace.kernels.gpu.device import gpu
from millrace.kernels.gpu.quantize import chains_launches
from millrace.kernels.quantize import GROUP, Quantized

MAX_TOKENS = 8
ROWS = 16  # of the weight, a block
WARPS = 8  # a block; their number is part of the order of a sum


def few_matmul(x: Quantized, weight: Tensor, scale: Tensor) -> Tensor | None:
    """x @ weight^T in bfloat16; None where the kernel does not take these, or cannot be compiled.

    weight: e4m3 [out, in], both multiples of 128; scale: float32 [out / 128, in / 128].
    """
    kernel = _compiled() if takes(x, weight, scale) else None
    if kernel is None:
        return None
    values, scales = x
    tokens, (outputs, width) = len(values), weight.shape
    out = torch.empty(tokens, outputs, dtype=torch.bfloat16, device=weight.device)
    if tokens:
        kernel(
            grid=(outputs // ROWS, 1, 1), block=(32 * WARPS, 1, 1),
            args=[values, scales, weight, scale, out, tokens, outputs, width, scales.stride(1),
                  scale.stride(0)], early=chains_launches(),
        )  # fmt: skip
    return out


def is_compiled() -> bool:
    """Whether this machine has the kernel; it is compiled now."""
    return _compiled() is not None


def source() -> str:
    """The kernel `gemm_few`."""
    return cuda_source.read({"warps": WARPS}, "gemm/stream.cuh", "gemm/few.cu")


def takes(x: Quantized, weight: Tensor, scale: Tensor) -> bool:
    """Whether the kernel multiplies these; arguments as in `few_matmul`."""
    values, scales = x
    tokens, (outputs, width) = len(values), weight.shape
    in_order = values.is_contiguous() and weight.is_contiguous() and scale.stride(1) == 1
    aligned = values.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return (
        tokens <= MAX_TOKENS and outputs % GROUP == 0 and width % GROUP == 0 and in_order
        and aligned and (tokens == 1 or scales.stride(0) == 1) and scale.dtype == torch.float32
    )  # fmt: skip


@remembered
def _compiled() -> CudaKernel | None:
    """None where there is no compiler, or no conversion of e4m3 in hardware."""
    if gpu().capability < (8, 9):
        return None
    return cuda_source.compiled(source(), "gemm_few")
