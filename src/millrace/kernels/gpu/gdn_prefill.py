"""GDN over prompts, chunk by chunk: the window form with a chunk of 64 tokens as the window.

Within a chunk the deltas solve (I + A) U = B V - (B e^G K) S with A strictly lower triangular, B
the betas, G the running log decay and S the state before the chunk. The first kernel, parallel over
chunks, solves for both right-hand sides without S: U0 = (I + A)^-1 B V, and W likewise. The second
walks a row's chunks in order with the state in registers: U = U0 - W S, outputs, next state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import GDNState, PrefillRows
from millrace.kernels.gpu.gdn_blocks import by_blocks
from millrace.kernels.gpu.gdn_decode import L2_EPS, _dot

CHUNK = tl.constexpr(64)
FLA_TOKENS = 6144
WAY = "library"  # or "blocks": gdn_blocks.py for any number of tokens, not yet timed on a GPU


@triton.jit
def _invert_blocks(A):
    """(I + A)^-1 of the diagonal blocks of A [64, 64], each 16 x 16, strictly lower: [4, 16, 16].

    By plain forward substitution, the four side by side, so that nothing grows beyond the result.
    """
    b = tl.arange(0, 4)
    r = tl.arange(0, 16)
    own = (b[:, None] == b[None, :])[:, None, :, None]
    D = tl.sum(tl.where(own, tl.reshape(A, (4, 16, 4, 16)), 0.0), axis=2)
    X = tl.where((r[:, None] == r[None, :])[None, :, :], 1.0, tl.zeros((4, 16, 16), tl.float32))
    for i in range(1, 16):
        at = (r == i)[None, :, None]
        row = tl.sum(tl.where(at, D, 0.0), axis=1)
        step = tl.sum(row[:, :, None] * X, axis=1)
        X -= tl.where(at, step[:, None, :], 0.0)
    return X


@triton.jit
def _invert(A):
    """(I + A)^-1 for a strictly lower triangular A [64, 64], in float32.

    With X the inverse of the diagonal blocks and M = X (A without them), it is (I + M)^-1 X; M has
    four block rows and is strictly lower by blocks, so (I + M)^-1 = (I - M) (I + M^2) exactly.
    """
    b = tl.arange(0, 4)
    r = tl.arange(0, 64)
    own = (b[:, None] == b[None, :])[:, None, :, None]
    X = tl.reshape(tl.where(own, _invert_blocks(A)[:, :, None, :], 0.0), (64, 64))
    eye = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    M = _dot(X, tl.where((r // 16)[:, None] > (r // 16)[None, :], A, 0.0))
    even = eye + _dot(M, M)
    return _dot(even - _dot(M, even), X)


@triton.jit
def _normalised(at, mask, scale, dtype: tl.constexpr):
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return (x * (scale / tl.sqrt(tl.sum(x * x, axis=1) + L2_EPS))[:, None]).to(dtype)


@triton.jit
def _solve_kernel(
    qkv, g, beta, offsets, w, u, gsum, qkv_stride, gate_stride, HK, HV,
    DK: tl.constexpr, DV: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """W, U0 and G of one chunk and value head."""
    chunk = tl.program_id(0)
    vh = tl.program_id(1)
    row = tl.program_id(2)
    begin = tl.load(offsets + row)
    count = tl.load(offsets + row + 1) - begin
    if chunk * CHUNK < count:
        dtype = w.dtype.element_ty
        r = tl.arange(0, CHUNK)
        d = tl.arange(0, DK)
        v = tl.arange(0, DV)
        live = chunk * CHUNK + r < count
        token = (begin + chunk * CHUNK + r).to(tl.int64)
        x_at = qkv + token[:, None] * qkv_stride
        k = _normalised(x_at + ((HK + vh // RATIO) * DK + d)[None, :], live[:, None], 1.0, dtype)
        b = tl.load(beta + token * gate_stride + vh, mask=live, other=0.0).to(tl.float32)
        decay = tl.load(g + token * gate_stride + vh, mask=live, other=0.0).to(tl.float32)
        G = tl.cumsum(decay, axis=0)
        gap = tl.where(r[:, None] > r[None, :], G[:, None] - G[None, :], -float("inf"))
        T = _invert(_dot(k, tl.trans(k)) * tl.exp(gap) * b[:, None]) * b[None, :]
        value_at = x_at + (2 * HK * DK + vh * DV + v)[None, :]
        value = tl.load(value_at, mask=live[:, None], other=0.0).to(dtype)
        head = token * HV + vh
        U = _dot(T.to(dtype), value).to(u.dtype.element_ty)
        tl.store(u + head[:, None] * DV + v[None, :], U, mask=live[:, None])
        W = _dot((T * tl.exp(G)[None, :]).to(dtype), k).to(dtype)
        tl.store(w + head[:, None] * DK + d[None, :], W, mask=live[:, None])
        tl.store(gsum + head, G, mask=live)


@triton.jit
def _scan_kernel(
    qkv, w, u, gsum, offsets, slots, state, out, qkv_stride, HK, HV,
    DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, RATIO: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Walk one row, value head and tile of value channels."""
    vh = tl.program_id(1)
    row = tl.program_id(2)
    begin = tl.load(offsets + row)
    count = tl.load(offsets + row + 1) - begin
    slot = tl.load(slots + row).to(tl.int64)
    dtype = w.dtype.element_ty
    d = tl.arange(0, DK)
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    r = tl.arange(0, CHUNK)
    state_at = state + ((slot * HV + vh) * DK + d[:, None]) * DV + v[None, :]
    S = tl.load(state_at).to(tl.float32)
    for start in tl.range(0, count, CHUNK, num_stages=STAGES):
        live = start + r < count
        token = (begin + start + r).to(tl.int64)
        head = token * HV + vh
        q_at = qkv + token[:, None] * qkv_stride + (vh // RATIO) * DK + d[None, :]
        q = _normalised(q_at, live[:, None], DK**-0.5, dtype)
        k = _normalised(q_at + HK * DK, live[:, None], 1.0, dtype)
        W = tl.load(w + head[:, None] * DK + d[None, :], mask=live[:, None], other=0.0)
        U = tl.load(u + head[:, None] * DV + v[None, :], mask=live[:, None], other=0.0)
        final = begin + tl.minimum(start + CHUNK, count) - 1
        last = tl.load(gsum + final.to(tl.int64) * HV + vh)
        G = tl.load(gsum + head, mask=live, other=0.0)
        G = tl.where(live, G, last)
        rounded = S.to(dtype)
        new = U.to(tl.float32) - _dot(W, rounded)
        gap = tl.where(r[:, None] >= r[None, :], G[:, None] - G[None, :], -float("inf"))
        scores = _dot(q, tl.trans(k)) * tl.exp(gap)
        o = _dot(q, rounded) * tl.exp(G)[:, None]
        o += _dot(scores.to(dtype), new.to(dtype))
        tl.store(out + head[:, None] * DV + v[None, :], o.to(out.dtype.element_ty), live[:, None])
        late = (new * tl.exp(last - G)[:, None]).to(dtype)
        S = S * tl.exp(last) + _dot(tl.trans(k), late)
    tl.store(state_at, S.to(state.dtype.element_ty))


def gdn_prefill(
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    cache: GDNState,
    rows: PrefillRows,
    config: tuple[torch.dtype, int, int, int, int] | None = None,
) -> Tensor:
    """As the reference. config: (operands of the products, value tile, warps of the solve, warps
    and stages of the scan); None takes flash-linear-attention for many tokens, where it is
    installed: its many launches cost more than ours, its products less.
    """
    if config is None and WAY == "blocks":
        return by_blocks(qkv, g, beta, cache, rows)
    many = qkv.shape[0] >= FLA_TOKENS
    if config is None and many and qkv.dtype == torch.bfloat16 and _fla() is not None:
        return _by_fla(qkv, g, beta, cache, rows)
    tokens, (key_heads, _, key_dim) = qkv.shape[0], cache.window_k.shape[1:]
    _, value_heads, _, value_dim = cache.state.shape
    dtype, tile, solve_warps, warps, stages = config or _config(qkv.dtype)
    ratio, tile = value_heads // key_heads, min(tile, value_dim)
    w = torch.empty(tokens, value_heads, key_dim, dtype=dtype, device=qkv.device)
    u = torch.empty(tokens, value_heads, value_dim, dtype=dtype, device=qkv.device)
    gsum = torch.empty(tokens, value_heads, dtype=torch.float32, device=qkv.device)
    out = torch.empty(tokens, value_heads, value_dim, dtype=qkv.dtype, device=qkv.device)
    shape = {"DK": key_dim, "DV": value_dim, "RATIO": ratio}
    count = len(rows.counts)
    _solve_kernel[(triton.cdiv(rows.max_count, CHUNK.value), value_heads, count)](
        qkv, g, beta, rows.offsets, w, u, gsum, qkv.stride(0), g.stride(0), key_heads,
        value_heads, **shape, num_warps=solve_warps,
    )  # fmt: skip
    _scan_kernel[(value_dim // tile, value_heads, count)](
        qkv, w, u, gsum, rows.offsets, rows.slots, cache.state, out, qkv.stride(0), key_heads,
        value_heads, **shape, BV=tile, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


def _config(dtype: torch.dtype) -> tuple[torch.dtype, int, int, int, int]:
    if dtype == torch.float32:
        return torch.float32, 32, 4, 4, 1
    return torch.bfloat16, 64, 4, 4, 2


@functools.cache
def _fla() -> Callable[..., tuple[Tensor, Tensor]] | None:
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    chunked: Callable[..., tuple[Tensor, Tensor]] = chunk_gated_delta_rule
    return chunked


def _by_fla(qkv: Tensor, g: Tensor, beta: Tensor, cache: GDNState, rows: PrefillRows) -> Tensor:
    """The library's form, with our gather and scatter of states, and no wait for the device."""
    chunked = _fla()
    assert chunked is not None
    key_heads, _, key_dim = cache.window_k.shape[1:]
    _, value_heads, _, value_dim = cache.state.shape
    q, k, v = qkv.split([key_heads * key_dim] * 2 + [value_heads * value_dim], -1)
    q, k, v = (
        x.unflatten(-1, (-1, dim)).unsqueeze(0).contiguous()
        for x, dim in ((q, key_dim), (k, key_dim), (v, value_dim))
    )
    o, state = chunked(
        q, k, v, g.unsqueeze(0), beta.unsqueeze(0), initial_state=cache.state[rows.slots].float(),
        output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=rows.offsets.long(),
        chunk_indices=_chunk_indices(rows.counts, qkv.device),
    )  # fmt: skip
    cache.state[rows.slots] = state.to(cache.state.dtype)
    return o[0]


@functools.lru_cache(maxsize=8)
def _chunk_indices(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(row, chunk) of every chunk of these rows: int64 [chunks, 2]."""
    pairs = [(row, c) for row, count in enumerate(counts) for c in range(-(-count // CHUNK.value))]
    return torch.tensor(pairs).pin_memory().to(device, non_blocking=True)
