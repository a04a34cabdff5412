"""The two kernels of GDN decode in Triton, for what the CUDA form does not take.

What passes between them is the same in both forms; `gdn_decode` says what each does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import DecodeRows, GDNState

L2_EPS = tl.constexpr(1e-6)


@triton.jit
def _dot(a, b):
    """a @ b in float32 accuracy for float32 operands."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _put_state(at, S):
    """Store a state; what is beyond the range of float16 becomes its largest number."""
    if at.dtype.element_ty == tl.float16:
        S = tl.minimum(tl.maximum(S, -65504.0), 65504.0)
    tl.store(at, S.to(at.dtype.element_ty))


@triton.jit
def _layout(N: tl.constexpr, W: tl.constexpr):
    """Where the coefficients of a row and value head lie, in floats: what each probe takes from the
    window [2N, W], from new tokens [2N, N] and from the state [2N], beta [N], the shares of the
    window's rows in a fold [W], and the state's own share [1], which is last."""
    NEW: tl.constexpr = 2 * N * W
    STATE: tl.constexpr = NEW + 2 * N * N
    return NEW, STATE, STATE + 2 * N, STATE + 3 * N, STATE + 3 * N + W


@triton.jit
def _gates(g, beta, a_log, dt_bias, at, vh, mask, RAW: tl.constexpr):
    """g and beta of tokens whose flat index is `at`; RAW: from the projections a and b."""
    g_t = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
    beta_t = tl.load(beta + at, mask=mask, other=0.0).to(tl.float32)
    if RAW:
        x = g_t + tl.load(dt_bias + vh)
        soft = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))
        g_t = tl.where(mask, -tl.exp(tl.load(a_log + vh)) * soft, 0.0)
        beta_t = tl.where(mask, 1.0 / (1.0 + tl.exp(-beta_t)), 0.0)
    return g_t, beta_t


@triton.jit
def _products(x_at, x_mask, keys_at, in_window, STRIP: tl.constexpr, DK: tl.constexpr):
    """Of raw probes x [P, DK] and window keys [WB, DK]: x x^T, x keys^T and the squares of x."""
    s = tl.arange(0, STRIP)
    pair = tl.zeros((x_at.shape[0], x_at.shape[0]), tl.float32)
    old_pair = tl.zeros((x_at.shape[0], keys_at.shape[0]), tl.float32)
    square = tl.zeros((x_at.shape[0],), tl.float32)
    for c in range(0, DK, STRIP):
        x = tl.load(x_at[:, None] + (c + s)[None, :], mask=x_mask[:, None], other=0.0)
        k = tl.load(keys_at[:, None] + (c + s)[None, :], mask=in_window[:, None], other=0.0)
        x = x.to(tl.float32)
        square += tl.sum(x * x, axis=1)
        pair += _dot(x, tl.trans(x))
        old_pair += _dot(x, tl.trans(k.to(tl.float32)))
    return pair, old_pair, square


