"""Gated DeltaNet in windows that begin at fixed positions: one kernel for rows of any kind.

Every product and sum of a token has one shape: [W, ...], W the rows of a window, whatever of them
there is. So a token gets the same bits as part of a prompt, of a row of drafts, or alone. Windows
are written by a second kernel, because the value heads of a key head read its keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import Batch, FixedRows, GDNState, PrefillRows
from millrace.kernels.gpu.gdn.conv import (
    PROMPT_TILE,
    STRIP,
    _conv_decode_kernel,
    _conv_prefill_kernel,
    _keep_last_kernel,
    gates,
)
from millrace.kernels.gpu.gdn.decode_triton import L2_EPS, _dot

VALUES = 32  # channels of a value head that a program has
ROW_ARRAYS = ["slots", "offsets"]


@triton.jit
def _normalise_kernel(qkv, out, stride, HK, DK: tl.constexpr, DKB: tl.constexpr):
    """out: float32 [T, 2 HK, DK]: queries, then keys, of norm 1; queries times DK ** -0.5."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, DKB)
    x = tl.load(qkv + token * stride + head * DK + d, mask=d < DK, other=0.0).to(tl.float32)
    x = x / tl.sqrt(tl.sum(x * x, axis=0) + L2_EPS)
    x = tl.where(head < HK, x * (1.0 / tl.sqrt(DK * 1.0)), x)
    tl.store(out + (token * 2 * HK + head) * DK + d, x, mask=d < DK)


@triton.jit
def _row_of(X, i, W: tl.constexpr):
    """Row i of X [W, ...], exactly: the others add zeros."""
    return tl.sum(tl.where((tl.arange(0, W) == i)[:, None], X, 0.0), axis=0)


@triton.jit
def _folded(S, K, U, log_a, W: tl.constexpr):
    """The state after a full window."""
    last = tl.sum(tl.where(tl.arange(0, W) == W - 1, log_a, 0.0), axis=0)
    return S * tl.exp(last) + _dot(tl.trans(K * tl.exp(last - log_a)[:, None]), U)


