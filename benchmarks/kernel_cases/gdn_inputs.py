"""Inputs of the GDN ops, and what they must come to: token by token in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_cases.shapes import DEVICE, FULL, WINDOW, Sizes
from millrace.kernels import gdn
from millrace.kernels.batch import GDNState, PrefillRows


def gdn_cache(slots: int, n: int, state: torch.dtype, sizes: Sizes = FULL) -> GDNState:
    """State and live windows of random values; keys normalised."""
    rand = torch.randn(
        slots, sizes.value_heads, sizes.dim, sizes.dim, device=DEVICE, dtype=torch.float32
    )
    k = torch.randn(slots, sizes.key_heads, WINDOW, sizes.dim, device=DEVICE)
    return GDNState(
        rand.mul_(0.1).to(state),
        torch.nn.functional.normalize(k, dim=-1),
        torch.randn(slots, sizes.value_heads, WINDOW, sizes.dim, device=DEVICE),
        -torch.rand(slots, sizes.value_heads, WINDOW, device=DEVICE).mul_(0.1).cumsum(-1),
        torch.randn(slots, 2 + n, sizes.channels, device=DEVICE).bfloat16(),
    )


def gdn_inputs(tokens: int, sizes: Sizes = FULL) -> tuple[Tensor, Tensor, Tensor]:
    qkv = torch.randn(tokens, sizes.channels, device=DEVICE).bfloat16()
    g = -torch.rand(tokens, sizes.value_heads, device=DEVICE) * 0.1
    return qkv, g, torch.rand(tokens, sizes.value_heads, device=DEVICE)


def gdn_truth(
    cache: GDNState,
    fill: Tensor,
    slot: int,
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    sizes: Sizes = FULL,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row token by token in float64: outputs, the new u, its state before the new tokens and
    behind them."""
    f = int(fill[slot])
    ratio = sizes.value_heads // sizes.key_heads
    S = cache.state[slot].double()
    if f:
        k = cache.window_k[slot, :, :f].double().repeat_interleave(ratio, 0)
        log = cache.window_g[slot, :, :f].double()
        share = (log[:, -1:] - log).exp().unsqueeze(-1)
        S = S * log[:, -1].exp()[:, None, None]
        S = S + (k * share).transpose(1, 2) @ cache.window_u[slot, :, :f].double()
    folded, out, us = S, [], []
    for t in range(len(qkv)):
        qk, v = qkv[t].double().split([2 * sizes.keys, sizes.values])
        qk = qk.view(2, sizes.key_heads, sizes.dim)
        qk = qk * (qk.square().sum(-1, keepdim=True) + gdn.L2_EPS).rsqrt()
        q, k = (x.repeat_interleave(ratio, 0) for x in (qk[0] * sizes.dim**-0.5, qk[1]))
        S = S * g[t].double().exp()[:, None, None]
        u = v.view(sizes.value_heads, sizes.dim) - torch.einsum("hkv,hk->hv", S, k)
        us.append(u * beta[t].double()[:, None])
        S = S + k[:, :, None] * us[-1][:, None]
        out.append(torch.einsum("hkv,hk->hv", S, q))
    return torch.stack(out), torch.stack(us, 1), folded, S


def prefill_rows(counts: tuple[int, ...], starts: tuple[int, ...] | None = None) -> PrefillRows:
    starts = starts or (0,) * len(counts)
    offsets = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    slots = torch.randperm(len(counts), device=DEVICE) + 1
    return PrefillRows(slots, torch.tensor(starts, device=DEVICE), offsets, counts, starts)
