"""Attention's inner loop: a tile of queries meets keys and values with an online softmax.

Keeps a running maximum and sum, and loads no key or value past a row's end. Knows pages, not rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def _operand(Q, keys):
    """Queries in the type of the products: an e4m3 cache converts fastest, and exactly, to fp16."""
    dtype: tl.constexpr = keys.dtype.element_ty
    narrow: tl.constexpr = (dtype == tl.float8e4nv) | (dtype == tl.float16)
    if narrow & (Q.dtype == tl.bfloat16):  # noqa: SIM108
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
    divides the page size, and then needs one look at the table. PAGE of 0: keys and values are the
    row's own, one behind the other, and there is no table.
    """
    pos = block + tl.arange(0, BN)
    live = (pos < limit) & (pos >= FIRST)
    if PAGE == 0:
        at = (pos.to(tl.int64) * KV_HEADS + kh) * D
        key_at = keys + at
        value_at = values + at
    elif PAGE % BN == 0:
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
