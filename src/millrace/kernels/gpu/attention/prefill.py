"""Attention of prompts over paged keys and values.

A program owns a tile of one row's tokens and one query head, and all tiles of all heads of a group
read the same keys and values. Converting e4m3 ones each time would take longer than the products
do. So they are widened first, once, into rows of their own without pages; float16 holds each
exactly. Which rows, the device decides: those in front, as many as there is room for; `wide` has
the kernel for these, and the one here reads pages.

Few tokens behind a long context are few tiles, so those rows go to `split`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import KVCache, PrefillRows
from millrace.kernels.gpu.attention import hopper, split
from millrace.kernels.gpu.attention import wide as wide_attention
from millrace.kernels.gpu.attention.softmax import LOG2_E, _attend_range, _operand
from millrace.kernels.gpu.attention.split import split_rows, splits

# They may be slices, which begin anywhere; another kernel for those would be compiled in a step.
ROW_ARRAYS = ["slots", "starts", "offsets"]
WIDENED_MOST = 131072  # keys at a time: 512 MiB at 4 heads of 256, and no more than are cached
WIDENERS = 64  # programs that share a row
BOXES = True  # whether what is widened is fetched in boxes


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def _widen_kernel(
    keys, values, block_table, slots, starts, offsets, wide_at, wide_keys, wide_values,
    table_stride, width, PAGE: tl.constexpr, BN: tl.constexpr, STRIP: tl.constexpr,
    WIDENERS: tl.constexpr,
):  # fmt: skip
    """Every WIDENERS-th BN of a row's keys and values, from its context's start, out of pages."""
    row = tl.program_id(1)
    own = tl.load(wide_at + row)
    if own >= 0:
        start = tl.load(starts + row).to(tl.int32)
        limit = start + tl.load(offsets + row + 1) - tl.load(offsets + row)
        slot = tl.load(slots + row)
        for block in range(tl.program_id(0) * BN, limit, WIDENERS * BN):
            pos = block + tl.arange(0, BN)
            live = pos < limit
            page = tl.load(block_table + slot * table_stride + pos // PAGE, mask=live, other=0)
            source = (page.to(tl.int64) * PAGE + pos % PAGE) * width
            to = (own + pos).to(tl.int64) * width
            for c in range(0, width, STRIP):
                channel = c + tl.arange(0, STRIP)
                mask = live[:, None] & (channel < width)[None, :]
                at, there = source[:, None] + channel[None, :], to[:, None] + channel[None, :]
                k = tl.load(keys + at, mask=mask).to(tl.float16)
                v = tl.load(values + at, mask=mask).to(tl.float16)
                tl.store(wide_keys + there, k, mask=mask)
                tl.store(wide_values + there, v, mask=mask)


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS, do_not_specialize=["TILES"])
def _prefill_kernel(
    q, keys, values, wide_keys, wide_values, block_table, slots, starts, offsets, wide_at, tiles,
    out, table_stride, q_stride, TILES, scale, HEADS, KV_HEADS, FIRST: tl.constexpr,
    GROUP: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Rows whose keys are to be split are left to others, and those that are widened if PAGED.
    WIDE: rows may be widened."""
    head = tl.program_id(0)
    # The last tiles have the longest rows to read: they go first.
    number = TILES - 1 - tl.program_id(1)
    row = tl.load(tiles + number)
    begin = tl.load(offsets + tl.maximum(row, 0))
    count = tl.load(offsets + tl.maximum(row, 0) + 1) - begin
    start = tl.load(starts + tl.maximum(row, 0)).to(tl.int32)
    mine = (row >= 0) & (splits(start, count) <= 1)
    if PAGED:
        mine = mine & (tl.load(wide_at + tl.maximum(row, 0)) < 0)
    if mine:
        tile = tl.load(tiles + TILES + number)
        slot = tl.load(slots + row)
        t = tile * M + tl.arange(0, M)
        d = tl.arange(0, DB)
        mask = (t < count)[:, None] & (d < D)[None, :]
        token = (begin + t).to(tl.int64)[:, None]
        q_at = q + token * q_stride + head * D + d[None, :]
        Q = _operand(tl.load(q_at, mask=mask, other=0.0), keys)
        high = start + tl.minimum((tile + 1) * M, count)
        whole = start + tile * M + 1
        table = block_table + slot * table_stride
        kh = head // GROUP
        own = tl.full((), -1, tl.int32)
        if WIDE:
            own = tl.load(wide_at + row)
        if own >= 0:
            apart = own.to(tl.int64) * KV_HEADS * D
            _, mass, acc = _attend_range(
                Q, wide_keys + apart, wide_values + apart, table, 0, high, whole, start + t, kh,
                scale, KV_HEADS, FIRST, 0, D, DB, BN, STAGES,
            )  # fmt: skip
        else:
            _, mass, acc = _attend_range(
                Q, keys, values, table, 0, high, whole, start + t, kh, scale, KV_HEADS, FIRST,
                PAGE, D, DB, BN, STAGES,
            )  # fmt: skip
        safe = tl.where(mass > 0, mass, 1.0)
        result = (acc / safe[:, None]).to(out.dtype.element_ty)
        tl.store(out + (token * HEADS + head) * D + d[None, :], result, mask=mask)


