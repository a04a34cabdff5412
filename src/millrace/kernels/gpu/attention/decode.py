"""Attention of decode rows over paged keys and values.

A program owns a row, a KV head and a part of the row's length; the query heads of the group and the
tokens of the row are one tile of queries, so keys and values are read once. Parts are joined by a
second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import DecodeRows, KVCache
from millrace.kernels.gpu.attention.softmax import (
    LOG2_E,
    _attend_range,
    _attend_range_of_pairs,
    _operand,
)

MOST_PARTS = 64  # of a row's keys
LEAST_KEYS = 128  # of a part, where there is more than one


@triton.jit
def _decode_kernel(
    q, keys, values, block_table, slots, starts, out, part, part_ml, table_stride, scale,
    HEADS, KV_HEADS, FIRST: tl.constexpr,
    N: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """PAIRS: an e4m3 cache, whose values come as int16 pairs of channels."""
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
        if PARTS == 1:
            safe = tl.where(mass > 0, mass, 1.0)
            tl.store(out + q_at, (acc / safe[:, None]).to(out.dtype.element_ty), mask=q_mask)
        else:
            at = ((row * N + token) * HEADS + head) * PARTS + piece
            tl.store(part + at.to(tl.int64)[:, None] * D + d[None, :], acc, mask=q_mask)
            tl.store(part_ml + at * 2, m, mask=live_q)
            tl.store(part_ml + at * 2 + 1, mass, mask=live_q)


@triton.jit(do_not_specialize=["EACH"])
def _join_kernel(
    part, part_ml, slots, out, EACH, D: tl.constexpr, DB: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Join the parts of one token and query head, of which a row has EACH."""
    index = tl.program_id(0).to(tl.int64)
    if tl.load(slots + tl.program_id(0) // EACH) != 0:
        _join(part, part_ml, out, index, D, DB, PARTS)


@triton.jit
def _join(
    part, part_ml, out, index, D: tl.constexpr, DB: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    d = tl.arange(0, DB)
    top = tl.full((), -float("inf"), tl.float32)
    for p in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(part_ml + (index * PARTS + p) * 2))
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((DB,), tl.float32)
    for p in tl.static_range(PARTS):
        at = index * PARTS + p
        share = tl.exp2(tl.load(part_ml + at * 2) - top)
        total += share * tl.load(part_ml + at * 2 + 1)
        acc += share * tl.load(part + at * D + d, mask=d < D, other=0.0)
    total = tl.where(total > 0, total, 1.0)
    tl.store(out + index * D + d, (acc / total).to(out.dtype.element_ty), mask=d < D)


def attend_decode(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: DecodeRows, scale: float, first: int = 0,
    config: tuple[int, int, int, int] | None = None, pairs: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the reference; rows stand first in q, and results in out, which is as long as q.

    config: (block, parts, warps, stages); None takes the measured one. pairs: whether values are
    read as pairs of channels; None: where they can be.
    """
    count, n = rows.slots.shape[0], rows.width
    page, kv_heads, dim = cache.keys.shape[1:]
    heads = q.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if count == 0:
        return out
    pairs = _pairs(q, cache) if pairs is None else pairs
    block, parts, warps, stages = config or _decode_config(
        count * kv_heads, rows.max_context, pairs
    )
    partial = count * n * heads * parts if parts > 1 else 0
    part = torch.empty(partial, dim, dtype=torch.float32, device=q.device)
    part_ml = torch.empty(partial, 2, dtype=torch.float32, device=q.device)
    group, wide = heads // kv_heads, triton.next_power_of_2(dim)
    values = cache.values.view(torch.int16) if pairs else cache.values
    _decode_kernel[(kv_heads, count, parts)](
        q.contiguous(), cache.keys, values, block_table, rows.slots, rows.starts, out, part,
        part_ml, block_table.stride(0), scale * LOG2_E, heads, kv_heads, FIRST=first,
        N=n, GROUP=group,
        M=max(16, triton.next_power_of_2(n * group)), PAGE=page, D=dim, DB=wide, BN=block,
        PARTS=parts, STAGES=stages, PAIRS=pairs, num_warps=warps,
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(count * n * heads,)](
            part, part_ml, rows.slots, out, n * heads, D=dim, DB=wide, PARTS=parts, num_warps=2
        )
    return out


def _pairs(q: Tensor, cache: KVCache) -> bool:
    dim = cache.values.shape[-1]
    narrow = cache.values.dtype == torch.float8_e4m3fn and q.dtype == torch.bfloat16
    return narrow and dim == triton.next_power_of_2(dim)


def _decode_config(programs: int, max_context: int, pairs: bool) -> tuple[int, int, int, int]:
    """(block, parts, warps, stages)."""
    parts = key_parts(programs, max_context)
    return (32, 1, 2, 5) if pairs and parts == 1 else (64, parts, 4, 3)


def key_parts(programs: int, max_context: int) -> int:
    """Parts that a row's keys are cut into: enough for every multiprocessor, none too short.

    programs: rows times KV heads, each a program for every part.
    """
    parts = 1
    while parts < MOST_PARTS and programs * parts < 1024 and max_context > LEAST_KEYS * parts:
        parts *= 2
    return parts


def contexts_of_parts(longest: int) -> list[int]:
    """A context for each number of parts that there is, up to the longest."""
    parts = (2**i for i in range(MOST_PARTS.bit_length()))
    # A little less than the most, so that the rows of drafts, which go further, have no other.
    contexts = (LEAST_KEYS * count * 25 // 32 for count in parts)
    return [context for context in contexts if context <= longest]
