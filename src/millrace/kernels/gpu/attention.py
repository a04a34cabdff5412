"""Attention over paged keys and values, for decode rows and for prompts, and what stands before it.

Decode: a program owns a row, a KV head and a part of the row's length; the query heads of the group
and the tokens of the row are one tile of queries, so keys and values are read once. Parts are
joined by a second kernel. Prefill: a program owns a tile of one row's tokens and one query head.
Both keep a running maximum and sum (online softmax), and load no key or value past a row's end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import DecodeRows, KVCache, PrefillRows

LOG2_E = 1.4426950408889634


@triton.jit
def _operand(Q, keys):
    """Queries in the type of the products: an e4m3 cache converts fastest, and exactly, to fp16."""
    if (keys.dtype.element_ty == tl.float8e4nv) & (Q.dtype == tl.bfloat16):
        operand = Q.to(tl.float16)
    else:
        operand = Q
    return operand


@triton.jit
def _load_rows(at, live, D: tl.constexpr, DB: tl.constexpr, MASKED: tl.constexpr):
    """[BN, DB] of a cache from pointers to rows, 0 past D, and where not live if MASKED."""
    d = tl.arange(0, DB)
    if MASKED:
        x = tl.load(at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    elif D != DB:
        x = tl.load(at[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    else:
        x = tl.load(at[:, None] + d[None, :])
    return x


@triton.jit
def _attend_block(
    Q, m, mass, acc, keys, values, table, block, limit, q_pos, kh, scale, KV_HEADS,
    FIRST: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """KV rows block .. block + BN - 1 join the running softmax. Q: [M, DB]; q_pos: [M].

    MASKED: some rows are at or past limit, before FIRST or past a query; those past limit or before
    FIRST are not loaded. scale counts in powers of two. A block never straddles two pages where it
    divides the page size, and then needs one look at the table.
    """
    pos = block + tl.arange(0, BN)
    live = (pos < limit) & (pos >= FIRST)
    if PAGE % BN == 0:
        first = tl.load(table + block // PAGE).to(tl.int64) * PAGE + block % PAGE
        key_at = keys + (first * KV_HEADS + kh) * D + tl.arange(0, BN) * KV_HEADS * D
        value_at = values + (first * KV_HEADS + kh) * D + tl.arange(0, BN) * KV_HEADS * D
    else:
        page = tl.load(table + pos // PAGE, mask=live, other=0).to(tl.int64)
        at = ((page * PAGE + pos % PAGE) * KV_HEADS + kh) * D
        key_at = keys + at
        value_at = values + at
    K = _load_rows(key_at, live, D, DB, MASKED)
    V = _load_rows(value_at, live, D, DB, MASKED)
    S = tl.dot(Q, tl.trans(K.to(Q.dtype)), input_precision="tf32x3") * scale
    if MASKED:
        S = tl.where(live[None, :] & (pos[None, :] <= q_pos[:, None]), S, -float("inf"))
    m_new = tl.maximum(m, tl.max(S, axis=1))
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    P = tl.exp2(S - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    mass = mass * alpha + tl.sum(P, axis=1)
    acc = acc * alpha[:, None]
    acc = tl.dot(P.to(Q.dtype), V.to(Q.dtype), acc=acc, input_precision="tf32x3")
    return m_new, mass, acc


@triton.jit
def _attend_range(
    Q, keys, values, table, low, high, whole, q_pos, kh, scale, KV_HEADS,
    FIRST: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attention over KV rows low .. high - 1: (maximum, mass, weighted sum). Every query sees the
    rows before `whole`; low is a multiple of BN."""
    M: tl.constexpr = Q.shape[0]
    m = tl.full((M,), -float("inf"), tl.float32)
    mass = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, DB), tl.float32)
    middle = low
    if FIRST == 0:
        middle = tl.maximum(tl.minimum(high, whole) // BN * BN, low)
        for block in tl.range(low, middle, BN, num_stages=STAGES):
            m, mass, acc = _attend_block(
                Q, m, mass, acc, keys, values, table, block, high, q_pos, kh, scale, KV_HEADS,
                FIRST, PAGE, D, DB, BN, False,
            )  # fmt: skip
    for block in tl.range(middle, high, BN, num_stages=1):
        m, mass, acc = _attend_block(
            Q, m, mass, acc, keys, values, table, block, high, q_pos, kh, scale, KV_HEADS,
            FIRST, PAGE, D, DB, BN, True,
        )  # fmt: skip
    return m, mass, acc


@triton.jit
def _decode_kernel(
    q, keys, values, block_table, slots, starts, out, part, part_ml, table_stride, scale,
    HEADS, KV_HEADS, FIRST: tl.constexpr,
    N: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    kh = tl.program_id(0)
    row = tl.program_id(1)
    piece = tl.program_id(2)
    slot = tl.load(slots + row)
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
    m, mass, acc = _attend_range(
        Q, keys, values, block_table + slot * table_stride, low, high, start + 1, start + token,
        kh, scale, KV_HEADS, FIRST, PAGE, D, DB, BN, STAGES,
    )  # fmt: skip
    if PARTS == 1:
        safe = tl.where(mass > 0, mass, 1.0)
        tl.store(out + q_at, (acc / safe[:, None]).to(out.dtype.element_ty), mask=q_mask)
    else:
        at = ((row * N + token) * HEADS + head) * PARTS + piece
        tl.store(part + at.to(tl.int64)[:, None] * D + d[None, :], acc, mask=q_mask)
        tl.store(part_ml + at * 2, m, mask=live_q)
        tl.store(part_ml + at * 2 + 1, mass, mask=live_q)


@triton.jit
def _join_kernel(part, part_ml, out, D: tl.constexpr, DB: tl.constexpr, PARTS: tl.constexpr):
    """Join the parts of one token and query head."""
    index = tl.program_id(0).to(tl.int64)
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


@triton.jit
def _prefill_kernel(
    q, keys, values, block_table, slots, starts, offsets, out, table_stride, q_stride, scale,
    HEADS, KV_HEADS, FIRST: tl.constexpr,
    GROUP: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
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
        _, mass, acc = _attend_range(
            Q, keys, values, block_table + slot * table_stride, 0, high, start + tile * M + 1,
            start + t, head // GROUP, scale, KV_HEADS, FIRST, PAGE, D, DB, BN, STAGES,
        )  # fmt: skip
        safe = tl.where(mass > 0, mass, 1.0)
        result = (acc / safe[:, None]).to(out.dtype.element_ty)
        tl.store(out + (token * HEADS + head) * D + d[None, :], result, mask=mask)


@triton.jit
def _norm_rope(x, weight, cos_sin, eps, D: tl.constexpr, DB: tl.constexpr, R: tl.constexpr):
    """One head: normed where there is a weight, then rotated. x, cos_sin: pointers to rows."""
    d = tl.arange(0, DB)
    value = tl.load(x + d, mask=d < D, other=0.0)
    dtype = value.dtype
    HALF: tl.constexpr = R // 2
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    turned = d < R
    other = tl.load(x + partner, mask=turned, other=0.0).to(tl.float32)
    value = value.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / D + eps)
    value = value * inverse * (1.0 + tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32))
    other *= inverse * (1.0 + tl.load(weight + partner, mask=turned, other=0.0).to(tl.float32))
    # The norm rounds to the model dtype, as the op of its own does.
    value = value.to(dtype).to(tl.float32)
    other = other.to(dtype).to(tl.float32)
    angle = d % HALF
    cos = tl.load(cos_sin + angle, mask=turned, other=1.0)
    sin = tl.load(cos_sin + HALF + angle, mask=turned, other=0.0)
    sign = tl.where(d < HALF, -sin, sin)
    return tl.where(turned, value * cos + other * sign, value)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """To a cache's dtype; e4m3 saturates."""
    if dtype == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0)
    return x.to(dtype)


