"""Attention and GDN over the batch of a large step: decode rows, many short prompts, much padding.

On a GPU in the shapes and dtypes of the 27B, elsewhere in small ones. The reference has the same
values in float32.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from millrace.kernels import attention, gdn
from millrace.kernels.batch import Batch, DecodeRows, GDNState, KVCache, PrefillRows
from tests.kernels.gpu.gpu_support import on_each_device, relative

WIDTH, WINDOW = 2, 16


@dataclass(frozen=True)
class Sizes:
    """decode, chunks, tokens: what the batch has room for; live: decode rows and chunks that are
    there; longest: of a context; kv: (heads, query heads of each, dim); heads: of GDN, its keys'
    and values', dim of both."""

    decode: int
    chunks: int
    tokens: int
    live: tuple[int, int]
    longest: int
    kv: tuple[int, int, int]
    heads: tuple[int, int, int]


LARGE = Sizes(256, 64, 1280, (250, 40), 384, (4, 6, 256), (16, 48, 128))
SMALL = Sizes(6, 8, 64, (4, 5), 24, (2, 3, 16), (1, 2, 32))


@dataclass(frozen=True)
class Case:
    """A batch whose counts only the device knows, and how many tokens of it are live. Slots are
    shuffled; slot 0 is padding's."""

    batch: Batch
    tokens: int
    slots: int
    ends: list[int]


def make_case(sizes: Sizes, device: str) -> Case:
    rng = random.Random(sizes.tokens)
    rows, chunks = sizes.live
    slots = rng.sample(range(1, rows + chunks + 1), rows + chunks)
    lengths = [rng.randrange(1, sizes.longest - WIDTH) for _ in range(rows)]
    most = (sizes.tokens - rows * WIDTH) // chunks
    counts = [rng.choice([1, 2, 3, rng.randint(1, most)]) for _ in range(chunks)]
    starts = [rng.choice([0, rng.randrange(sizes.longest - count)]) for count in counts]
    ends = [0] * (rows + chunks + 1)
    for slot, end in zip(slots, [x + WIDTH for x in lengths], strict=False):
        ends[slot] = end
    for slot, start, count in zip(slots[rows:], starts, counts, strict=True):
        ends[slot] = start + count

    def padded(values: list[int], size: int) -> torch.Tensor:
        return torch.tensor(values + [0] * (size - len(values)), device=device)

    decode = DecodeRows(
        padded(slots[:rows], sizes.decode), padded(lengths, sizes.decode), WIDTH, sizes.longest
    )
    offsets = torch.cat([padded([rows * WIDTH], 1), padded(counts, sizes.chunks)]).cumsum(0).int()
    prefill = PrefillRows(
        padded(slots[rows:], sizes.chunks), padded(starts, sizes.chunks), offsets, None, None,
        sizes.longest,
    )  # fmt: skip
    none = torch.zeros(sizes.tokens, dtype=torch.int64, device=device)
    batch = Batch(none, none, none, decode, prefill, padded=True)
    return Case(batch, rows * WIDTH + sum(counts), rows + chunks + 1, ends)


def sizes_on(device: str) -> tuple[Sizes, torch.dtype, float]:
    """Sizes, the dtype of activations, and how far results may be from the reference."""
    return (LARGE, torch.bfloat16, 2e-2) if device == "cuda" else (SMALL, torch.float32, 1e-5)


