"""The two GEMMs of experts in Triton: tiles of rows that have one expert each.

The first one makes both halves of an expert's channels in the same program, so that silu, the
product and the quantization are done on its sums. It reads tokens where they are; the second reads
the rows of the first. Weights are e4m3 with scales for blocks, or in the dtype of the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.gpu.moe.routing import Groups
from millrace.kernels.gpu.quantize import empty_quantized
from millrace.kernels.moe import ExpertWeights
from millrace.kernels.quantize import GROUP, Quantized


class TileConfig(NamedTuple):
    """channels, outputs: of a tile of the first GEMM and of the second. swap: the weight is the
    operand with many rows. stages: loads in flight of either."""

    rows: int
    channels: int
    outputs: int
    swap: bool
    warps: int
    stages: tuple[int, int]


@triton.jit
def _multiply(x, w, SWAP: tl.constexpr):
    """x [rows, K] with w [outputs, K]: [outputs, rows] if SWAP, else [rows, outputs]."""
    if SWAP:
        out = tl.dot(w, tl.trans(x), input_precision="tf32x3")
    else:
        out = tl.dot(x, tl.trans(w), input_precision="tf32x3")
    return out


@triton.jit
def _along(rows, columns, SWAP: tl.constexpr):
    """Factors of rows, times one number, as they meet what `_multiply` returns."""
    return (rows[None, :] if SWAP else rows[:, None]) * columns


@triton.jit(do_not_specialize=["sx_stride", "out_scale_stride"])
def _gate_up_kernel(
    x, sx, w, sw, out, out_scales, row_experts, row_pairs, K, channels, top_k, sx_stride,
    out_scale_stride, BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    SCALED: tl.constexpr, SWAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BC channels of silu(gate) * up for a tile of BT rows. SCALED: x and w have scales, and the
    result is quantized, for which BC is a group and BK a block."""
    tile = tl.program_id(1)
    expert = tl.load(row_experts + tile * BT).to(tl.int64)
    if expert < 0:
        return
    row = tile * BT + tl.arange(0, BT)
    live = tl.load(row_experts + row) >= 0
    token = tl.load(row_pairs + row, mask=live, other=0) // top_k
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    k = tl.arange(0, BK)
    x_at = x + token.to(tl.int64)[:, None] * K + k[None, :]
    gate_at = w + (expert * 2 * channels + channel % channels)[:, None] * K + k[None, :]
    up_at = gate_at + tl.cast(channels, tl.int64) * K
    blocks = tl.cdiv(K, BK)
    gate_scale = sw + (expert * 2 * channels // 128 + tl.program_id(0)) * blocks
    up_scale = gate_scale + channels // 128 * blocks
    gate = tl.zeros((BC, BT) if SWAP else (BT, BC), tl.float32)
    up = tl.zeros((BC, BT) if SWAP else (BT, BC), tl.float32)
    for step in tl.range(0, blocks, num_stages=STAGES):
        inside = (step * BK + k < K)[None, :]
        a = tl.load(x_at + step * BK, mask=inside & live[:, None], other=0.0)
        g = tl.load(gate_at + step * BK, mask=inside, other=0.0)
        u = tl.load(up_at + step * BK, mask=inside, other=0.0)
        if SCALED:
            scale = tl.load(sx + tl.cast(step, tl.int64) * sx_stride + token, mask=live, other=0.0)
            gate += _multiply(a, g, SWAP) * _along(scale, tl.load(gate_scale + step), SWAP)
            up += _multiply(a, u, SWAP) * _along(scale, tl.load(up_scale + step), SWAP)
        else:
            gate += _multiply(a, g, SWAP)
            up += _multiply(a, u, SWAP)
    made = gate / (1.0 + tl.exp(-gate)) * up
    if SWAP:
        made = tl.trans(made)
    if SCALED:
        scale = tl.maximum(tl.max(tl.abs(made), axis=1), 1e-10) / 448.0
        made = made / scale[:, None]
        at = tl.program_id(0).to(tl.int64) * out_scale_stride + row
        tl.store(out_scales + at, scale, mask=live)
    at = out + row.to(tl.int64)[:, None] * channels + channel[None, :]
    mask = live[:, None] & (channel < channels)[None, :]
    tl.store(at, made.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["sx_stride"])
def _down_kernel(
    x, sx, w, sw, out, row_experts, K, outputs, sx_stride,
    BT: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
    SWAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BO outputs for a tile of BT rows."""
    tile = tl.program_id(1)
    expert = tl.load(row_experts + tile * BT).to(tl.int64)
    if expert < 0:
        return
    row = tile * BT + tl.arange(0, BT)
    live = tl.load(row_experts + row) >= 0
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    k = tl.arange(0, BK)
    x_at = x + row.to(tl.int64)[:, None] * K + k[None, :]
    w_at = w + (expert * outputs + o % outputs)[:, None] * K + k[None, :]
    blocks = tl.cdiv(K, BK)
    w_scale = sw + (expert * outputs // 128 + tl.program_id(0) * BO // 128) * blocks
    acc = tl.zeros((BO, BT) if SWAP else (BT, BO), tl.float32)
    for step in tl.range(0, blocks, num_stages=STAGES):
        inside = (step * BK + k < K)[None, :]
        a = tl.load(x_at + step * BK, mask=inside & live[:, None], other=0.0)
        b = tl.load(w_at + step * BK, mask=inside, other=0.0)
        if SCALED:
            scale = tl.load(sx + tl.cast(step, tl.int64) * sx_stride + row, mask=live, other=0.0)
            acc += _multiply(a, b, SWAP) * _along(scale, tl.load(w_scale + step), SWAP)
        else:
            acc += _multiply(a, b, SWAP)
    if SWAP:
        acc = tl.trans(acc)
    at = out + row.to(tl.int64)[:, None] * outputs + o[None, :]
    mask = live[:, None] & (o < outputs)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=mask)


def gate_up(
    x: Tensor | Quantized, groups: Groups, weights: ExpertWeights, top_k: int, config: TileConfig
) -> Tensor | Quantized:
    """silu(gate) * up of each row, [P, I], quantized if x is; other rows hold anything."""
    values, w = (x.values if isinstance(x, Quantized) else x), weights.values
    inputs, channels, rows = values.shape[1], w.shape[1] // 2, len(groups.experts)
    out: Tensor | Quantized
    if isinstance(x, Quantized):
        out = empty_quantized(rows, channels, values.device)
        if values.dtype != torch.float8_e4m3fn:  # in Triton's interpreter, which has no e4m3
            out = Quantized(torch.empty_like(out.values, dtype=values.dtype), out.scales)
        parts = x.scales, weights.scales, out.values, out.scales
        strides = x.scales.stride(1), out.scales.stride(1)
        wide, deep = GROUP, GROUP
    else:
        out = torch.empty(rows, channels, dtype=values.dtype, device=values.device)
        parts, strides = (values, values, out, out), (0, 0)
        wide, deep = _fitting(config.channels, channels), _depth(inputs, values.dtype)
    sx, sw, made, scales = parts
    _gate_up_kernel[(triton.cdiv(channels, wide), groups.tiles)](
        values, sx, w, sw, made, scales, groups.experts, groups.pairs, inputs, channels, top_k,
        *strides, BT=groups.tile, BC=wide, BK=deep, SCALED=isinstance(x, Quantized),
        SWAP=config.swap, STAGES=config.stages[0], num_warps=config.warps,
    )  # fmt: skip
    return out


def down(
    x: Tensor | Quantized, groups: Groups, weights: ExpertWeights, dtype: torch.dtype,
    config: TileConfig,
) -> Tensor:  # fmt: skip
    """x, rows of `gate_up`, times the second weight of their experts: [P, H] in dtype."""
    values, w = (x.values if isinstance(x, Quantized) else x), weights.values
    (rows, inputs), outputs = values.shape, w.shape[1]
    out = torch.empty(rows, outputs, dtype=dtype, device=values.device)
    scaled = isinstance(x, Quantized)
    sx, sw = (x.scales, weights.scales) if isinstance(x, Quantized) else (values, values)
    wide = config.outputs if scaled else _fitting(config.outputs, outputs)
    _down_kernel[(triton.cdiv(outputs, wide), groups.tiles)](
        values, sx, w, sw, out, groups.experts, inputs, outputs,
        sx.stride(1) if scaled else 0, BT=groups.tile, BO=wide,
        BK=GROUP if scaled else _depth(inputs, values.dtype), SCALED=scaled, SWAP=config.swap,
        STAGES=config.stages[1], num_warps=config.warps,
    )  # fmt: skip
    return out


def _fitting(most: int, size: int) -> int:
    return min(most, max(16, 1 << (size - 1).bit_length()))


def _depth(inputs: int, dtype: torch.dtype) -> int:
    """Inputs of a step of plain weights."""
    return _fitting(64 if dtype == torch.bfloat16 else 32, inputs)
