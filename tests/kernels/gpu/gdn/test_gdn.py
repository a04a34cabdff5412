"""GDN on the GPU against the torch reference: odd fills, folds, stale NaN, null rows, widths."""

from __future__ import annotations

import copy

import pytest
import torch

from millrace.kernels import gdn
from millrace.kernels.batch import Batch, DecodeRows, GDNState, PrefillRows
from tests.kernels.gpu.gpu_support import INTERPRETED, on_each_device, relative


def make_cache(
    slots: int, heads: tuple[int, int], dims: tuple[int, int], window: int, width: int, device: str
) -> GDNState:
    """Random states; windows and buffers full of NaN."""
    (hk, hv), (dk, dv) = heads, dims
    channels = 2 * hk * dk + hv * dv
    return GDNState(
        torch.randn(slots, hv, dk, dv, device=device),
        torch.full((slots, hk, window, dk), torch.nan, device=device),
        torch.full((slots, hv, window, dv), torch.nan, device=device),
        torch.full((slots, hv, window), torch.nan, device=device),
        torch.randn(slots, 2 + width, channels, device=device),
    )


def fill_windows(cache: GDNState, fill: torch.Tensor) -> None:
    """Live rows in front of each window's NaN."""
    for slot, count in enumerate(fill.tolist()):
        k, u, g = (x[slot, :, :count] for x in (cache.window_k, cache.window_u, cache.window_g))
        k.copy_(torch.nn.functional.normalize(torch.randn_like(k), dim=-1))
        u.normal_()
        g.copy_(-torch.rand_like(g).cumsum(-1))


CONFIGS = [None, (32, 2)]


@on_each_device
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("width", [1, 3, 6] if INTERPRETED else [1, 2, 3, 5, 6])
def test_decode(device: str, width: int, config: tuple[int, int] | None, raw: bool):
    from millrace.kernels.gpu.gdn import decode as gpu

    torch.manual_seed(width)
    heads, dims, window, slots = (2, 6), (32, 32), 18, 9
    cache = make_cache(slots, heads, dims, window, width, device)
    fill = torch.randint(0, window + 1, (slots,), dtype=torch.int32)
    order = torch.tensor([6, 1, 8, 3, 4])
    fill[order[:4]] = torch.tensor([0, window, window - width, window - width + 1]).int()
    fill_windows(cache, fill)
    tokens = len(order) * width
    qkv = torch.randn(tokens, cache.conv.shape[2], device=device)
    a, b = torch.randn(tokens, 2 * heads[1], device=device).split(heads[1], -1)
    a_log, bias = torch.rand(2, heads[1], device=device)
    g, beta = gdn.gates.__wrapped__(a, b, a_log, bias)
    rows = DecodeRows(order.to(device), torch.zeros_like(order).to(device), width, 1)
    expected = copy.deepcopy(cache)
    fill = fill.to(device)
    want = gdn.gdn_decode.__wrapped__(qkv, g, beta, expected, fill, rows)
    inputs = (a, b, (a_log, bias)) if raw else (g, beta, None)
    got = gpu.launch(qkv, *inputs, cache, fill, rows, config)
    assert relative(got, want) < 2e-5
    for name in ("state", "window_k", "window_u", "window_g"):
        assert relative(getattr(cache, name), getattr(expected, name)) < 1e-5, name


