"""Attention of prompts over paged keys and values.

A program owns a tile of one row's tokens and one query head, and all tiles of all heads of a group
read the same keys and values. Converting e4m3 ones each time would take longer than the products
do. So they are widened first, once, into rows of their own without pages; float16 holds each
exactly.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import KVCache, PrefillRows
from millrace.kernels.gpu.attention.softmax import LOG2_E, _attend_range, _operand

# They may be slices, which begin anywhere; another kernel for those would be compiled in a step.
ROW_ARRAYS = ["slots", "starts", "offsets"]
WIDENED_MOST = 32768  # keys at a time: 128 MiB at 4 heads of 256


@triton.jit
def _first_key(starts, offsets, row):
    """Where a row's keys begin among those of all rows."""
    keys = tl.zeros((), tl.int64)
    for some in range(0, row, 64):
        r = some + tl.arange(0, 64)
        before = r < row
        begin = tl.load(offsets + r, mask=before, other=0)
        end = tl.load(offsets + r + 1, mask=before, other=0)
        start = tl.load(starts + r, mask=before, other=0)
        keys += tl.sum(start + (end - begin).to(tl.int64), axis=0)
    return keys


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def _widen_kernel(
    keys, values, block_table, slots, starts, offsets, wide_keys, wide_values, table_stride, width,
    PAGE: tl.constexpr, BN: tl.constexpr, STRIP: tl.constexpr,
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
        to = (_first_key(starts, offsets, row) + pos) * width
        for c in range(0, width, STRIP):
            channel = c + tl.arange(0, STRIP)
            mask = live[:, None] & (channel < width)[None, :]
            at, there = source[:, None] + channel[None, :], to[:, None] + channel[None, :]
            tl.store(wide_keys + there, tl.load(keys + at, mask=mask).to(tl.float16), mask=mask)
            tl.store(wide_values + there, tl.load(values + at, mask=mask).to(tl.float16), mask=mask)


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def _prefill_kernel(
    q, keys, values, block_table, slots, starts, offsets, out, table_stride, q_stride, scale,
    HEADS, KV_HEADS, FIRST: tl.constexpr,
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
            own = _first_key(starts, offsets, row) * KV_HEADS * D
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
    widened first; None: where a row's keys are not too many to hold."""
    q = q if q.stride(1) == q.shape[2] else q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    config = config or ((128, 64, 8, 2) if q.itemsize == 2 else (16, 16, 4, 1))
    narrow = cache.keys.dtype == torch.float8_e4m3fn
    for some in _groups(rows) if narrow else [rows]:
        few = narrow and _keys(some) <= WIDENED_MOST
        if few if widen is None else widen:
            source, page = _widened(cache, block_table, some), 0
        else:
            source, page = cache, cache.keys.shape[1]
        _launch(q, source, page, block_table, some, scale, first, config, out)
    return out


def _launch(
    q: Tensor, cache: KVCache, page: int, block_table: Tensor, rows: PrefillRows, scale: float,
    first: int, config: tuple[int, int, int, int], out: Tensor,
) -> None:  # fmt: skip
    kv_heads, dim = cache.keys.shape[-2:]
    heads = q.shape[1]
    tile, block, warps, stages = config
    _prefill_kernel[(heads, len(rows.counts), triton.cdiv(rows.max_count, tile))](
        q, cache.keys, cache.values, block_table, rows.slots, rows.starts, rows.offsets, out,
        block_table.stride(0), q.stride(0), scale * LOG2_E, heads, kv_heads, FIRST=first,
        GROUP=heads // kv_heads, M=tile, PAGE=page, D=dim, DB=triton.next_power_of_2(dim),
        BN=block, STAGES=stages, num_warps=warps,
    )  # fmt: skip


def _keys(rows: PrefillRows) -> int:
    return sum(rows.counts) + sum(rows.host_starts)


def _groups(rows: PrefillRows) -> list[PrefillRows]:
    """The rows in order, as many at a time as may be widened; one with more keys stands alone."""
    cuts, keys = [0], 0
    for row, (count, start) in enumerate(zip(rows.counts, rows.host_starts, strict=True)):
        if row > cuts[-1] and keys + count + start > WIDENED_MOST:
            cuts.append(row)
            keys = 0
        keys += count + start
    if len(cuts) == 1:
        return [rows]  # nearly always, and every attention layer of a step asks
    return [
        PrefillRows(
            rows.slots[a:b], rows.starts[a:b], rows.offsets[a : b + 1],
            rows.counts[a:b], rows.host_starts[a:b],
        )
        for a, b in pairwise([*cuts, len(rows.counts)])
    ]  # fmt: skip


def _widened(cache: KVCache, block_table: Tensor, rows: PrefillRows) -> KVCache:
    """The rows' keys and values in float16, each [contexts of all rows, kv_heads, head_dim]."""
    page, kv_heads, dim = cache.keys.shape[1:]
    shape, device = (_keys(rows), kv_heads, dim), block_table.device
    wide = KVCache(*(torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2)))
    _widen_kernel[(triton.cdiv(rows.max_context, 16), len(rows.counts))](
        cache.keys, cache.values, block_table, rows.slots, rows.starts, rows.offsets, wide.keys,
        wide.values, block_table.stride(0), kv_heads * dim, PAGE=page, BN=16,
        STRIP=min(1024, triton.next_power_of_2(kv_heads * dim)), num_warps=4,
    )  # fmt: skip
    return wide
