"""Products of at most 8 tokens with weights of 4 bits, by a CUDA kernel compiled at run time.

w4_few.cu says how. A token's result does not depend on the tokens beside it, but for the number of
tokens at which the form changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.dispatch import remembered
from millrace.kernels.gemm import W4
from millrace.kernels.gpu import cuda_source
from millrace.kernels.gpu.cuda_source import CudaKernel
from millrace.kernels.gpu.device import gpu
from millrace.kernels.gpu.quantize import chains_launches

MAX_TOKENS = 8
GROUP = 128  # channels of a scale: a multiple


class Form(NamedTuple):
    """Constants of w4_few.cu: warps of a block, tiles of 16 rows that it has, groups of a run, and
    blocks that a multiprocessor has room for."""

    warps: int
    tiles: int
    depth: int
    blocks: int


NARROW, WIDE = Form(8, 1, 1, 3), Form(8, 2, 1, 2)
SMALL, SMALL_WIDE, LONG = Form(4, 1, 1, 6), Form(4, 2, 1, 5), Form(16, 1, 1, 1)


def form_for(outputs: int, width: int, zeros: bool) -> Form:
    """By what an H200 took for the shapes of the 27B, without zeros: small blocks where there are
    many rows, all warps on a few rows where these are long. Zeros need registers that more blocks
    would have; there more rows a block leave two blocks for each multiprocessor."""
    if zeros:
        return WIDE if outputs % 32 == 0 and outputs >= 8192 else NARROW._replace(blocks=2)
    if outputs % 32 == 0 and outputs >= 24576:
        return SMALL_WIDE
    if outputs >= 8192:
        return SMALL
    return LONG if width >= 2 * outputs else NARROW


def w4_few(x: Tensor, weight: W4, form: Form | None = None) -> Tensor | None:
    """x @ weight^T, bfloat16; None where the kernel cannot be compiled, or does not take these."""
    if not takes(x, weight):
        return None
    tokens, (outputs, width) = len(x), weight.shape
    form = form or form_for(outputs, width, weight.zeros is not None)
    kernel = _compiled(form, weight.zeros is not None)
    if kernel is None:
        return None
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if tokens:
        zeros = weight.codes if weight.zeros is None else weight.zeros  # not read if there are none
        kernel(
            grid=(outputs // (16 * form.tiles), 1, 1), block=(32 * form.warps, 1, 1),
            args=[x, weight.codes, weight.scales, zeros, weight.factor, out, tokens, outputs, width,
                  weight.scales.shape[1]], early=chains_launches(),
        )  # fmt: skip
    return out


def takes(x: Tensor, weight: W4) -> bool:
    """Whether the kernel multiplies these."""
    outputs, width = weight.shape
    tensors = [x, *(part for part in weight[:4] if isinstance(part, Tensor))]
    return (
        len(x) <= MAX_TOKENS and x.dtype == torch.bfloat16 and not weight.floats
        and outputs % 16 == 0 and width % weight.group == 0 and weight.group % GROUP == 0
        and all(tensor.is_contiguous() for tensor in tensors)
        and x.data_ptr() % 16 == 0 and weight.codes.data_ptr() % 16 == 0
    )  # fmt: skip


def source(form: Form, zeros: bool) -> str:
    """The kernel `w4_few`."""
    return cuda_source.read(
        {**form._asdict(), "zeros": int(zeros)}, "gemm/stream.cuh", "gemm/w4_few.cu"
    )


def is_compiled() -> bool:
    """Whether this machine has the kernel; it is compiled now, without zeros."""
    return all(_compiled(form, False) is not None for form in (NARROW, WIDE))


@remembered
def _compiled(form: Form, zeros: bool) -> CudaKernel | None:
    """None where there is no compiler, or no bfloat16 in tensor cores."""
    if gpu().capability < (8, 0):
        return None
    return cuda_source.compiled(source(form, zeros), "w4_few")
