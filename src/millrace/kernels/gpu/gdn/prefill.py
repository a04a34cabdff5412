"""GDN over prompts, chunk by chunk: the window form with a chunk of 64 tokens as the window.

Within a chunk the deltas solve (I + A) U = B (V - e^G K S) with A strictly lower triangular, B the
betas, G the running log decay and S the state before the chunk. The first kernel, parallel over
chunks, inverts I + A block by block of 16 tokens, all in small products, and keeps
T = (I + A)^-1 B, a quarter of what U and W of the usual form would take. The second walks a row's
chunks in order with the state in registers: U = T (V - e^G K S), outputs, next state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import GDNState, PrefillRows
from millrace.kernels.gpu.gdn.decode_triton import L2_EPS, _dot, _put_state

CHUNK = tl.constexpr(64)
# They may be slices, which begin anywhere; another kernel for those would be compiled.
ROW_ARRAYS = ["slots", "offsets"]


@triton.jit
def _invert_block(A, EYE):
    """(I + A)^-1 of a strictly lower A [16, 16], by products alone.

    Blocks of 8 by (I - D)(I + D^2)(I + D^4), in which no power grows beyond a few dozen, then the
    two of them together: what is below them is nilpotent of order 2.
    """
    r = tl.arange(0, 16)
    own = (r[:, None] // 8) == (r[None, :] // 8)
    D = tl.where(own, A, 0.0)
    D2 = _dot(D, D)
    X = _dot(EYE - D, EYE + D2)
    X += _dot(X, _dot(D2, D2))
    return X - _dot(_dot(X, A - D), X)


@triton.jit
def _among(Ki, Kj, acc, dtype: tl.constexpr):
    return acc + _dot(Ki.to(dtype), tl.trans(Kj).to(dtype))


@triton.jit
def _strip(at, mask, c, STRIP: tl.constexpr):
    d = c + tl.arange(0, STRIP)
    return tl.load(at[:, None] + d[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def _scaled(raw, ni, nj, Gi, Gj, bi, STRICT: tl.constexpr):
    """A block of A: decayed products of unit keys times the row's beta."""
    gap = Gi[:, None] - Gj[None, :]
    if STRICT:
        r = tl.arange(0, 16)
        gap = tl.where(r[:, None] > r[None, :], gap, -float("inf"))
    return raw * tl.exp(gap) * (ni * bi)[:, None] * nj[None, :]


@triton.jit
def _put(at, T, live, b, COLUMN: tl.constexpr):
    c = COLUMN * 16 + tl.arange(0, 16)
    tl.store(at[:, None] + c[None, :], (T * b[None, :]).to(at.dtype.element_ty), live[:, None])