@triton.jit
def _replace_keys(
    k_at, k_mask, scale, old_at, in_window, aside_at, new_at, full, STRIP: tl.constexpr,
    DK: tl.constexpr,
):  # fmt: skip
    """Set a full window's keys aside, then write the new ones, normalised by `scale`."""
    s = tl.arange(0, STRIP)
    for c in range(0, DK, STRIP):
        at = (c + s)[None, :]
        if full:
            old = tl.load(old_at[:, None] + at, mask=in_window[:, None], other=0.0)
            tl.store(aside_at[:, None] + at, old.to(tl.float32), mask=in_window[:, None])
        tl.debug_barrier()  # every warp has read before any overwrites
        k = tl.load(k_at[:, None] + at, mask=k_mask[:, None], other=0.0).to(tl.float32)
        k = (k * scale[:, None]).to(new_at.dtype.element_ty)
        tl.store(new_at[:, None] + at, k, mask=k_mask[:, None])


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _prepare_kernel(
    qkv, g, beta, a_log, dt_bias, window_k, window_g, fill, slots, coef_out, old_keys,
    qkv_stride, gate_stride, HK, HV,
    N: tl.constexpr, NB: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, DK: tl.constexpr,
    RATIO: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Coefficients of one row and key head; the window's new keys and log A.

    Index r of a probe: the keys of the tokens stand at 0 .. N - 1, the queries from NB on.
    """
    STRIP: tl.constexpr = min(DK, 32)
    kh = tl.program_id(0)
    row = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot == 0:  # the row is padding, and has no tokens
        return
    filled = tl.minimum(tl.load(fill + slot), W)
    full = filled + N > W
    place = tl.where(full, 0, filled)
    NEW, STATE, BETA, SHARE, OWN = _layout(N, W)

    r = tl.arange(0, 2 * NB)
    c = tl.arange(0, 2 * NB)
    i = tl.arange(0, WB)
    t = r % NB
    is_query = r >= NB
    in_window = i < filled
    x_at = qkv + (row * N).to(tl.int64) * qkv_stride
    x_at += t * qkv_stride + tl.where(is_query, kh, HK + kh) * DK
    keys_at = window_k + (slot * HK + kh) * W * DK + i * DK
    pair, old_pair, square = _products(x_at, t < N, keys_at, in_window, STRIP, DK)
    norm_r = 1.0 / tl.sqrt(square + L2_EPS)
    diagonal = tl.sum(tl.where(r[:, None] == c[None, :], pair, 0.0), axis=0)
    norm_c = 1.0 / tl.sqrt(diagonal + L2_EPS)
    scale = tl.where(is_query, norm_r * (DK**-0.5), norm_r)
    pair = pair * scale[:, None] * norm_c[None, :]  # column j < NB: the key of token j
    old_pair = old_pair * scale[:, None]
    aside_at = old_keys + (row * HK + kh).to(tl.int64) * W * DK + i * DK
    new_at = window_k + ((slot * HK + kh) * W + place) * DK + r * DK
    _replace_keys(x_at, r < N, scale, keys_at, in_window, aside_at, new_at, full, STRIP, DK)

    p = tl.where(is_query, N, 0) + t
    for j in tl.static_range(RATIO):
        vh = kh * RATIO + j
        log_at = window_g + (slot * HV + vh) * W
        old_log = tl.load(log_at + i, mask=in_window, other=0.0)
        gate_at = row * N * gate_stride + vh
        g_r, beta_r = _gates(g, beta, a_log, dt_bias, gate_at + t * gate_stride, vh, t < N, RAW)
        g_c, _ = _gates(g, beta, a_log, dt_bias, gate_at + c * gate_stride, vh, c < N, RAW)
        # Log A before the row, and after each of its tokens: along rows and along columns.
        decay = tl.sum(tl.where(i == filled - 1, old_log, 0.0), axis=0)
        log_r = decay + tl.sum(tl.where(c[None, :] <= t[:, None], g_c[None, :], 0.0), axis=1)
        upto = (r[:, None] <= c[None, :]) & (r < NB)[:, None]
        log_c = decay + tl.sum(tl.where(upto, g_r[:, None], 0.0), axis=0)

        coef = coef_out + (row * HV + vh).to(tl.int64) * (OWN + 1)
        gap = tl.where(in_window[None, :], log_r[:, None] - old_log[None, :], -float("inf"))
        at = p[:, None] * W + i[None, :]
        tl.store(coef + at, tl.exp(gap) * old_pair, mask=(t < N)[:, None] & (i < W)[None, :])
        among = (c[None, :] < t[:, None]) | (is_query[:, None] & (c[None, :] == t[:, None]))
        from_new = tl.exp(tl.where(among, log_r[:, None] - log_c[None, :], -float("inf")))
        at = NEW + p[:, None] * N + c[None, :]
        tl.store(coef + at, from_new * pair, mask=(t < N)[:, None] & (c < N)[None, :])
        tl.store(coef + STATE + p, tl.exp(log_r) * scale, mask=t < N)
        tl.store(coef + BETA + r, beta_r, mask=r < N)
        tl.store(coef + SHARE + i, tl.exp(decay - old_log), mask=in_window)
        tl.store(coef + OWN, tl.exp(decay))
        tl.debug_barrier()  # old_log is read before new rows take its place
        tl.store(log_at + place + r, tl.where(full, log_r - decay, log_r), mask=r < N)


@triton.jit
def _meet(S, old_u, probe_at, coef, p: tl.constexpr, STATE: tl.constexpr, i, W: tl.constexpr):
    """What state and window answer to probe p: [BV]. probe_at: the raw key or query."""
    share = tl.load(coef + p * W + i, mask=i < W, other=0.0)
    probe = tl.load(probe_at).to(tl.float32)
    from_state = tl.sum(S * probe[:, None], axis=0) * tl.load(coef + STATE + p)
    return from_state + tl.sum(old_u * share[:, None], axis=0)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _answer_kernel(
    qkv, state, window_u, fill, slots, coefs, old_keys, out, qkv_stride, HK, HV,
    N: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BV: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """Outputs and window rows u of one row, value head and tile of BV value channels."""
    TILES: tl.constexpr = DV // BV
    vh = tl.program_id(0) // TILES
    kh = vh // RATIO
    row = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot == 0:
        return
    d = tl.arange(0, DK)
    v = (tl.program_id(0) % TILES) * BV + tl.arange(0, BV)
    head = slot * HV + vh
    state_at = state + (head * DK + d)[:, None] * DV + v[None, :]
    S = tl.load(state_at).to(tl.float32)
    filled = tl.minimum(tl.load(fill + slot), W)
    NEW, STATE, BETA, SHARE, OWN = _layout(N, W)
    coef = coefs + (row * HV + vh).to(tl.int64) * (OWN + 1)
    u_at = window_u + head * W * DV + v
    i = tl.arange(0, WB)
    old_u = tl.load(u_at[None, :] + i[:, None] * DV, mask=(i < filled)[:, None], other=0.0)

    token = (row * N).to(tl.int64)
    value_at = qkv + token * qkv_stride + 2 * HK * DK + vh * DV + v
    out_at = out + (token * HV + vh) * DV + v
    query_at = qkv + token * qkv_stride + kh * DK + d
    key_at = query_at + HK * DK
    new_u = ()
    for t in tl.static_range(N):
        y = _meet(S, old_u, key_at + t * qkv_stride, coef, t, STATE, i, W)
        u = tl.load(value_at + t * qkv_stride).to(tl.float32) - y
        for s in tl.static_range(t):
            u -= tl.load(coef + NEW + t * N + s) * new_u[s]
        u *= tl.load(coef + BETA + t)
        new_u = new_u + (u,)  # type: ignore[assignment]  # noqa: RUF005
    for t in tl.static_range(N):
        y = _meet(S, old_u, query_at + t * qkv_stride, coef, N + t, STATE, i, W)
        for s in tl.static_range(t + 1):
            y += tl.load(coef + NEW + (N + t) * N + s) * new_u[s]
        tl.store(out_at + t * HV * DV, y.to(out.dtype.element_ty))

    place = filled
    if filled + N > W:
        place = filled * 0
        old_key_at = old_keys + (row * HK + kh).to(tl.int64) * W * DK + d
        S = S * tl.load(coef + OWN)
        for j in range(filled):
            k_j = tl.load(old_key_at + j * DK) * tl.load(coef + SHARE + j)
            S += k_j[:, None] * tl.load(u_at + j * DV)[None, :]
        _put_state(state_at, S)
    tl.debug_barrier()  # every warp has read the old rows before any is overwritten
    for t in tl.static_range(N):
        tl.store(u_at + (place + t) * DV, new_u[t])


def outputs(qkv: Tensor, cache: GDNState, rows: DecodeRows) -> Tensor:
    """For the rows' results."""
    tokens = rows.slots.shape[0] * rows.width
    heads, dim = cache.state.shape[1], cache.state.shape[3]
    return torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)


