"""FP8 products of at most 32 tokens, by a CUDA kernel that is compiled at run time.

So few tokens cost what reading the weight costs. gemm_few.cu keeps a multiprocessor's share of the
memory bandwidth in flight in registers, and says how. A token's result does not depend on the
tokens beside it, bit for bit: not on their number, nor on what they hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from millrace.kernels.gpu import cuda_source
from millrace.kernels.quantize import GROUP, Quantized

MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Variant:
    """Constants of the kernel. warps: of a block, which share its rows and divide the channels;
    tiles: of 16 rows; depth: groups of 128 channels a warp has in flight; blocks: that a
    multiprocessor must have the registers for. Only warps changes the order of a sum."""

    warps: int
    tiles: int
    depth: int
    blocks: int


def few_matmul(
    x: Quantized, weight: Tensor, scale: Tensor, variant: Variant | None = None
) -> Tensor | None:
    """x @ weight^T in bfloat16; None where the kernel does not take these, or cannot be compiled.

    weight: e4m3 [out, in], both multiples of 128; scale: float32 [out / 128, in / 128].
    """
    values, scales = x
    tokens, (outputs, width) = len(values), weight.shape
    if not _takes(x, weight, scale):
        return None
    variant = variant or choose(tokens, outputs)
    kernel = _compiled(variant, token_tiles(tokens))
    if kernel is None:
        return None
    out = torch.empty(tokens, outputs, dtype=torch.bfloat16, device=weight.device)
    if tokens:
        kernel(
            grid=(outputs // (16 * variant.tiles), 1, 1), block=(32 * variant.warps, 1, 1),
            args=[values, scales, weight, scale, out, tokens, outputs, width, scales.stride(1),
                  scale.stride(0)],
        )  # fmt: skip
    return out


def choose(tokens: int, outputs: int) -> Variant:
    """The variant for this many tokens. Its warps depend on the weight alone."""
    del outputs
    return Variant(8, 1, 2, 3) if tokens <= 8 else Variant(8, 1, 2, 2)


def token_tiles(tokens: int) -> int:
    """Tiles of 8 tokens that the kernel is compiled for: 1, 2 or 4."""
    return 1 if tokens <= 8 else 2 if tokens <= 16 else 4


def source(variant: Variant, tiles: int) -> str:
    """The kernel `gemm_few` for so many tiles of tokens."""
    return cuda_source.read("gemm_few.cu", {**asdict(variant), "token_tiles": tiles})


def _takes(x: Quantized, weight: Tensor, scale: Tensor) -> bool:
    values, scales = x
    tokens, (outputs, width) = len(values), weight.shape
    in_order = values.is_contiguous() and weight.is_contiguous() and scale.stride(1) == 1
    aligned = values.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return (
        tokens <= MAX_TOKENS and outputs % GROUP == 0 and width % GROUP == 0 and in_order
        and aligned and (tokens == 1 or scales.stride(0) == 1) and scale.dtype == torch.float32
    )  # fmt: skip


@functools.cache
def _compiled(variant: Variant, tiles: int) -> Callable[..., None] | None:
    """None where there is no compiler, or no conversion of e4m3 in hardware."""
    if torch.cuda.get_device_capability() < (8, 9):
        return None
    return cuda_source.compiled(source(variant, tiles), "gemm_few")