@on_each_device
@pytest.mark.parametrize("kv", ["activations", "e4m3"])
@pytest.mark.parametrize("first", [0, 1])
def test_attention(device: str, kv: str, first: int) -> None:
    from millrace.kernels.gpu import attention as gpu

    torch.manual_seed(11)
    sizes, dtype, limit = sizes_on(device)
    if kv == "e4m3" and device != "cuda":
        pytest.skip("the interpreter has no e4m3 products")
    case, page, (heads, group, dim) = make_case(sizes, device), 16, sizes.kv
    per_slot = -(-sizes.longest // page)
    pages = torch.randperm(case.slots * per_slot) + 1
    table = pages.view(case.slots, per_slot).int()
    table[0] = 0
    shape = (case.slots * per_slot + 1, page, heads, dim)
    cache = KVCache(*(torch.full(shape, torch.nan, device=device) for _ in range(2)))
    for slot, end in enumerate(case.ends):
        at = table[slot].long().repeat_interleave(page)[:end], torch.arange(end) % page
        for buffer in (cache.keys, cache.values):
            buffer[at] = torch.randn(end, heads, dim, device=device)
    stored = torch.float8_e4m3fn if kv == "e4m3" else dtype
    cache = KVCache(cache.keys.to(stored), cache.values.to(stored))
    plain = KVCache(cache.keys.float(), cache.values.float())
    table = table.to(device)
    q = torch.randn(sizes.tokens, heads * group, dim, device=device).to(dtype)
    q[case.tokens :] = torch.nan
    got = gpu.attend(q, cache, table, case.batch, dim**-0.5, first)[: case.tokens].float()
    want = attention.attend.__wrapped__(q.float(), plain, table, case.batch, dim**-0.5, first)
    seen = want[: case.tokens].isfinite().all(-1).all(-1)  # position 0 sees nothing if first is 1
    prompts = case.batch.prefill
    assert prompts is not None
    at_start = prompts.offsets[:-1][(prompts.starts == 0) & (prompts.offsets.diff() > 0)].long()
    if first:
        seen[at_start] = False
    assert seen.sum() >= case.tokens - first * len(at_start)
    assert relative(got[seen], want[: case.tokens][seen]) < limit


@on_each_device
def test_gdn(device: str) -> None:
    """Also that no slot changes but those of the batch, and the null slot not at all."""
    from millrace.kernels.gpu import gdn as gpu

    torch.manual_seed(12)
    sizes, dtype, limit = sizes_on(device)
    case, (hk, hv, dim) = make_case(sizes, device), sizes.heads
    channels, slots = 2 * hk * dim + hv * dim, case.slots
    assert case.batch.decode is not None
    fill = torch.zeros(slots, dtype=torch.int32)
    fill[case.batch.decode.slots.cpu()] = torch.randint(0, WINDOW + 1, (sizes.decode,)).int()
    fill[0] = 0
    cache = GDNState(
        torch.randn(slots, hv, dim, dim, device=device),
        torch.full((slots, hk, WINDOW, dim), torch.nan, device=device),
        torch.full((slots, hv, WINDOW, dim), torch.nan, device=device),
        torch.full((slots, hv, WINDOW), torch.nan, device=device),
        torch.randn(slots, 2 + WIDTH, channels, device=device),
    )
    for slot, count in enumerate(fill.tolist()):
        k, u, g = (x[slot, :, :count] for x in (cache.window_k, cache.window_u, cache.window_g))
        k.copy_(torch.nn.functional.normalize(torch.randn_like(k), dim=-1))
        u.normal_()
        g.copy_(-torch.rand_like(g).cumsum(-1) / 8)
    mine = replace(cache, window_k=cache.window_k.to(dtype), conv=cache.conv.to(dtype))
    mine = GDNState(*(getattr(mine, name).clone() for name in NAMES))
    expected = replace(
        cache, window_k=mine.window_k.float().clone(), conv=mine.conv.float().clone()
    )
    offset = torch.zeros(slots, dtype=torch.int32)
    offset[case.batch.decode.slots.cpu()] = torch.randint(0, WIDTH, (sizes.decode,)).int()
    fill, offset = fill.to(device), offset.to(device)
    x = torch.randn(sizes.tokens, channels, device=device).to(dtype)
    a, b = torch.randn(sizes.tokens, 2 * hv, device=device).to(dtype).split(hv, -1)
    x[case.tokens :] = torch.nan
    weight = torch.randn(channels, 4, device=device).to(dtype)
    gating = torch.rand(2, hv, device=device)
    before = GDNState(*(getattr(mine, name).clone() for name in NAMES))
    got = gpu.gdn(x, weight, a, b, *gating, mine, fill, offset, case.batch)
    plain = (x.float(), weight.float(), a.float(), b.float())
    want = gdn.gdn.__wrapped__(*plain, *gating, expected, fill, offset, case.batch)
    assert relative(got[: case.tokens].float(), want[: case.tokens]) < limit
    for name in NAMES:
        one, other = getattr(mine, name)[1:].float(), getattr(expected, name)[1:]
        assert relative(one, other) < limit, name
        null = getattr(mine, name)[0], getattr(before, name)[0]
        assert torch.equal(*(part.nan_to_num(9.0) for part in null)), name


NAMES = ("state", "window_k", "window_u", "window_g", "conv")
