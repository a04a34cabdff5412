"""Attention of decode rows over paged keys and values.

A program owns a row, a KV head and a part of the row's length; the query heads of the group and the
tokens of the row are one tile of queries, so keys and values are read once. Parts are joined by a
second kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import DecodeRows, KVCache
from millrace.kernels.dispatch import remembered
from millrace.kernels.gpu import tables
from millrace.kernels.gpu.attention.softmax import (
    LOG2_E,
    _attend_range,
    _attend_range_of_pairs,
    _operand,
)
from millrace.kernels.gpu.device import device_name

SECTION = "decode_attention"  # of the tables
MOST_PARTS = 64  # of a row's keys
LEAST_KEYS = 128  # of a part, where there is more than one
JOINED = 8  # parts that are joined at a time
# They may be slices, which begin anywhere; another kernel for those would be compiled.
ROW_ARRAYS = ["slots", "starts"]


@triton.jit(do_not_specialize=["PARTS"], do_not_specialize_on_alignment=ROW_ARRAYS)
def _decode_kernel(
    q, keys, values, block_table, slots, starts, out, part, part_ml, table_stride, scale,
    HEADS, KV_HEADS, PARTS, FIRST: tl.constexpr,
    N: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """SPLIT: there are PARTS, more than one. PAIRS: an e4m3 cache, whose values come as int16 pairs
    of channels."""
    kh = tl.program_id(0)
    row = tl.program_id(1)
    piece = tl.program_id(2)
    slot = tl.load(slots + row)
    if slot != 0:  # else the row is padding, and has no tokens
        start = tl.load(starts + row).to(tl.int32)
        m_index = tl.arange(0, M)
        token = m_index // GROUP
        head = kh * GROUP + m_index % GROUP
        d = tl.arange(0, DB)
        live_q = token < N
        q_at = (((row * N + token) * HEADS + head) * D).to(tl.int64)[:, None] + d[None, :]
        q_mask = live_q[:, None] & (d < D)[None, :]
        Q = _operand(tl.load(q + q_at, mask=q_mask, other=0.0), keys)
        length = start + N
        size = tl.cdiv(length, BN) * BN
        if SPLIT:
            size = tl.cdiv(tl.cdiv(length, PARTS), BN) * BN
        low = piece * size
        high = tl.minimum(low + size, length)
        table = block_table + slot * table_stride
        if PAIRS:
            m, mass, acc = _attend_range_of_pairs(
                Q, keys, values, table, low, high, start + 1, start + token, kh, scale, KV_HEADS,
                FIRST, PAGE, D, BN, STAGES,
            )  # fmt: skip
        else:
            m, mass, acc = _attend_range(
                Q, keys, values, table, low, high, start + 1, start + token, kh, scale, KV_HEADS,
                FIRST, PAGE, D, DB, BN, STAGES,
            )  # fmt: skip
        if not SPLIT:
            safe = tl.where(mass > 0, mass, 1.0)
            tl.store(out + q_at, (acc / safe[:, None]).to(out.dtype.element_ty), mask=q_mask)
        else:
            at = ((row * N + token) * HEADS + head) * PARTS + piece
            tl.store(part + at.to(tl.int64)[:, None] * D + d[None, :], acc, mask=q_mask)
            tl.store(part_ml + at * 2, m, mask=live_q)
            tl.store(part_ml + at * 2 + 1, mass, mask=live_q)


@triton.jit(do_not_specialize=["EACH", "PARTS"], do_not_specialize_on_alignment=["slots"])
def _join_kernel(
    part, part_ml, slots, out, EACH, PARTS, D: tl.constexpr, DB: tl.constexpr,
    MOST: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Join the parts of one token and query head, of which a row has EACH."""
    index = tl.program_id(0).to(tl.int64)
    if tl.load(slots + tl.program_id(0) // EACH) != 0:
        first = index * PARTS
        p, d = tl.arange(0, MOST), tl.arange(0, DB)
        live = p < PARTS
        m = tl.load(part_ml + (first + p) * 2, mask=live, other=-float("inf"))
        mass = tl.load(part_ml + (first + p) * 2 + 1, mask=live, other=0.0)
        top = tl.max(m, axis=0)
        top = tl.where(top == -float("inf"), 0.0, top)
        total = tl.sum(tl.exp2(m - top) * mass, axis=0)
        acc = tl.zeros((DB,), tl.float32)
        for base in range(0, PARTS, JOINED):
            some = base + tl.arange(0, JOINED)
            inside = some < PARTS
            at = part_ml + (first + some) * 2
            share = tl.exp2(tl.load(at, mask=inside, other=-float("inf")) - top)
            at = part + (first + some)[:, None] * D + d[None, :]
            x = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
            acc += tl.sum(share[:, None] * x, axis=0)
        total = tl.where(total > 0, total, 1.0)
        tl.store(out + index * D + d, (acc / total).to(out.dtype.element_ty), mask=d < D)


def attend_decode(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: DecodeRows, scale: float, first: int = 0,
    config: tuple[int, int, int, int] | None = None, pairs: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the reference; rows stand first in q, and results in out, which is as long as q.

    config: (block, parts, warps, stages); None: as `_decode_config` says. pairs: whether values are
    read as pairs of channels; None: where they can be.
    """
    count, n = rows.slots.shape[0], rows.width
    page, kv_heads, dim = cache.keys.shape[1:]
    heads = q.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if count == 0:
        return out
    pairs = _pairs(q, cache) if pairs is None else pairs
    parts = key_parts(count * kv_heads, rows.max_context)
    block, parts, warps, stages = config or _decode_config(shape_of(q, cache, n), parts, pairs)
    partial = count * n * heads * parts if parts > 1 else 0
    part = torch.empty(partial, dim, dtype=torch.float32, device=q.device)
    part_ml = torch.empty(partial, 2, dtype=torch.float32, device=q.device)
    group, wide = heads // kv_heads, triton.next_power_of_2(dim)
    values = cache.values.view(torch.int16) if pairs else cache.values
    _decode_kernel[(kv_heads, count, parts)](
        q.contiguous(), cache.keys, values, block_table, rows.slots, rows.starts, out, part,
        part_ml, block_table.stride(0), scale * LOG2_E, heads, kv_heads, parts, FIRST=first,
        N=n, GROUP=group,
        M=max(16, triton.next_power_of_2(n * group)), PAGE=page, D=dim, DB=wide, BN=block,
        SPLIT=parts > 1, STAGES=stages, PAIRS=pairs, num_warps=warps,
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(count * n * heads,)](
            part, part_ml, rows.slots, out, n * heads, parts, D=dim, DB=wide,
            MOST=triton.next_power_of_2(max(parts, MOST_PARTS)), JOINED=JOINED, num_warps=2,
        )  # fmt: skip
    return out


def _pairs(q: Tensor, cache: KVCache) -> bool:
    dim = cache.values.shape[-1]
    narrow = cache.values.dtype == torch.float8_e4m3fn and q.dtype == torch.bfloat16
    return narrow and dim == triton.next_power_of_2(dim)


class Blocks(NamedTuple):
    """keys: of a step of the kernel."""

    keys: int
    warps: int
    stages: int


def shape_of(q: Tensor, cache: KVCache, width: int) -> tuple[int, int, int, int]:
    """Query heads of a KV head, channels of a head, bytes of a cached number, tokens of a row."""
    kv_heads, dim = cache.keys.shape[2:]
    return q.shape[1] // kv_heads, dim, cache.keys.itemsize, width


def _decode_config(
    shape: tuple[int, int, int, int], parts: int, pairs: bool
) -> tuple[int, int, int, int]:
    """(block, parts, warps, stages)."""
    keys, warps, stages = blocks_for(shape, parts > 1, pairs)
    return keys, parts, warps, stages


@remembered
def blocks_for(shape: tuple[int, int, int, int], split: bool, pairs: bool) -> Blocks:
    """What measured fastest on this GPU, or else a rule. split: keys are cut into parts."""
    way = tables.find(SECTION, (*shape, int(split)), 1, device_name())
    return (
        block_rule(split, pairs)
        if way is None
        else Blocks._make(tables.numbers_of(way, Blocks._fields))
    )


def block_rule(split: bool, pairs: bool) -> Blocks:
    """What is taken where nothing was measured."""
    return Blocks(32, 2, 5) if pairs and not split else Blocks(64, 4, 3)


def key_parts(programs: int, max_context: int) -> int:
    """Parts that a row's keys are cut into: enough for every multiprocessor, none too short.

    programs: rows times KV heads, each a program for every part.
    """
    parts = 1
    while parts < MOST_PARTS and programs * parts < 1024 and max_context > LEAST_KEYS * parts:
        parts *= 2
    return parts


def contexts_of_kernels(longest: int) -> list[int]:
    """A context for each kernel that a decode row may need, of at most `longest`: whether its keys
    are cut into parts."""
    # A little less than the most, so that the rows of drafts, which go further, have no other.
    whole = LEAST_KEYS * 25 // 32
    return sorted({min(whole, longest), min(2 * whole, longest)})
