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

ROWS = 8  # of a program


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
def _silu_rows_kernel(
    x, row_experts, out, scales, width, scale_stride, G: tl.constexpr, QUANTIZE: tl.constexpr
):
    """silu(gate) * up of G groups of a row that has an expert."""
    row = tl.program_id(0)
    if tl.load(row_experts + row) < 0:
        return
    group = tl.program_id(1) * G + tl.arange(0, G)
    channel = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = channel < width
    at = x + row.to(tl.int64) * 2 * width + channel
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    to = out + row.to(tl.int64) * width + channel
    if QUANTIZE:
        quantized, scale = quantize_groups(value)
        tl.store(to, quantized, mask=mask)
        at_scale = scales + group.to(tl.int64) * scale_stride + row
        tl.store(at_scale, scale, mask=group * 128 < width)
    else:
        tl.store(to, value.to(out.dtype.element_ty), mask=mask)


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
    per_program = min(8, triton.next_power_of_2(triton.cdiv(width, GROUP)))
    _silu_rows_kernel[(rows, triton.cdiv(width, GROUP * per_program))](
        x, groups.experts, out.values, out.scales, width, out.scales.stride(1), G=per_program,
        QUANTIZE=True, num_warps=4,
    )  # fmt: skip
    return out