@triton.jit(do_not_specialize=["prompts"], do_not_specialize_on_alignment=ROW_ARRAYS)
def _fixed_kernel(
    probes, qkv, g, beta, state, window_k, window_u, window_g, fill, slots, offsets, out,
    stride, prompts, HK, HV,
    RATIO: tl.constexpr, DK: tl.constexpr, DKB: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """A row's tokens of one value head, BV of its channels. out is zeros before."""
    row, vh = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    token = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    kh = vh // RATIO
    i, j, d = tl.arange(0, W), tl.arange(0, DKB), tl.program_id(2) * BV + tl.arange(0, BV)
    in_d, in_k = d < DV, (j < DK)[None, :]
    head = slot * HV + vh
    s_at = state + (head * DK + j)[:, None] * DV + d[None, :]
    s_mask = (j < DK)[:, None] & in_d[None, :]
    k_at = window_k + ((slot * HK + kh) * W + i)[:, None] * DK + j[None, :]
    u_at = window_u + (head * W + i)[:, None] * DV + d[None, :]
    g_at = window_g + head * W + i
    if slot == 0:
        token = end  # padding
    filled = tl.load(fill + slot)
    if (filled == W) & (token < end):
        K = tl.load(k_at, mask=in_k, other=0.0)
        U = tl.load(u_at, mask=in_d[None, :], other=0.0)
        S = tl.load(s_at, mask=s_mask, other=0.0).to(tl.float32)
        _put_masked(s_at, _folded(S, K, U, tl.load(g_at), W), s_mask)
        filled = filled * 0
    while token < end:
        tl.debug_barrier()
        n = tl.minimum(W - filled, end - token)
        old, new = i < filled, (i >= filled) & (i < filled + n)
        at = ((token + i - filled) * 2).to(tl.int64) * HK
        p_at = probes + j[None, :]
        q_mask = new[:, None] & in_k
        Q = tl.load(p_at + ((at + kh) * DK)[:, None], mask=q_mask, other=0.0)
        K = tl.load(p_at + ((at + HK + kh) * DK)[:, None], mask=q_mask, other=0.0)
        K += tl.load(k_at, mask=old[:, None] & in_k, other=0.0)
        U = tl.load(u_at, mask=old[:, None] & in_d[None, :], other=0.0)
        log_a = tl.load(g_at, mask=old, other=0.0)
        S = tl.load(s_at, mask=s_mask, other=0.0).to(tl.float32)
        by_key, by_query = _dot(K, S), _dot(Q, S)
        pairs, query_pairs = _dot(K, tl.trans(K)), _dot(Q, tl.trans(K))
        decay = tl.sum(tl.where(i == filled - 1, log_a, 0.0), axis=0)
        for t in range(filled, filled + n):
            here = (token + t - filled).to(tl.int64)
            decay += tl.load(g + here * HV + vh)
            log_a = tl.where(i == t, decay, log_a)
            share = tl.exp(tl.minimum(decay - log_a, 0.0))
            weights = tl.where(i < t, _row_of(pairs, t, W) * share, 0.0)
            v_at = qkv + here * stride + 2 * HK * DK + vh * DV + d
            v = tl.load(v_at, mask=in_d, other=0.0).to(tl.float32)
            seen = tl.exp(decay) * _row_of(by_key, t, W) + tl.sum(weights[:, None] * U, axis=0)
            u = tl.load(beta + here * HV + vh) * (v - seen)
            U = tl.where((i == t)[:, None], u[None, :], U)
            weights = tl.where(i <= t, _row_of(query_pairs, t, W) * share, 0.0)
            o = tl.exp(decay) * _row_of(by_query, t, W) + tl.sum(weights[:, None] * U, axis=0)
            tl.store(out + (here * HV + vh) * DV + d, o.to(out.dtype.element_ty), mask=in_d)
        token += n
        filled += n
        if prompts == 0:
            token = end
        if token < end:
            _put_masked(s_at, _folded(S, K, U, log_a, W), s_mask)
            filled = filled * 0
        else:
            tl.store(u_at, U, mask=(i < filled)[:, None] & in_d[None, :])


@triton.jit
def _put_masked(at, S, mask):
    """As _put_state, where the mask is."""
    if at.dtype.element_ty == tl.float16:
        S = tl.minimum(tl.maximum(S, -65504.0), 65504.0)
    tl.store(at, S.to(at.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["prompts"], do_not_specialize_on_alignment=ROW_ARRAYS)
def _keep_kernel(
    probes, g, window_k, window_g, fill, slots, offsets, prompts, HK, HV,
    DK: tl.constexpr, DKB: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Keys and log A of a row's last window. Heads: of keys, then of values."""
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    begin = tl.load(offsets + row)
    count = tl.load(offsets + row + 1) - begin
    filled = tl.load(fill + slot)
    filled = tl.where(filled == W, 0, filled)
    if prompts == 0:
        count = tl.minimum(count, W - filled)
    if (slot != 0) & (count > 0):
        # Rows of the last window that are new, and the token that is its row 0.
        ends = filled + count
        first = (ends - 1) // W * W
        i, j = tl.arange(0, W), tl.arange(0, DKB)
        place = first + i
        new = (place >= filled) & (place < ends)
        token = (begin + place - filled).to(tl.int64)
        if head < HK:
            at = probes + ((token * 2 + 1) * HK + head)[:, None] * DK + j[None, :]
            k_at = window_k + ((slot * HK + head) * W + i)[:, None] * DK + j[None, :]
            mask = new[:, None] & (j < DK)[None, :]
            tl.store(k_at, tl.load(at, mask=mask, other=0.0), mask=mask)
        else:
            vh = head - HK
            g_at = window_g + (slot * HV + vh) * W
            decay = tl.load(g_at + filled - 1, mask=(first == 0) & (filled > 0), other=0.0)
            for t in range(tl.maximum(first, filled), ends):
                here = (begin + t - filled).to(tl.int64)
                decay += tl.load(g + here * HV + vh)
                tl.store(g_at + t - first, decay)


def gdn_rows(
    qkv: Tensor, a: Tensor, b: Tensor, gating: tuple[Tensor, Tensor], cache: GDNState, fill: Tensor,
    slots: Tensor, offsets: Tensor, prompts: bool, out: Tensor,
) -> None:  # fmt: skip
    """As `gdn_fixed`, into out, which is zeros; rows stand anywhere in qkv."""
    _, HK, W, DK = cache.window_k.shape
    HV, DV = cache.state.shape[1], cache.state.shape[3]
    g, beta = gates(a, b, *gating)
    probes = torch.empty(qkv.shape[0], 2 * HK, DK, dtype=torch.float32, device=qkv.device)
    wide, rows = triton.next_power_of_2(DK), slots.shape[0]
    _normalise_kernel[(qkv.shape[0], 2 * HK)](
        qkv, probes, qkv.stride(0), HK, DK=DK, DKB=wide, num_warps=1
    )
    _fixed_kernel[(rows, HV, triton.cdiv(DV, VALUES))](
        probes, qkv, g, beta, cache.state, cache.window_k, cache.window_u, cache.window_g, fill,
        slots, offsets, out, qkv.stride(0), int(prompts), HK, HV,
        RATIO=HV // HK, DK=DK, DKB=wide, DV=DV, BV=VALUES, W=W, num_warps=4,
    )  # fmt: skip
    _keep_kernel[(rows, HK + HV)](
        probes, g, cache.window_k, cache.window_g, fill, slots, offsets, int(prompts), HK, HV,
        DK=DK, DKB=wide, W=W, num_warps=1,
    )  # fmt: skip


def gdn_fixed(
    qkv: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, cache: GDNState,
    fill: Tensor, rows: FixedRows,
) -> Tensor:  # fmt: skip
    """As the reference."""
    shape = qkv.shape[0], cache.state.shape[1], cache.state.shape[3]
    out = torch.zeros(shape, dtype=qkv.dtype, device=qkv.device)
    which = rows.slots, rows.offsets, rows.prompts
    gdn_rows(qkv, a, b, (A_log, dt_bias), cache, fill, *which, out)
    return out


def gdn_of_batch(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, gating: tuple[Tensor, Tensor],
    cache: GDNState, fill: Tensor, conv_offset: Tensor, batch: Batch,
) -> Tensor:  # fmt: skip
    """As `gdn`; batch invariant."""
    heads, dim = cache.state.shape[1], cache.state.shape[3]
    out = torch.zeros(x.shape[0], heads, dim, dtype=x.dtype, device=x.device)
    for rows, prompts in batch.as_prompts():
        qkv = _convolved(x, cache, weight, rows, conv_offset)
        _keep_inputs(x, cache, weight, rows, conv_offset, batch, prompts)
        gdn_rows(qkv, a, b, gating, cache, fill, rows.slots, rows.offsets, prompts, out)
    return out


def _convolved(
    x: Tensor, cache: GDNState, weight: Tensor, rows: PrefillRows, conv_offset: Tensor
) -> Tensor:
    tokens, channels = x.shape
    out = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
    block, strip, warps = PROMPT_TILE
    _conv_prefill_kernel[(triton.cdiv(channels, strip), triton.cdiv(tokens, block))](
        x, cache.conv, weight, rows.token_slots(tokens), conv_offset, rows.places(tokens), out,
        x.stride(0), cache.conv.stride(0), tokens, channels, BLOCK=block, STRIP=strip,
        num_warps=warps,
    )  # fmt: skip
    return out


def _keep_inputs(
    x: Tensor, cache: GDNState, weight: Tensor, rows: PrefillRows, conv_offset: Tensor,
    batch: Batch, prompts: bool,
) -> None:  # fmt: skip
    """Put the inputs that follow into the buffers: of rows of drafts, for any number that counts;
    their kernel convolves, too, which is dropped."""
    channels, count = x.shape[1], rows.slots.shape[0]
    grid = (triton.cdiv(channels, STRIP), count)
    if prompts:
        _keep_last_kernel[grid](
            x, cache.conv, rows.slots, conv_offset, rows.offsets, x.stride(0),
            cache.conv.stride(0), channels, STRIP=STRIP, num_warps=2,
        )  # fmt: skip
        return
    assert batch.decode is not None
    dropped = torch.empty(x.shape[0], channels, dtype=x.dtype, device=x.device)
    _conv_decode_kernel[grid](
        x, cache.conv, weight, rows.slots, conv_offset, dropped, x.stride(0),
        cache.conv.stride(0), channels, N=batch.decode.width, STRIP=STRIP, num_warps=2,
    )  # fmt: skip