@triton.jit
def _qkv_kernel(
    qkv, q_weight, k_weight, positions, cos_sin, kv_rows, q_out, keys, values, stride, k_first,
    v_first, HEADS, KV_HEADS, eps, D: tl.constexpr, DB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One head of one token: a query, a key or a value, in this order."""
    token = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    d = tl.arange(0, DB)
    angles = cos_sin + tl.load(positions + token) * R
    base = qkv + token * stride
    if head < HEADS:
        y = _norm_rope(base + head * D, q_weight, angles, eps, D, DB, R)
        q_at = q_out + (token * HEADS + head) * D + d
        tl.store(q_at, y.to(q_out.dtype.element_ty), mask=d < D)
    else:
        row = tl.load(kv_rows + token).to(tl.int64)
        kh = (head - HEADS) % KV_HEADS
        at = (row * KV_HEADS + kh) * D + d
        if head < HEADS + KV_HEADS:
            y = _norm_rope(base + k_first + kh * D, k_weight, angles, eps, D, DB, R)
            y = y.to(qkv.dtype.element_ty)
            tl.store(keys + at, _round(y, keys.dtype.element_ty), mask=d < D)
        else:
            v = tl.load(base + v_first + kh * D + d, mask=d < D, other=0.0)
            tl.store(values + at, _round(v, values.dtype.element_ty), mask=d < D)


@triton.jit
def _store_kernel(k, v, kv_rows, keys, values, k_stride, v_stride, width, B: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    mask = i < width
    at = tl.load(kv_rows + token).to(tl.int64) * width + i
    new_k = tl.load(k + token * k_stride + i, mask=mask, other=0.0)
    new_v = tl.load(v + token * v_stride + i, mask=mask, other=0.0)
    tl.store(keys + at, _round(new_k, keys.dtype.element_ty), mask=mask)
    tl.store(values + at, _round(new_v, values.dtype.element_ty), mask=mask)


def store_kv(k: Tensor, v: Tensor, cache: KVCache, kv_rows: Tensor) -> None:
    """As the reference; k and v may be slices of a wider projection."""
    width = k.shape[1] * k.shape[2]
    if k.shape[0] == 0:
        return
    k, v = (x if x.stride(1) == x.shape[2] else x.contiguous() for x in (k, v))
    _store_kernel[(k.shape[0], triton.cdiv(width, 1024))](
        k, v, kv_rows, cache.keys, cache.values, k.stride(0), v.stride(0), width, B=1024
    )


def norm_rope_store(
    qkv: Tensor, widths: list[int], q_weight: Tensor, k_weight: Tensor, eps: float,
    positions: Tensor, cos_sin: Tensor, cache: KVCache, kv_rows: Tensor,
) -> Tensor:  # fmt: skip
    """All between the attention projection and attention, in one pass.

    qkv: [T, sum(widths)], the projection's (query, gate, key, value) parts, of which queries and
    gates may be left out, with widths of 0. Norms and rotates queries and keys, stores keys and
    values, returns the queries [T, query_heads, head_dim].
    """
    kv_heads, dim = cache.keys.shape[2:]
    heads = widths[0] // dim
    q = torch.empty(qkv.shape[0], heads, dim, dtype=qkv.dtype, device=qkv.device)
    k_first = widths[0] + widths[1]
    if qkv.shape[0]:
        _qkv_kernel[(heads + 2 * kv_heads, qkv.shape[0])](
            qkv, q_weight, k_weight, positions, cos_sin, kv_rows, q, cache.keys, cache.values,
            qkv.stride(0), k_first, k_first + widths[2], heads, kv_heads, eps, D=dim,
            DB=triton.next_power_of_2(dim), R=cos_sin.shape[1], num_warps=1,
        )  # fmt: skip
    return q


def attend_decode(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: DecodeRows, scale: float, first: int = 0,
    config: tuple[int, int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """As the reference. config: (block, parts, warps, stages); None takes the measured one."""
    count, n = rows.slots.shape[0], rows.width
    page, kv_heads, dim = cache.keys.shape[1:]
    heads = q.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if count == 0:
        return out
    block, parts, warps, stages = config or _decode_config(count * kv_heads, rows.max_context)
    partial = count * n * heads * parts if parts > 1 else 0
    part = torch.empty(partial, dim, dtype=torch.float32, device=q.device)
    part_ml = torch.empty(partial, 2, dtype=torch.float32, device=q.device)
    group, wide = heads // kv_heads, triton.next_power_of_2(dim)
    _decode_kernel[(kv_heads, count, parts)](
        q.contiguous(), cache.keys, cache.values, block_table, rows.slots, rows.starts, out, part,
        part_ml, block_table.stride(0), scale * LOG2_E, heads, kv_heads, FIRST=first,
        N=n, GROUP=group,
        M=max(16, triton.next_power_of_2(n * group)), PAGE=page, D=dim, DB=wide, BN=block,
        PARTS=parts, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(count * n * heads,)](
            part, part_ml, out, D=dim, DB=wide, PARTS=parts, num_warps=2
        )
    return out


def _decode_config(programs: int, max_context: int) -> tuple[int, int, int, int]:
    """(block, parts, warps, stages): parts enough for every multiprocessor, none too short."""
    parts = 1
    while parts < 64 and programs * parts < 1024 and max_context > 128 * parts:
        parts *= 2
    return 64, parts, 4, 3


def attend_prefill(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: PrefillRows, scale: float, first: int = 0,
    config: tuple[int, int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """As the reference. config: (query tile, block, warps, stages)."""
    page, kv_heads, dim = cache.keys.shape[1:]
    heads = q.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile, block, warps, stages = config or ((128, 64, 8, 2) if q.itemsize == 2 else (16, 16, 4, 1))
    q = q if q.stride(1) == dim else q.contiguous()
    _prefill_kernel[(heads, len(rows.counts), triton.cdiv(rows.max_count, tile))](
        q, cache.keys, cache.values, block_table, rows.slots, rows.starts, rows.offsets, out,
        block_table.stride(0), q.stride(0), scale * LOG2_E, heads, kv_heads, FIRST=first,
        GROUP=heads // kv_heads, M=tile, PAGE=page, D=dim, DB=triton.next_power_of_2(dim),
        BN=block, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out