@on_each_device
@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2] if INTERPRETED else [1, 2, 4, 6])
def test_decode_with_its_convolution(device: str, width: int, model: torch.dtype):
    """One op does what two do, to the bit, for tokens that are a slice of a wider projection."""
    from millrace.kernels.gpu import gdn as gpu

    torch.manual_seed(width)
    heads, dims, window, slots = (2, 6), (64, 64), 16, 9
    if INTERPRETED:
        heads, dims = (1, 2), (32, 32)
    cache = make_cache(slots, heads, dims, window, width, device)
    cache.conv = cache.conv.to(model)
    fill = torch.randint(0, window + 1, (slots,), dtype=torch.int32)
    order = torch.tensor([6, 1, 8, 0, 0, 3, 4], device=device)
    fill[[6, 1, 8, 3]] = torch.tensor([0, window, window - width, window - width + 1]).int()
    fill_windows(cache, fill)
    tokens, channels = len(order) * width, cache.conv.shape[2]
    x = torch.randn(tokens + 5, channels + 40, device=device).to(model)[:tokens, :channels]
    weight = torch.randn(channels, 4, device=device).to(model)
    a, b = torch.randn(tokens, 2 * heads[1], device=device).to(model).split(heads[1], -1)
    gating = torch.rand(2, heads[1], device=device).unbind()
    fill = fill.to(device)
    offset = torch.randint(0, width, (slots,), dtype=torch.int32, device=device)
    rows = DecodeRows(order, torch.zeros_like(order), width, 1)
    twin = copy.deepcopy(cache)
    qkv = gpu.conv_decode(x, twin, weight, rows, offset)
    want = gpu.gdn_decode_raw(qkv, a, b, *gating, twin, fill, rows)
    got = gpu.gdn_decode_conv(x, weight, a, b, *gating, cache, fill, offset, rows)
    live = (order != 0).repeat_interleave(width)
    assert torch.equal(got[live], want[live])
    for name in ("state", "conv", "window_k", "window_u", "window_g"):
        mine, theirs = (getattr(found, name)[1:].nan_to_num(9.0) for found in (cache, twin))
        assert torch.equal(mine, theirs), name


@on_each_device
def test_null_rows_do_not_reach_live_ones(device: str):
    from millrace.kernels.gpu.gdn import decode as gpu

    torch.manual_seed(1)
    cache = make_cache(4, (1, 2), (32, 32), 16, 2, device)
    cache.state[0] = torch.nan
    fill = torch.tensor([16, 3, 16, 0], dtype=torch.int32)
    fill_windows(cache, torch.tensor([0, 3, 16, 0]))
    order, fill = torch.tensor([2, 0, 1, 0], device=device), fill.to(device)
    rows = DecodeRows(order, torch.zeros_like(order), 2, 1)
    qkv = torch.randn(8, cache.conv.shape[2], device=device)
    qkv[2:4], qkv[6:] = torch.nan, torch.nan
    g, beta = -torch.rand(8, 2, device=device), torch.rand(8, 2, device=device)
    alone = copy.deepcopy(cache)
    got = gpu.launch(qkv, g, beta, None, cache, fill, rows)
    some = order[::2].contiguous()
    live = DecodeRows(some, torch.zeros_like(some), 2, 1)
    keep = torch.tensor([0, 1, 4, 5], device=device)
    want = gdn.gdn_decode.__wrapped__(qkv[keep], g[keep], beta[keep], alone, fill, live)
    assert relative(got[keep], want) < 2e-5
    assert relative(cache.state[1:], alone.state[1:]) < 1e-5


@on_each_device
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no bfloat16 products")
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16])
def test_a_narrow_state_and_model(device: str, state: torch.dtype, raw: bool):
    from millrace.kernels.gpu.gdn import decode as gpu

    torch.manual_seed(2)
    cache = make_cache(8, (2, 4), (64, 64), 16, 2, device)
    cache.state = cache.state.to(state)
    cache.window_k = cache.window_k.bfloat16()
    fill = torch.tensor([0, 1, 5, 14, 15, 16, 7, 8], dtype=torch.int32)
    fill_windows(cache, fill)
    order = torch.arange(1, 8, device=device)
    rows = DecodeRows(order, torch.zeros_like(order), 2, 1)
    qkv = torch.randn(14, cache.conv.shape[2], device=device).bfloat16()
    a, b = torch.randn(14, 8, device=device).bfloat16().split(4, -1)
    a_log, bias = torch.rand(2, 4, device=device)
    g, beta = gdn.gates.__wrapped__(a, b, a_log, bias)
    expected, fill = copy.deepcopy(cache), fill.to(device)
    want = gdn.gdn_decode.__wrapped__(qkv, g, beta, expected, fill, rows)
    inputs = (a, b, (a_log, bias)) if raw else (g, beta, None)
    got = gpu.launch(qkv, *inputs, cache, fill, rows)
    assert relative(got, want) < 6e-3  # outputs in bfloat16; the reference rounds a commit first
    assert relative(cache.state, expected.state) < 1e-3
    assert relative(cache.window_g, expected.window_g) < 1e-5