@triton.jit(do_not_specialize=["TILES"], do_not_specialize_on_alignment=ROW_ARRAYS)
def _blocks_kernel(
    qkv, g, beta, offsets, tiles, t_out, gsum, k_norm, q_norm, qkv_stride, gate_stride, HK, HV,
    TILES,
    DK: tl.constexpr, RATIO: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """(I + A)^-1 B and G of one chunk and value head, and the norms of its keys and queries.

    The chunk is four blocks of 16 tokens; a block of the inverse takes only blocks on its left.
    Products of raw keys are exact in bfloat16; norms come in afterwards.
    """
    row = tl.load(tiles + tl.program_id(0))
    if row >= 0:
        chunk = tl.load(tiles + TILES + tl.program_id(0))
        vh = tl.program_id(1)
        kh = vh // RATIO
        begin = tl.load(offsets + row)
        count = tl.load(offsets + row + 1) - begin
        dtype = qkv.dtype.element_ty
        r = tl.arange(0, 16)
        t0 = chunk * CHUNK + r
        l0, l1, l2, l3 = t0 < count, t0 + 16 < count, t0 + 32 < count, t0 + 48 < count
        token = (begin + t0).to(tl.int64)
        x = qkv + token * qkv_stride + (HK + kh) * DK
        far = qkv_stride * 16
        zero = tl.zeros((16, 16), tl.float32)
        p00, p10, p11, p20, p21 = zero, zero, zero, zero, zero
        p22, p30, p31, p32, p33 = zero, zero, zero, zero, zero
        for c in range(0, DK, STRIP):
            k0 = _strip(x, l0, c, STRIP)
            k1 = _strip(x + far, l1, c, STRIP)
            k2 = _strip(x + 2 * far, l2, c, STRIP)
            k3 = _strip(x + 3 * far, l3, c, STRIP)
            p00 = _among(k0, k0, p00, dtype)
            p10 = _among(k1, k0, p10, dtype)
            p11 = _among(k1, k1, p11, dtype)
            p20 = _among(k2, k0, p20, dtype)
            p21 = _among(k2, k1, p21, dtype)
            p22 = _among(k2, k2, p22, dtype)
            p30 = _among(k3, k0, p30, dtype)
            p31 = _among(k3, k1, p31, dtype)
            p32 = _among(k3, k2, p32, dtype)
            p33 = _among(k3, k3, p33, dtype)
        eye = tl.where(r[:, None] == r[None, :], 1.0, zero)
        n0 = 1.0 / tl.sqrt(tl.sum(eye * p00, axis=1) + L2_EPS)
        n1 = 1.0 / tl.sqrt(tl.sum(eye * p11, axis=1) + L2_EPS)
        n2 = 1.0 / tl.sqrt(tl.sum(eye * p22, axis=1) + L2_EPS)
        n3 = 1.0 / tl.sqrt(tl.sum(eye * p33, axis=1) + L2_EPS)

        at = token * gate_stride + vh
        step = gate_stride * 16
        b0 = tl.load(beta + at, mask=l0, other=0.0).to(tl.float32)
        b1 = tl.load(beta + at + step, mask=l1, other=0.0).to(tl.float32)
        b2 = tl.load(beta + at + 2 * step, mask=l2, other=0.0).to(tl.float32)
        b3 = tl.load(beta + at + 3 * step, mask=l3, other=0.0).to(tl.float32)
        d0 = tl.load(g + at, mask=l0, other=0.0).to(tl.float32)
        d1 = tl.load(g + at + step, mask=l1, other=0.0).to(tl.float32)
        d2 = tl.load(g + at + 2 * step, mask=l2, other=0.0).to(tl.float32)
        d3 = tl.load(g + at + 3 * step, mask=l3, other=0.0).to(tl.float32)
        G0 = tl.cumsum(d0, axis=0)
        G1 = tl.cumsum(d1, axis=0) + tl.sum(d0, axis=0)
        G2 = tl.cumsum(d2, axis=0) + tl.sum(d0 + d1, axis=0)
        G3 = tl.cumsum(d3, axis=0) + tl.sum(d0 + d1 + d2, axis=0)

        X0 = _invert_block(_scaled(p00, n0, n0, G0, G0, b0, True), eye)
        X1 = _invert_block(_scaled(p11, n1, n1, G1, G1, b1, True), eye)
        X2 = _invert_block(_scaled(p22, n2, n2, G2, G2, b2, True), eye)
        X3 = _invert_block(_scaled(p33, n3, n3, G3, G3, b3, True), eye)
        A10 = _scaled(p10, n1, n0, G1, G0, b1, False)
        A20 = _scaled(p20, n2, n0, G2, G0, b2, False)
        A21 = _scaled(p21, n2, n1, G2, G1, b2, False)
        A30 = _scaled(p30, n3, n0, G3, G0, b3, False)
        A31 = _scaled(p31, n3, n1, G3, G1, b3, False)
        A32 = _scaled(p32, n3, n2, G3, G2, b3, False)
        T10 = -_dot(X1, _dot(A10, X0))
        T21 = -_dot(X2, _dot(A21, X1))
        T32 = -_dot(X3, _dot(A32, X2))
        T20 = -_dot(X2, _dot(A20, X0) + _dot(A21, T10))
        T31 = -_dot(X3, _dot(A31, X1) + _dot(A32, T21))
        T30 = -_dot(X3, _dot(A30, X0) + _dot(A31, T10) + _dot(A32, T20))

        head = token * HV + vh
        next_head = HV * 16
        out = t_out + head * CHUNK
        _put(out, X0, l0, b0, 0)
        out += next_head * CHUNK
        _put(out, T10, l1, b0, 0)
        _put(out, X1, l1, b1, 1)
        out += next_head * CHUNK
        _put(out, T20, l2, b0, 0)
        _put(out, T21, l2, b1, 1)
        _put(out, X2, l2, b2, 2)
        out += next_head * CHUNK
        _put(out, T30, l3, b0, 0)
        _put(out, T31, l3, b1, 1)
        _put(out, T32, l3, b2, 2)
        _put(out, X3, l3, b3, 3)
        tl.store(gsum + head, G0, mask=l0)
        tl.store(gsum + head + next_head, G1, mask=l1)
        tl.store(gsum + head + 2 * next_head, G2, mask=l2)
        tl.store(gsum + head + 3 * next_head, G3, mask=l3)
        if vh % RATIO == 0:
            key = token * HK + kh
            next_key = HK * 16
            tl.store(k_norm + key, n0, mask=l0)
            tl.store(k_norm + key + next_key, n1, mask=l1)
            tl.store(k_norm + key + 2 * next_key, n2, mask=l2)
            tl.store(k_norm + key + 3 * next_key, n3, mask=l3)
            for block in range(4):
                live = t0 + block * 16 < count
                square = tl.zeros((16,), tl.float32)
                for c in range(0, DK, STRIP):
                    q = _strip(x - HK * DK + block * far, live, c, STRIP).to(tl.float32)
                    square += tl.sum(q * q, axis=1)
                norm = (DK**-0.5) / tl.sqrt(square + L2_EPS)
                tl.store(q_norm + key + block * next_key, norm, mask=live)


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def _walk_kernel(
    qkv, t_in, gsum, k_norm, q_norm, offsets, slots, live_rows, state, out, qkv_stride, HK, HV,
    DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, RATIO: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Walk one value head and tile of value channels, on raw queries, keys and values, of every
    row whose turn it is.

    U = T (V - e^G K S); norms scale rows of the results, so that operands go to the products as
    they lie in memory.
    """
    vh = tl.program_id(1)
    kh = vh // RATIO
    dtype = qkv.dtype.element_ty
    d = tl.arange(0, DK)
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    r = tl.arange(0, CHUNK)
    below = (r[None, :] // 16) <= (r[:, None] // 16)
    for row in range(tl.program_id(2), tl.load(live_rows), tl.num_programs(2)):
        begin = tl.load(offsets + row)
        count = tl.load(offsets + row + 1) - begin
        slot = tl.load(slots + row).to(tl.int64)
        state_at = state + ((slot * HV + vh) * DK + d[:, None]) * DV + v[None, :]
        S = tl.load(state_at).to(tl.float32)
        for start in tl.range(0, count, CHUNK, num_stages=STAGES):
            live = start + r < count
            token = (begin + start + r).to(tl.int64)
            head = token * HV + vh
            row_at = qkv + token * qkv_stride
            q = tl.load(row_at[:, None] + (kh * DK + d)[None, :], mask=live[:, None], other=0.0)
            k = tl.load(
                row_at[:, None] + ((HK + kh) * DK + d)[None, :], mask=live[:, None], other=0.0
            )
            value_at = row_at[:, None] + (2 * HK * DK + vh * DV + v)[None, :]
            value = tl.load(value_at, mask=live[:, None], other=0.0)
            T = tl.load(
                t_in + head[:, None] * 64 + r[None, :], mask=live[:, None] & below, other=0.0
            )
            nk = tl.load(k_norm + token * HK + kh, mask=live, other=0.0)
            nq = tl.load(q_norm + token * HK + kh, mask=live, other=0.0)
            final = begin + tl.minimum(start + CHUNK, count) - 1
            last = tl.load(gsum + final.to(tl.int64) * HV + vh)
            G = tl.load(gsum + head, mask=live, other=0.0)
            G = tl.where(live, G, last)
            rounded = S.to(dtype)
            wanted = value.to(tl.float32) - _dot(k, rounded) * (nk * tl.exp(G))[:, None]
            new = _dot(T, wanted.to(dtype))
            gap = tl.where(r[:, None] >= r[None, :], G[:, None] - G[None, :], -float("inf"))
            scores = _dot(q, tl.trans(k)) * tl.exp(gap) * nq[:, None] * nk[None, :]
            o = _dot(q, rounded) * (nq * tl.exp(G))[:, None]
            o += _dot(scores.to(dtype), new.to(dtype))
            tl.store(
                out + head[:, None] * DV + v[None, :], o.to(out.dtype.element_ty), live[:, None]
            )
            late = (new * (nk * tl.exp(last - G))[:, None]).to(dtype)
            S = S * tl.exp(last) + _dot(tl.trans(k), late)
        _put_state(state_at, S)


def gdn_prefill(
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    cache: GDNState,
    rows: PrefillRows,
    config: tuple[int, int, int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As the reference; rows stand anywhere in qkv, and results in out, which is as long as qkv.

    config: (warps of the solve, value tile, warps and stages of the walk).
    """
    tokens, (key_heads, _, key_dim) = qkv.shape[0], cache.window_k.shape[1:]
    _, value_heads, _, value_dim = cache.state.shape
    solve_warps, tile, warps, stages = config or _config(qkv.dtype, rows)
    tile, device = min(tile, value_dim), qkv.device
    t = torch.empty(tokens, value_heads, CHUNK.value, dtype=qkv.dtype, device=device)
    if out is None:
        out = torch.empty(tokens, value_heads, value_dim, dtype=qkv.dtype, device=device)
    gsum = torch.empty(tokens, value_heads, dtype=torch.float32, device=device)
    k_norm, q_norm = torch.empty(2, tokens, key_heads, dtype=torch.float32, device=device)
    shape = {"DK": key_dim, "RATIO": value_heads // key_heads}
    chunks = rows.tiles(CHUNK.value, tokens)
    _blocks_kernel[(chunks.shape[1], value_heads)](
        qkv, g, beta, rows.offsets, chunks, t, gsum, k_norm, q_norm, qkv.stride(0), g.stride(0),
        key_heads, value_heads, chunks.shape[1], **shape, STRIP=min(key_dim, 32),
        num_warps=solve_warps,
    )  # fmt: skip
    _walk_kernel[(value_dim // tile, value_heads, rows.slots.shape[0])](
        qkv, t, gsum, k_norm, q_norm, rows.offsets, rows.slots, rows.live(), cache.state, out,
        qkv.stride(0), key_heads, value_heads, **shape, DV=value_dim, BV=tile, STAGES=stages,
        num_warps=warps,
    )  # fmt: skip
    return out


def _config(dtype: torch.dtype, rows: PrefillRows) -> tuple[int, int, int, int]:
    """A few prompts leave multiprocessors idle, so their walks fetch ahead; many share them, and
    what a second stage would hold in shared memory is better spent on one more walk. float32 takes
    twice the shared memory. A graph's rows are mostly few."""
    if dtype == torch.float32:
        return 4, 32, 4, 1
    few = rows.counts is None or len(rows.counts) <= 2
    return 1, 64, 4, 2 if few else 1
