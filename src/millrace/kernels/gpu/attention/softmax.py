"""Attention's inner loop: a tile of queries meets keys and values with an online softmax.

Keeps a running maximum and sum, and loads no key or value past a row's end. Knows pages and one row
of them, not batches of rows.
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
def _places(
    table, block, pos, live, kh, KV_HEADS, PAGE: tl.constexpr, D: tl.constexpr, BN: tl.constexpr
):
    """Where the KV rows `pos` of one head lie: elements to a first one, and from there to each.

    A block that divides the page size never straddles two pages, and needs one look at the table.
    PAGE of 0: the rows lie one behind the other, and there is no table.
    """
    if PAGE == 0:
        first = tl.cast(block, tl.int64) * KV_HEADS
        step = tl.arange(0, BN) * KV_HEADS * D
    elif PAGE % BN == 0:
        page = tl.load(table + block // PAGE).to(tl.int64)
        first = (page * PAGE + block % PAGE) * KV_HEADS
        step = tl.arange(0, BN) * KV_HEADS * D
    else:
        page = tl.load(table + pos // PAGE, mask=live, other=0).to(tl.int64)
        first = tl.zeros((), tl.int64)
        step = (page * PAGE + pos % PAGE) * KV_HEADS * D
    return (first + kh) * D, step


@triton.jit
def _scores(Q, K, live, pos, q_pos, scale, MASKED: tl.constexpr):
    """[M, BN] in powers of two; -inf, if MASKED, for keys that are not live or past a query."""
    S = tl.dot(Q, tl.trans(K.to(Q.dtype)), input_precision="tf32x3") * scale
    if MASKED:
        S = tl.where(live[None, :] & (pos[None, :] <= q_pos[:, None]), S, -float("inf"))
    return S


@triton.jit
def _soften(S, m, mass):
    """The running maximum and mass with S in them, S's shares, and what earlier sums shrink by."""
    m_new = tl.maximum(m, tl.max(S, axis=1))
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    P = tl.exp2(S - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    return m_new, mass * alpha + tl.sum(P, axis=1), P, alpha


@triton.jit
def _attend_block(
    Q, m, mass, acc, keys, values, table, block, limit, q_pos, kh, scale, KV_HEADS,
    FIRST: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """KV rows block .. block + BN - 1 join the running softmax. Q: [M, DB]; q_pos: [M].

    MASKED: some rows are at or past limit, before FIRST or past a query; those past limit or before
    FIRST are not loaded.
    """
    pos = block + tl.arange(0, BN)
    live = (pos < limit) & (pos >= FIRST)
    first, step = _places(table, block, pos, live, kh, KV_HEADS, PAGE, D, BN)
    K = _load_rows(keys + first + step, live, D, DB, MASKED)
    V = _load_rows(values + first + step, live, D, DB, MASKED)
    m, mass, P, alpha = _soften(_scores(Q, K, live, pos, q_pos, scale, MASKED), m, mass)
    acc = acc * alpha[:, None]
    acc = tl.dot(P.to(Q.dtype), V.to(Q.dtype), acc=acc, input_precision="tf32x3")
    return m, mass, acc


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


# --- values as pairs of channels ------------------------------------------------------------------


@triton.jit
def _even_and_odd(V):
    """Pairs of e4m3 channels, int16 [BN, DB / 2], as float16: the even ones, and the odd ones."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b32 both;
            .reg .b16 pair;
            prmt.b32 both, $2, 0, 0x4420;
            cvt.u16.u32 pair, both;
            cvt.rn.f16x2.e4m3x2 $0, pair;
            prmt.b32 both, $2, 0, 0x4431;
            cvt.u16.u32 pair, both;
            cvt.rn.f16x2.e4m3x2 $1, pair;
        }
        """,
        "=r,=r,r", [V], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _attend_pairs(
    Q, m, mass, even, odd, keys, pairs, table, block, limit, q_pos, kh, scale, KV_HEADS,
    FIRST: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """`_attend_block` over an e4m3 cache whose values come as pairs of channels."""
    pos = block + tl.arange(0, BN)
    live = (pos < limit) & (pos >= FIRST)
    first, step = _places(table, block, pos, live, kh, KV_HEADS, PAGE, D, BN)
    K = _load_rows(keys + first + step, live, D, D, MASKED)
    V = _load_rows(pairs + first // 2 + step // 2, live, D // 2, D // 2, MASKED)
    m, mass, P, alpha = _soften(_scores(Q, K, live, pos, q_pos, scale, MASKED), m, mass)
    low, high = _even_and_odd(V)
    even = tl.dot(P.to(tl.float16), low, acc=even * alpha[:, None])
    odd = tl.dot(P.to(tl.float16), high, acc=odd * alpha[:, None])
    return m, mass, even, odd


@triton.jit
def _attend_range_of_pairs(
    Q, keys, pairs, table, low, high, whole, q_pos, kh, scale, KV_HEADS,
    FIRST: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`_attend_range` over an e4m3 cache, D a power of two, values seen as int16 pairs of channels.

    Products on tensor cores want values by columns, and only elements of 16 bits can be read so
    from shared memory a tile at a time; e4m3 ones go byte by byte.
    """
    M: tl.constexpr = Q.shape[0]
    m = tl.full((M,), -float("inf"), tl.float32)
    mass = tl.zeros((M,), tl.float32)
    even = tl.zeros((M, D // 2), tl.float32)
    odd = tl.zeros((M, D // 2), tl.float32)
    middle = low
    if FIRST == 0:
        middle = tl.maximum(tl.minimum(high, whole) // BN * BN, low)
        for block in tl.range(low, middle, BN, num_stages=STAGES):
            m, mass, even, odd = _attend_pairs(
                Q, m, mass, even, odd, keys, pairs, table, block, high, q_pos, kh, scale, KV_HEADS,
                FIRST, PAGE, D, BN, False,
            )  # fmt: skip
    for block in tl.range(middle, high, BN, num_stages=1):
        m, mass, even, odd = _attend_pairs(
            Q, m, mass, even, odd, keys, pairs, table, block, high, q_pos, kh, scale, KV_HEADS,
            FIRST, PAGE, D, BN, True,
        )  # fmt: skip
    return m, mass, tl.reshape(tl.join(even, odd), (M, D))