def attend_prefill(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: PrefillRows, scale: float, first: int = 0,
    config: tuple[int, int, int, int] | None = None, widen: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the reference; rows stand anywhere in q, and results in out, which is as long as q.

    config: (query tile, block, warps, stages). widen: whether an e4m3 cache is widened first; None:
    where a row's keys are not too many to hold.
    """
    q = q if q.stride(1) == q.shape[2] else q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    usual = (128, 64, 8, 2) if q.itemsize == 2 else (16, 16, 4, 1)
    tile, block, warps, stages = usual if BOXES or config is None else config
    narrow = cache.keys.dtype == torch.float8_e4m3fn
    widen = narrow if widen is None else widen
    page, kv_heads, dim = cache.keys.shape[1:]
    most = _most_widened(rows, cache)
    wide_at = _wide_at(rows, most) if widen else rows.offsets
    wide = _widened(cache, block_table, rows, wide_at, most) if widen else cache
    boxes = widen and BOXES and wide_attention.takes(q, wide)
    if boxes and hopper.takes(q, wide, rows, first, out):
        hopper.attend(q, wide, rows, wide_at, scale, out)
    elif boxes:
        wide_attention.attend(q, wide, rows, wide_at, scale, first, out, config)
    heads, tiles = q.shape[1], rows.tiles(tile, q.shape[0])
    _prefill_kernel[(heads, tiles.shape[1])](
        q, cache.keys, cache.values, wide.keys, wide.values, block_table, rows.slots, rows.starts,
        rows.offsets, wide_at, tiles, out, block_table.stride(0), q.stride(0), tiles.shape[1],
        scale * LOG2_E, heads, kv_heads, FIRST=first, GROUP=heads // kv_heads, M=tile, PAGE=page,
        D=dim, DB=triton.next_power_of_2(dim), BN=block, STAGES=stages, WIDE=widen and not boxes,
        PAGED=boxes, num_warps=warps,
    )  # fmt: skip
    split.attend(q, cache, block_table, rows, scale, first, out)
    return out


def _most_widened(rows: PrefillRows, cache: KVCache) -> int:
    """Keys that there is room for."""
    most = min(WIDENED_MOST, cache.keys.shape[0] * cache.keys.shape[1])
    if rows.counts is None or rows.host_starts is None:
        return most
    return min(sum(rows.counts) + sum(rows.host_starts), most)


def _wide_at(rows: PrefillRows, most: int) -> Tensor:
    """int32 [P]: where each row's keys begin among those that are widened, -1 for rows that are
    not: those that do not fit behind the ones before them."""
    return rows.kept("wide", lambda: _places_of_keys(rows, most))


def _places_of_keys(rows: PrefillRows, most: int) -> Tensor:
    counts = rows.offsets.diff()
    keys = rows.starts + counts
    wanted = (counts > 0) & (keys <= most) & ~split_rows(rows)
    keys = torch.where(wanted, keys, 0)
    ends = keys.cumsum(0)
    fits = wanted & (ends <= most)
    return torch.where(fits, ends - keys, -1).to(torch.int32)


def _widened(
    cache: KVCache, block_table: Tensor, rows: PrefillRows, wide_at: Tensor, most: int
) -> KVCache:
    """The rows' keys and values in float16, each [most, kv_heads, head_dim]."""
    page, kv_heads, dim = cache.keys.shape[1:]
    shape, device = (most, kv_heads, dim), block_table.device
    wide = KVCache(*(torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2)))
    _widen_kernel[(WIDENERS, rows.slots.shape[0])](
        cache.keys, cache.values, block_table, rows.slots, rows.starts, rows.offsets, wide_at,
        wide.keys, wide.values, block_table.stride(0), kv_heads * dim, PAGE=page, BN=16,
        STRIP=min(1024, triton.next_power_of_2(kv_heads * dim)), WIDENERS=WIDENERS, num_warps=4,
    )  # fmt: skip
    return wide