def buffers(cache: GDNState, rows: DecodeRows) -> tuple[Tensor, Tensor]:
    """For what the first kernel leaves for the second: coefficients as _layout has them, and old
    keys."""
    count, n = rows.slots.shape[0], rows.width
    key_heads, window, key_dim = cache.window_k.shape[1:]
    value_heads = cache.state.shape[1]
    size = 2 * n * (window + n + 1) + n + window + 1
    coefs = cache.window_g.new_empty(count, value_heads, size)
    return coefs, cache.window_g.new_empty(count, key_heads, window, key_dim)


def launch(
    qkv: Tensor,
    gates: tuple[Tensor, ...],
    raw: bool,
    cache: GDNState,
    fill: Tensor,
    rows: DecodeRows,
    config: tuple[int, int] | None,
    out: Tensor,
) -> None:
    """Run both kernels. gates: g, beta, A_log, dt_bias; raw: the first two are projections a and b.

    config: (value tile, warps) of the second one.
    """
    between = buffers(cache, rows)
    count, n = rows.slots.shape[0], rows.width
    key_heads, window, key_dim = cache.window_k.shape[1:]
    value_heads, _, value_dim = cache.state.shape[1:]
    shape = {"N": n, "W": window, "WB": max(16, triton.next_power_of_2(window)), "DK": key_dim}
    shape["RATIO"] = value_heads // key_heads
    _prepare_kernel[(key_heads, count)](
        qkv, *gates, cache.window_k, cache.window_g, fill, rows.slots, *between,
        qkv.stride(0), gates[0].stride(0), key_heads, value_heads,
        **shape, NB=max(8, triton.next_power_of_2(n)), RAW=raw, num_warps=2,
    )  # fmt: skip
    tile, warps = config or (min(16, value_dim), 1)
    _answer_kernel[(value_heads * (value_dim // tile), count)](
        qkv, cache.state, cache.window_u, fill, rows.slots, *between, out,
        qkv.stride(0), key_heads, value_heads,
        **shape, DV=value_dim, BV=tile, num_warps=warps,
    )  # fmt: skip
