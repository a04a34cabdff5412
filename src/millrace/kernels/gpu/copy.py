"""Rows copied between stacks of layers in one launch. See `millrace.kernels.copy`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.warmup import StepLimits, Warmup

BLOCK = 4096


@triton.jit(do_not_specialize_on_alignment=["to_rows", "rows"])
def _copy_kernel(
    to, to_rows, source, rows, to_layer, to_row, source_layer, source_row, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    layer = tl.program_id(2).to(tl.int64)
    there = to + layer * to_layer + tl.load(to_rows + tl.program_id(1)) * to_row
    here = source + layer * source_layer + tl.load(rows + tl.program_id(1)) * source_row
    tl.store(there + i, tl.load(here + i, mask=mask), mask=mask)


def copy_rows(to: Tensor, to_rows: Tensor, source: Tensor, rows: Tensor) -> None:
    """As the reference."""
    to_rows, rows = to_rows.contiguous(), rows.contiguous()
    width = min(to[0, 0].numel(), source[0, 0].numel()) if to.shape[0] else 0
    if width and rows.shape[0]:
        _copy_kernel[(triton.cdiv(width, BLOCK), rows.shape[0], to.shape[0])](
            to, to_rows, source, rows, to.stride(0), to.stride(1), source.stride(0),
            source.stride(1), width, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


def warmup(limits: StepLimits) -> Warmup:
    """Snapshots are copied by these kernels alone."""
    return Warmup(snapshots=True)