@on_each_device
def test_what_a_float16_state_cannot_hold(device: str):
    """Becomes its largest number, in a fold and at the end of a prompt; the rest is as it would be
    in float32."""
    from millrace.kernels.gpu.gdn import decode as gpu
    from millrace.kernels.gpu.gdn.prefill import gdn_prefill

    torch.manual_seed(3)
    cache = make_cache(3, (1, 2), (32, 32), 16, 2, device)
    cache.state = cache.state.half()
    cache.state[:, 1, 3] = 60000.0
    fill = torch.full((3,), 16, dtype=torch.int32)
    fill_windows(cache, fill)
    cache.window_u[:, 1] = 9e4
    cache.window_k[:, :, :, 3] = 1.0
    cache.window_g[:] = 0.0
    slots = torch.tensor([1, 2], device=device)
    expected, wide = copy.deepcopy(cache), copy.deepcopy(cache)
    wide.state = wide.state.float()
    rows = DecodeRows(slots, torch.zeros_like(slots), 2, 1)
    qkv = torch.randn(4, cache.conv.shape[2], device=device)
    g, beta = -torch.rand(4, 2, device=device), torch.rand(4, 2, device=device)
    for one in (expected, wide):
        gdn.gdn_decode.__wrapped__(qkv, g, beta, one, fill.to(device), rows)
    gpu.launch(qkv, g, beta, None, cache, fill.to(device), rows)
    assert float(wide.state[1:, 1, 3].min()) > 65504
    assert torch.equal(expected.state[1:], wide.state[1:].clamp(-65504, 65504).half())
    assert bool((cache.state[1:, 1, 3] == 65504).all())
    assert relative(cache.state[1:, 0], expected.state[1:, 0]) < 1e-3
    cache.window_u[:], cache.state[:, 1] = 0.0, 65504.0
    prompt = make_prefill_rows((2,), [1], device)
    qkv[:, 64:] = 9e7
    gdn_prefill(qkv, g * 0, beta * 0 + 1, cache, prompt)
    assert bool(cache.state[1].isfinite().all())
    assert float(cache.state[1].abs().max()) == 65504.0


@on_each_device
@pytest.mark.parametrize("rank_fingerprint", [0.0, 1.0, 100.0])
def test_prefill(device: str, rank_fingerprint: float):
    """Lengths at the edges of chunks and blocks, and keys that resemble each other: nothing in the
    solve may grow, not even where all keys are one and nothing decays."""
    from millrace.kernels.gpu.gdn.prefill import gdn_prefill

    torch.manual_seed(3)
    counts = (1, 64, 81, 15, 33, 65)
    heads, dims = (1, 2), (32, 32)
    cache = make_cache(9, heads, dims, 16, 2, device)
    tokens = sum(counts)
    qkv = torch.randn(tokens, cache.conv.shape[2] + 24, device=device)[:, 8:-16]
    qkv[:, dims[0] : 2 * dims[0]] += rank_fingerprint
    g, beta = -0.1 * torch.rand(tokens, 2, device=device), torch.rand(tokens, 2, device=device)
    if rank_fingerprint > 1:
        g, beta = torch.zeros_like(g), torch.ones_like(beta)
    rows = make_prefill_rows(counts, [3, 1, 7, 2, 5, 8], device)
    expected = copy.deepcopy(cache)
    want = gdn.gdn_prefill.__wrapped__(qkv, g, beta, expected, rows)
    got = gdn_prefill(qkv, g, beta, cache, rows)
    limit = 1e-5 if INTERPRETED else 2e-3  # compiled products are in tf32
    assert relative(got, want) < limit
    assert relative(cache.state, expected.state) < limit


def make_prefill_rows(counts: tuple[int, ...], slots: list[int], device: str) -> PrefillRows:
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    chosen = torch.tensor(slots, device=device)
    return PrefillRows(chosen, torch.zeros_like(chosen), offsets, counts, (0,) * len(counts))


