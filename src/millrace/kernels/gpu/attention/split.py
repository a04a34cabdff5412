"""Attention of few tokens behind a long context: their keys are cut into parts.

As for decode rows, a program owns a KV head's whole group of query heads, for a tile of tokens, and
one part of the row's keys; a second kernel joins the parts. How many parts there are depends on the
row's own lengths alone, so that a row's results do not depend on what runs beside it. Programs are
few and go through the tiles that the device finds, which mostly are none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import KVCache, PrefillRows
from millrace.kernels.gpu.attention.softmax import LOG2_E, _attend_range, _operand

SPLIT_TOKENS = tl.constexpr(256)  # of a row, at most
PART_KEYS = tl.constexpr(1024)  # of a part, until there are as many parts as there may be
MOST_PARTS = tl.constexpr(8)
MOST_TILES = 48  # at a time: 192 MiB of sums for 4 KV heads of 256
PROGRAMS = 132  # each holds most of a multiprocessor
JOINED = 16  # rows of a tile that are joined at a time


@triton.jit
def splits(start, count):
    """How many parts the keys of a row are cut into; 1: it is not for this module."""
    parts = tl.minimum(tl.cdiv(start + count, PART_KEYS), MOST_PARTS)
    return tl.where(count <= SPLIT_TOKENS, parts, 1)


def split_rows(rows: PrefillRows) -> Tensor:
    """bool [P]: the rows of which `splits` tells more than one part."""
    counts = rows.offsets.diff()
    found: Tensor = (counts <= SPLIT_TOKENS.value) & (rows.starts + counts > PART_KEYS.value)
    return found


def tiles_of(start: int, count: int, tokens: int) -> int:
    """How many tiles of so many tokens a row brings here."""
    split = count <= SPLIT_TOKENS.value and start + count > PART_KEYS.value
    return -(-count // tokens) if split else 0


@triton.jit
def _item(tiles, slots, starts, offsets, tile):
    """Of a tile: its row's slot, first token, count and start, and the tile's first token."""
    row = tl.load(tiles + tile)
    begin = tl.load(offsets + row)
    count = tl.load(offsets + row + 1) - begin
    return tl.load(slots + row), begin, count, tl.load(starts + row).to(tl.int32)


@triton.jit(do_not_specialize_on_alignment=["slots", "starts", "offsets"])
def _split_kernel(
    q, keys, values, block_table, slots, starts, offsets, tiles, part, part_ml, table_stride,
    q_stride, scale, KV_HEADS, FIRST: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
    M: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    live_tiles = tl.load(tiles + 2 * TILES)
    m_index = tl.arange(0, M)
    d = tl.arange(0, DB)
    for item in range(tl.program_id(0), live_tiles * KV_HEADS * PARTS, tl.num_programs(0)):
        kh = item % KV_HEADS
        piece = (item // KV_HEADS) % PARTS
        tile = item // (KV_HEADS * PARTS)
        slot, begin, count, start = _item(tiles, slots, starts, offsets, tile)
        parts = splits(start, count)
        if piece < parts:
            t0 = tl.load(tiles + TILES + tile) * TOKENS
            t = t0 + m_index // GROUP
            live = (m_index < TOKENS * GROUP) & (t < count)
            mask = live[:, None] & (d < D)[None, :]
            head = kh * GROUP + m_index % GROUP
            q_at = (begin + t).to(tl.int64) * q_stride + head * D
            Q = _operand(tl.load(q + q_at[:, None] + d[None, :], mask=mask, other=0.0), keys)
            length = start + count
            size = tl.cdiv(tl.cdiv(length, parts), BN) * BN
            low = piece * size
            high = tl.minimum(low + size, start + tl.minimum(t0 + TOKENS, count))
            m, mass, acc = _attend_range(
                Q, keys, values, block_table + slot * table_stride, low, high, start + t0 + 1,
                start + t, kh, scale, KV_HEADS, FIRST, PAGE, D, DB, BN, STAGES,
            )  # fmt: skip
            at = ((tile * KV_HEADS + kh) * PARTS + piece) * M + m_index
            tl.store(part + at.to(tl.int64)[:, None] * D + d[None, :], acc, mask=mask)
            tl.store(part_ml + at * 2, m, mask=live)
            tl.store(part_ml + at * 2 + 1, mass, mask=live)


@triton.jit(do_not_specialize_on_alignment=["slots", "starts", "offsets"])
def _join_split_kernel(
    part, part_ml, slots, starts, offsets, tiles, out, HEADS, KV_HEADS, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    live_tiles = tl.load(tiles + 2 * TILES)
    PIECES: tl.constexpr = M // JOINED
    d = tl.arange(0, DB)
    for item in range(tl.program_id(0), live_tiles * KV_HEADS * PIECES, tl.num_programs(0)):
        kh = (item // PIECES) % KV_HEADS
        tile = item // (KV_HEADS * PIECES)
        _, begin, count, start = _item(tiles, slots, starts, offsets, tile)
        parts = splits(start, count)
        m_index = (item % PIECES) * JOINED + tl.arange(0, JOINED)
        t = tl.load(tiles + TILES + tile) * TOKENS + m_index // GROUP
        live = (m_index < TOKENS * GROUP) & (t < count)
        mask = live[:, None] & (d < D)[None, :]
        base = (tile * KV_HEADS + kh) * PARTS * M + m_index
        top = tl.full((JOINED,), -float("inf"), tl.float32)
        for p in range(parts):
            top = tl.maximum(top, tl.load(part_ml + (base + p * M) * 2, mask=live, other=0.0))
        top = tl.where(top == -float("inf"), 0.0, top)
        total = tl.zeros((JOINED,), tl.float32)
        acc = tl.zeros((JOINED, DB), tl.float32)
        for p in range(parts):
            at = base + p * M
            share = tl.exp2(tl.load(part_ml + at * 2, mask=live, other=0.0) - top)
            total += share * tl.load(part_ml + at * 2 + 1, mask=live, other=0.0)
            x = tl.load(part + at.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
            acc += share[:, None] * x
        total = tl.where(total > 0, total, 1.0)
        head = kh * GROUP + m_index % GROUP
        to = ((begin + t).to(tl.int64) * HEADS + head) * D
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + to[:, None] + d[None, :], result, mask=mask)


def fits(lengths: list[tuple[int, int]], group: int, itemsize: int) -> bool:
    """Whether a batch whose lengths the host does not tell may have rows of these (start, count).

    group: query heads of a KV head; itemsize: of a query's numbers, bytes.
    """
    tokens = _config(group, itemsize)[0] // group
    return sum(tiles_of(start, count, tokens) for start, count in lengths) <= MOST_TILES


def _config(group: int, itemsize: int) -> tuple[int, int, int, int]:
    """(queries of a tile, block, warps, stages)."""
    queries, block, warps, stages = (128, 64, 8, 2) if itemsize == 2 else (32, 16, 4, 1)
    return max(queries, triton.next_power_of_2(group)), block, warps, stages


def attend(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: PrefillRows, scale: float, first: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Write to out what `attend_prefill` wants of the rows that `splits` sends here.

    Of a batch whose lengths the host does not know there may be MOST_TILES at most.
    """
    page, kv_heads, dim = cache.keys.shape[1:]
    group, wide = q.shape[1] // kv_heads, triton.next_power_of_2(dim)
    height, block, warps, stages = _config(group, q.itemsize)
    tokens = height // group
    shape = {"GROUP": group, "TOKENS": tokens, "M": height, "D": dim, "DB": wide}
    shape |= {"TILES": MOST_TILES, "PARTS": MOST_PARTS.value}
    sums = MOST_TILES * kv_heads * MOST_PARTS.value * height
    for launch in range(_launches(rows, tokens)):
        part = torch.empty(sums, dim, dtype=torch.float32, device=q.device)
        part_ml = torch.empty(sums, 2, dtype=torch.float32, device=q.device)
        tiles = _tiles(rows, tokens, launch)
        lengths = (rows.slots, rows.starts, rows.offsets, tiles)
        _split_kernel[(PROGRAMS,)](
            q, cache.keys, cache.values, block_table, *lengths, part, part_ml,
            block_table.stride(0), q.stride(0), scale * LOG2_E, kv_heads, FIRST=first, **shape,
            PAGE=page, BN=block, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        _join_split_kernel[(4 * PROGRAMS,)](
            part, part_ml, *lengths, out, q.shape[1], kv_heads, **shape, JOINED=JOINED,
            num_warps=4,
        )  # fmt: skip


def _launches(rows: PrefillRows, tokens: int) -> int:
    if rows.counts is None or rows.host_starts is None:
        return 1
    lengths = zip(rows.host_starts, rows.counts, strict=True)
    total = sum(tiles_of(start, count, tokens) for start, count in lengths)
    return -(-total // MOST_TILES)


def _tiles(rows: PrefillRows, tokens: int, launch: int) -> Tensor:
    """int32 [2 * MOST_TILES + 1]: each tile's row, then its number in the row, then how many there
    are."""
    return rows.kept(("split", tokens, launch), lambda: _find_tiles(rows, tokens, launch))


def _find_tiles(rows: PrefillRows, tokens: int, launch: int) -> Tensor:
    count = rows.offsets.shape[0] - 1
    tiles = torch.where(split_rows(rows), (rows.offsets.diff() + (tokens - 1)) // tokens, 0)
    ends = tiles.cumsum(0, dtype=torch.int32)
    first = launch * MOST_TILES
    number = torch.arange(first, first + MOST_TILES, dtype=torch.int32, device=ends.device)
    row = torch.searchsorted(ends, number, right=True, out_int32=True).clamp(max=count - 1)
    live = (ends[-1:] - first).clamp(0, MOST_TILES)
    return torch.cat([row, number - (ends - tiles)[row], live])
