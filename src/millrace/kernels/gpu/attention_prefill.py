"""Attention of prompts over paged keys and values.

A program owns a tile of one row's tokens and one query head, and all tiles of all heads of a group
read the same keys and values. Converting e4m3 ones each time would take longer than the products
do. So they are widened first, once, into rows of their own without pages; float16 holds each
exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import KVCache, PrefillRows
from millrace.kernels.gpu.attention_softmax import LOG2_E, _attend_range, _operand

TILE = 128  # queries; with fewer a row there is too little to share
WIDENED_MOST = 32768  # keys, over all rows of a step: 128 MiB at 4 heads of 256
MANY = 256  # rows; up to so many are one kernel, for compiling another takes seconds of a step


@triton.jit
def _first_key(starts, offsets, row, ROWS: tl.constexpr):
    """Where a row's keys begin among those of all rows."""
    r = tl.arange(0, ROWS)
    before = r < row
    begin = tl.load(offsets + r, mask=before, other=0)
    end = tl.load(offsets + r + 1, mask=before, other=0)
    start = tl.load(starts + r, mask=before, other=0)
    return tl.sum(start + (end - begin).to(tl.int64), axis=0)


@triton.jit
def _widen_kernel(
    keys, values, block_table, slots, starts, offsets, wide_keys, wide_values, table_stride, width,
    ROWS: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """BN of a row's keys and values, from the start of its context, out of their pages."""
    row = tl.program_id(1)
    start = tl.load(starts + row).to(tl.int32)
    limit = start + tl.load(offsets + row + 1) - tl.load(offsets + row)
    pos = tl.program_id(0) * BN + tl.arange(0, BN)
    if tl.program_id(0) * BN < limit:
        slot = tl.load(slots + row)
        live = pos < limit
        page = tl.load(block_table + slot * table_stride + pos // PAGE, mask=live, other=0)
        source = (page.to(tl.int64) * PAGE + pos % PAGE) * width
        to = (_first_key(starts, offsets, row, ROWS) + pos) * width
        for c in range(0, width, STRIP):
            channel = c + tl.arange(0, STRIP)
            mask = live[:, None] & (channel < width)[None, :]
            at, there = source[:, None] + channel[None, :], to[:, None] + channel[None, :]
            tl.store(wide_keys + there, tl.load(keys + at, mask=mask).to(tl.float16), mask=mask)
            tl.store(wide_values + there, tl.load(values + at, mask=mask).to(tl.float16), mask=mask)


@triton.jit
def _prefill_kernel(
    q, keys, values, block_table, slots, starts, offsets, out, table_stride, q_stride, scale,
    HEADS, KV_HEADS, FIRST: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """PAGE of 0: keys and values lie row by row, as `_widen_kernel` leaves them."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    begin = tl.load(offsets + row)
    count = tl.load(offsets + row + 1) - begin
    # The last tiles have the longest rows to read: they go first.
    tile = tl.num_programs(2) - 1 - tl.program_id(2)
    if tile * M < count:
        slot = tl.load(slots + row)
        start = tl.load(starts + row).to(tl.int32)
        t = tile * M + tl.arange(0, M)
        d = tl.arange(0, DB)
        mask = (t < count)[:, None] & (d < D)[None, :]
        token = (begin + t).to(tl.int64)[:, None]
        q_at = q + token * q_stride + head * D + d[None, :]
        Q = _operand(tl.load(q_at, mask=mask, other=0.0), keys)
        high = start + tl.minimum((tile + 1) * M, count)
        if PAGE == 0:
            own = _first_key(starts, offsets, row, ROWS) * KV_HEADS * D
            keys += own
            values += own
        _, mass, acc = _attend_range(
            Q, keys, values, block_table + slot * table_stride, 0, high, start + tile * M + 1,
            start + t, head // GROUP, scale, KV_HEADS, FIRST, PAGE, D, DB, BN, STAGES,
        )  # fmt: skip
        safe = tl.where(mass > 0, mass, 1.0)
        result = (acc / safe[:, None]).to(out.dtype.element_ty)
        tl.store(out + (token * HEADS + head) * D + d[None, :], result, mask=mask)


def attend_prefill(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: PrefillRows, scale: float, first: int = 0,
    config: tuple[int, int, int, int] | None = None, widen: bool | None = None,
) -> Tensor:  # fmt: skip
    """As the reference. config: (query tile, block, warps, stages). widen: whether an e4m3 cache is
    widened first; None: where there is enough to share, and not too much to hold."""
    page, kv_heads, dim = cache.keys.shape[1:]
    heads = q.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile, block, warps, stages = config or ((128, 64, 8, 2) if q.itemsize == 2 else (16, 16, 4, 1))
    q = q if q.stride(1) == dim else q.contiguous()
    if _widens(cache, rows) if widen is None else widen:
        cache, page = _widened(cache, block_table, rows), 0
    _prefill_kernel[(heads, len(rows.counts), triton.cdiv(rows.max_count, tile))](
        q, cache.keys, cache.values, block_table, rows.slots, rows.starts, rows.offsets, out,
        block_table.stride(0), q.stride(0), scale * LOG2_E, heads, kv_heads, FIRST=first,
        ROWS=_most_rows(rows) if page == 0 else 1,
        GROUP=heads // kv_heads, M=tile, PAGE=page, D=dim, DB=triton.next_power_of_2(dim),
        BN=block, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


def _most_rows(rows: PrefillRows) -> int:
    most: int = max(MANY, triton.next_power_of_2(len(rows.counts)))
    return most


def _widens(cache: KVCache, rows: PrefillRows) -> bool:
    keys = sum(rows.counts) + sum(rows.host_starts)
    return (
        cache.keys.dtype == torch.float8_e4m3fn and rows.max_count >= TILE and keys <= WIDENED_MOST
    )


def _widened(cache: KVCache, block_table: Tensor, rows: PrefillRows) -> KVCache:
    """The rows' keys and values in float16, each [contexts of all rows, kv_heads, head_dim]."""
    page, kv_heads, dim = cache.keys.shape[1:]
    count, total = len(rows.counts), sum(rows.counts) + sum(rows.host_starts)
    wide = KVCache(
        *(
            torch.empty(total, kv_heads, dim, dtype=torch.float16, device=block_table.device)
            for _ in range(2)
        )
    )
    _widen_kernel[(triton.cdiv(rows.max_context, 16), count)](
        cache.keys, cache.values, block_table, rows.slots, rows.starts, rows.offsets, wide.keys,
        wide.values, block_table.stride(0), kv_heads * dim, ROWS=_most_rows(rows),
        PAGE=page, BN=16, STRIP=min(1024, triton.next_power_of_2(kv_heads * dim)), num_warps=4,
    )  # fmt: skip
    return wide
