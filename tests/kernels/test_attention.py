"""Paged attention against attention written out, at the edges of pages and of caches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.kernels.attention import attend_decode, attend_prefill, store_kv
from millrace.kernels.batch import Caches, DecodeRows, KVCache, PrefillRows

torch.set_num_threads(1)
NAN = float("nan")
DIM = 8


def naive(q: Tensor, k: Tensor, v: Tensor, first: int, start: int) -> Tensor:
    """q: [n, Hq, D] at positions start ..; k, v: [L, Hkv, D] from position 0. One by one."""
    out, group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = range(first, start + t + 1)
            scores = torch.stack([q[t, h] @ k[j, h // group] for j in seen]) / math.sqrt(DIM)
            out[t, h] = sum(
                p * v[j, h // group] for p, j in zip(scores.softmax(0), seen, strict=True)
            )
    return out


class Pages:
    """A cache of NaN for three live slots, with pages in random order."""

    def __init__(self, page_size: int, pages: int, kv_heads: int, dtype: torch.dtype) -> None:
        total = 1 + 3 * pages
        shape = (total, page_size, kv_heads, DIM)
        self.cache = KVCache(*(torch.full(shape, NAN).to(dtype) for _ in range(2)))
        self.table = torch.zeros(4, pages, dtype=torch.int32)
        self.table[1:] = 1 + torch.randperm(total - 1).view(3, pages)
        none = torch.zeros(4, dtype=torch.int32)
        self.rows = Caches([], {}, {}, [], None, self.table, none, none, page_size).kv_rows

    def store(self, slot: int, start: int, k: Tensor, v: Tensor) -> None:
        positions = torch.arange(start, start + k.shape[0])
        store_kv(k, v, self.cache, self.rows(torch.full_like(positions, slot), positions))


@settings(max_examples=50, deadline=None)
@given(
    page_size=st.sampled_from([1, 2, 4, 16]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)]),
    starts=st.tuples(st.integers(0, 33), st.integers(0, 33)),
    width=st.integers(1, 6),
    first=st.integers(0, 1),
)
def test_decode(
    page_size: int, heads: tuple[int, int], starts: tuple[int, int], width: int, first: int
) -> None:
    starts = (starts[0] + first, starts[1] + first)
    pages = Pages(page_size, -(-(34 + width) // page_size) + 1, heads[1], torch.float32)
    k, v = (torch.randn(3, 40, heads[1], DIM) for _ in range(2))
    q = torch.randn(3, width, heads[0], DIM)
    slots = [3, 0, 1]
    places = [starts[0], 0, starts[1]]
    for row, (slot, start) in enumerate(zip(slots, places, strict=True)):
        if slot:
            pages.store(slot, first, k[row, first : start + width], v[row, first : start + width])
    rows = DecodeRows(torch.tensor(slots), torch.tensor(places), width, 40 + width)
    out = attend_decode(q.flatten(0, 1), pages.cache, pages.table, rows, DIM**-0.5, first)
    for row in (0, 2):
        expected = naive(q[row], k[row], v[row], first, places[row])
        mine = out[row * width : (row + 1) * width]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    page_size=st.sampled_from([1, 4, 16]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    rows=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 18)), min_size=1, max_size=3),
    first=st.integers(0, 1),
)
def test_prefill(
    page_size: int, heads: tuple[int, int], rows: list[tuple[int, int]], first: int
) -> None:
    """Rows of any lengths and starts, some near each other (padded together), some not."""
    rows = [(start + first, count) for start, count in rows]
    pages = Pages(page_size, -(-40 // page_size), heads[1], torch.float32)
    k, v = (torch.randn(3, 40, heads[1], DIM) for _ in range(2))
    q = [torch.randn(count, heads[0], DIM) for _, count in rows]
    for row, (start, count) in enumerate(rows):
        pages.store(row + 1, first, k[row, first : start + count], v[row, first : start + count])
    counts = tuple(count for _, count in rows)
    starts = tuple(start for start, _ in rows)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    batch = PrefillRows(
        torch.arange(1, len(rows) + 1), torch.tensor(starts), offsets, counts, starts
    )
    out = attend_prefill(torch.cat(q), pages.cache, pages.table, batch, DIM**-0.5, first)
    for row, mine in enumerate(out.split(list(counts))):
        expected = naive(q[row], k[row], v[row], first, starts[row])
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_drafts_past_the_table_are_harmless() -> None:
    """Past the longest sequence drafts fall on the null page; tokens before them still count."""
    pages = Pages(page_size=4, pages=2, kv_heads=1, dtype=torch.float32)
    k, v, q = (torch.randn(10, 1, DIM) for _ in range(3))
    pages.store(1, 0, k, v)  # positions 8 and 9 have no page
    assert bool(pages.cache.keys[pages.table[2:].flatten().long()].isnan().all())
    pages.cache.keys[0], pages.cache.values[0] = NAN, NAN
    rows = DecodeRows(torch.tensor([1]), torch.tensor([6]), 4, 10)
    out = attend_decode(q[6:10], pages.cache, pages.table, rows, DIM**-0.5)
    torch.testing.assert_close(out[:2], naive(q[6:8], k, v, 0, 6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float8_e4m3fn, 0.2)]
)
def test_narrow_caches(dtype: torch.dtype, tolerance: float) -> None:
    """Keys and values are rounded once, and those out of e4m3's range saturate."""
    pages = Pages(4, 8, 2, dtype)
    k, v, q = torch.randn(20, 2, DIM), torch.randn(20, 2, DIM), torch.randn(20, 4, DIM)
    pages.store(2, 0, k, v)
    rows = DecodeRows(torch.tensor([2]), torch.tensor([19]), 1, 20)
    out = attend_decode(q[19:], pages.cache, pages.table, rows, DIM**-0.5)
    exact = naive(q[19:], k.to(dtype).float(), v.to(dtype).float(), 0, 19)
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)
    assert float((out - naive(q[19:], k, v, 0, 19)).abs().max()) < tolerance
    pages.store(2, 0, 1e4 * k, v)
    assert bool(pages.cache.keys[pages.table[2, :5].long()].float().isfinite().all())
