"""Rows of tokens in the order of their experts, as DeepGEMM reads them, and silu between its GEMMs.

Rows without an expert are not touched: they hold whatever the memory held.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.gpu.moe.routing import Groups
from millrace.kernels.gpu.quantize import empty_quantized, quantize_groups
from millrace.kernels.quantize import GROUP, Quantized

ROWS = 8  # of a program that gathers
SILU_ROWS = 32  # of one behind the first GEMM


@triton.jit(do_not_specialize=["scale_stride", "out_stride"])
def _gather_kernel(
    values, scales, row_experts, row_pairs, out, out_scales, width, groups, top_k, scale_stride,
    out_stride, ROWS: tl.constexpr, WIDE: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """ROWS rows: the bytes of their tokens, and the scales of all groups."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = tl.load(row_experts + row) >= 0
    token = (tl.load(row_pairs + row, mask=live, other=0) // top_k).to(tl.int64)
    for start in range(0, width, WIDE):
        at = start + tl.arange(0, WIDE)
        mask = live[:, None] & (at < width)[None, :]
        some = tl.load(values + token[:, None] * width + at[None, :], mask=mask)
        tl.store(out + row.to(tl.int64)[:, None] * width + at[None, :], some, mask=mask)
    group = tl.arange(0, BG).to(tl.int64)
    mask = (group < groups)[:, None] & live[None, :]
    scale = tl.load(scales + group[:, None] * scale_stride + token[None, :], mask=mask)
    tl.store(out_scales + group[:, None] * out_stride + row[None, :], scale, mask=mask)


@triton.jit(do_not_specialize=["scale_stride"])
def _silu_rows_kernel(x, row_experts, out, scales, width, scale_stride, ROWS: tl.constexpr):
    """silu(gate) * up of a group of ROWS rows, of those that have an expert."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = tl.load(row_experts + row) >= 0
    group = tl.program_id(1)
    channel = group * 128 + tl.arange(0, 128)
    mask = live[:, None] & (channel < width)[None, :]
    at = x + row.to(tl.int64)[:, None] * 2 * width + channel[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    quantized, scale = quantize_groups(value)
    tl.store(out + row.to(tl.int64)[:, None] * width + channel[None, :], quantized, mask=mask)
    tl.store(scales + tl.cast(group, tl.int64) * scale_stride + row, scale, mask=live)


def gather(x: Quantized, groups: Groups, top_k: int) -> Quantized:
    """The row of each token, [P, H]."""
    rows, width = len(groups.experts), x.values.shape[1]
    out = empty_quantized(rows, width, x.values.device)
    as_bytes = [t.view(torch.uint8) for t in (x.values, out.values)]
    _gather_kernel[(rows // ROWS,)](
        as_bytes[0], x.scales, groups.experts, groups.pairs, as_bytes[1], out.scales, width,
        width // GROUP, top_k, x.scales.stride(1), out.scales.stride(1), ROWS=ROWS,
        WIDE=min(2048, triton.next_power_of_2(width)),
        BG=triton.next_power_of_2(width // GROUP), num_warps=4,
    )  # fmt: skip
    return out


def silu_mul_quantize_rows(x: Tensor, groups: Groups) -> Quantized:
    """silu(gate) * up of each row, quantized. x: [P, 2 I], gate first."""
    rows, width = len(x), x.shape[1] // 2
    out = empty_quantized(rows, width, x.device)
    _silu_rows_kernel[(rows // SILU_ROWS, triton.cdiv(width, GROUP))](
        x, groups.experts, out.values, out.scales, width, out.scales.stride(1), ROWS=SILU_ROWS,
        num_warps=4,
    )  # fmt: skip
    return out