@on_each_device
@pytest.mark.parametrize("width", [1, 2, 4])
def test_conv_decode(device: str, width: int):
    from millrace.kernels.gpu.gdn import conv

    torch.manual_seed(width)
    cache = make_cache(6, (2, 5), (32, 64), 16, 5, device)
    channels = cache.conv.shape[2]
    expected = copy.deepcopy(cache)
    offset = torch.randint(0, width, (6,), dtype=torch.int32, device=device)
    x = torch.randn(3 * width, channels + 40, device=device)[:, :channels]
    weight = torch.randn(channels, 4, device=device)
    order = torch.tensor([4, 1, 5], device=device)
    rows = DecodeRows(order, torch.zeros_like(order), width, 1)
    want = gdn.conv_decode.__wrapped__(x, expected, weight, rows, offset)
    assert relative(conv.conv_decode(x, cache, weight, rows, offset), want) < 1e-5
    assert torch.equal(cache.conv, expected.conv)


@on_each_device
def test_conv_prefill(device: str):
    from millrace.kernels.gpu.gdn import conv

    torch.manual_seed(4)
    cache = make_cache(9, (1, 2), (32, 64), 16, 3, device)
    channels, counts = cache.conv.shape[2], (1, 2, 40, 3, 64)
    expected = copy.deepcopy(cache)
    offset = torch.randint(0, 3, (9,), dtype=torch.int32, device=device)
    x = torch.randn(sum(counts), channels + 8, device=device)[:, :channels]
    weight = torch.randn(channels, 4, device=device)
    rows = make_prefill_rows(counts, [3, 1, 7, 2, 5], device)
    want = gdn.conv_prefill.__wrapped__(x, expected, weight, rows, offset)
    assert relative(conv.conv_prefill(x, cache, weight, rows, offset), want) < 1e-5
    assert torch.equal(cache.conv, expected.conv)


@on_each_device
@pytest.mark.parametrize("decode", [0, 2])
def test_a_padded_batch(device: str, decode: int):
    """Both kinds of rows at once, in more room than they need; padding touches no slot."""
    from millrace.kernels.gpu import gdn as gpu

    torch.manual_seed(8)
    width, heads, dims = 2, (1, 2), (64, 64)
    cache = make_cache(9, heads, dims, 16, width, device)
    channels, fill = cache.conv.shape[2], torch.tensor([0, 0, 0, 0, 3, 0, 0, 15, 0]).int()
    fill_windows(cache, fill)
    expected = copy.deepcopy(cache)
    counts = (3, 70, 0, 0)
    offsets = torch.tensor([decode * width, *counts]).cumsum(0).int().to(device)
    slots = torch.tensor([2, 6, 0, 0], device=device)
    rows = PrefillRows(slots, torch.zeros_like(slots), offsets, None, None, 100)
    known = torch.tensor([7, 4, 0, 0, 0] if decode else [0, 0], device=device)
    part = DecodeRows(known, torch.zeros_like(known), width, 100)
    tokens = torch.zeros(96, dtype=torch.int64, device=device)
    batch = Batch(tokens, tokens, tokens, part, rows, padded=True)
    x = torch.randn(96, channels, device=device)
    a, b = torch.randn(96, 2 * heads[1], device=device).split(heads[1], -1)
    weight = torch.randn(channels, 4, device=device)
    gating = torch.rand(2, heads[1], device=device)
    offset = torch.tensor([0, 0, 1, 0, 1, 0, 0, 1, 0], dtype=torch.int32, device=device)
    given = (x, weight, a, b, *gating)
    want = gdn.gdn.__wrapped__(*given, expected, fill.to(device), offset, batch)
    got = gpu.gdn(*given, cache, fill.to(device), offset, batch)
    live = decode * width + sum(counts)
    limit = 1e-5 if INTERPRETED else 2e-3
    assert relative(got[:live], want[:live]) < limit
    for name in ("state", "window_k", "window_u", "window_g", "conv"):
        mine, theirs = getattr(cache, name), getattr(expected, name)
        assert relative(mine[1:], theirs[1:]) < limit, name
        assert relative(mine[0], theirs[0]) == 0, name


@on_each_device
def test_gates(device: str):
    from millrace.kernels.gpu.gdn import conv

    torch.manual_seed(5)
    a, b = (torch.randn(7, 24, device=device) * 8).split(12, -1)
    a_log, bias = torch.randn(2, 12, device=device)
    pairs = zip(
        conv.gates(a, b, a_log, bias), gdn.gates.__wrapped__(a, b, a_log, bias), strict=True
    )
    assert all(relative(got, want) < 1e-5 for got, want in pairs)
