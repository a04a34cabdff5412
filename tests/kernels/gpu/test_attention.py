"""Attention on the GPU against the torch reference, with NaN in all that no query may see."""

from __future__ import annotations

import pytest
import torch

from millrace.kernels import attention, norm, rope
from millrace.kernels.batch import Batch, DecodeRows, KVCache, PrefillRows
from tests.kernels.gpu.gpu_support import INTERPRETED, on_each_device, relative

PAGE, KV_HEADS, GROUP, DIM = 16, 2, 3, 24


def make_cache(
    ends: list[int], device: str, dtype: torch.dtype, dim: int = DIM, kv_heads: int = KV_HEADS
) -> tuple[KVCache, torch.Tensor]:
    """Slot s holds ends[s - 1] live rows on shuffled pages; every other row is NaN."""
    per_slot = -(-max(ends) // PAGE) + 1
    pages = len(ends) * per_slot + 1
    table = torch.zeros(len(ends) + 1, per_slot, dtype=torch.int32)
    table[1:] = (torch.randperm(pages - 1) + 1).view(len(ends), per_slot).int()
    keys, values = (torch.full((pages, PAGE, kv_heads, dim), torch.nan) for _ in range(2))
    for slot, end in enumerate(ends, 1):
        for place in range(end):
            at = (table[slot, place // PAGE], place % PAGE)
            keys[at], values[at] = torch.randn(2, kv_heads, dim)
    cache = KVCache(keys.to(device, dtype), values.to(device, dtype))
    return cache, table.to(device)


CACHE_TYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float8_e4m3fn]


@on_each_device
@pytest.mark.parametrize("dtype", CACHE_TYPES)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("config", [None, (16, 1, 4, 1), (16, 3, 4, 1)])
@pytest.mark.parametrize("width", [1, 2, 6])
def test_decode(
    device: str, width: int, config: tuple[int, ...] | None, first: int, dtype: torch.dtype
):
    from millrace.kernels.gpu import attention as gpu

    torch.manual_seed(width)
    starts = [1, PAGE - width, PAGE, 2 * PAGE - 1, 70]
    cache, table = make_cache([s + width for s in starts], device, dtype)
    order = torch.tensor([4, 1, 5, 3, 2, 0], device=device)  # the last row is padding
    at = torch.tensor([starts[s - 1] if s else 0 for s in order.tolist()], device=device)
    rows = DecodeRows(order, at, width, 80)
    q = torch.randn(len(order) * width, KV_HEADS * GROUP, DIM, device=device)
    want = attention.attend_decode.__wrapped__(q, cache, table, rows, 0.2, first)
    got = gpu.attend_decode(q, cache, table, rows, 0.2, first, config)
    assert want[:-width].isfinite().all()
    assert relative(got[:-width], want[:-width]) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("config", [(16, 1, 4, 1), (32, 1, 4, 3), (16, 3, 4, 5)])
@pytest.mark.parametrize("width", [1, 2, 6])
def test_decode_of_values_in_pairs(width: int, config: tuple[int, ...], first: int):
    """The same sums as of values one by one. Machine code is in it, so no interpreter runs it."""
    from millrace.kernels.gpu import attention as gpu

    torch.manual_seed(width)
    starts, dim = [1, PAGE, 2 * PAGE - 1, 70], 64
    cache, table = make_cache([s + width for s in starts], "cuda", torch.float8_e4m3fn, dim)
    slots = torch.tensor([4, 1, 3, 2], device="cuda")
    at = torch.tensor([starts[s - 1] for s in slots.tolist()], device="cuda")
    rows = DecodeRows(slots, at, width, 80)
    q = torch.randn(len(slots) * width, KV_HEADS * GROUP, dim, device="cuda").bfloat16()
    got = gpu.attend_decode(q, cache, table, rows, 0.2, first, config, pairs=True)
    want = gpu.attend_decode(q, cache, table, rows, 0.2, first, config, pairs=False)
    assert want.isfinite().all()
    assert relative(got, want) < 1e-3


@on_each_device
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
def test_heads_of_128(device: str, group: int):
    """Groups of Qwen3's models: a decode step, prompts, and few tokens behind a long context."""
    from millrace.kernels.gpu import attention as gpu

    torch.manual_seed(group)
    counts, starts = (1, 18, 3), (36, 0, 1030)
    ends = [s + c for s, c in zip(starts, counts, strict=True)]
    cache, table = make_cache(ends, device, torch.float32, 128, kv_heads=1)
    at = torch.tensor(starts, device=device)
    slots, offsets = torch.arange(1, 4, device=device), torch.tensor([0, *counts]).cumsum(0)
    rows = PrefillRows(slots, at, offsets.int().to(device), counts, starts)
    q = torch.randn(sum(counts), group, 128, device=device)
    want = attention.attend_prefill.__wrapped__(q, cache, table, rows, 0.1)
    assert relative(gpu.attend_prefill(q, cache, table, rows, 0.1), want) < 1e-5
    decoding = DecodeRows(slots, at, 1, max(starts) + 1)
    q = torch.randn(3, group, 128, device=device)
    want = attention.attend_decode.__wrapped__(q, cache, table, decoding, 0.1)
    assert relative(gpu.attend_decode(q, cache, table, decoding, 0.1), want) < 1e-5


@on_each_device
@pytest.mark.parametrize("first", [0, 1])
def test_prefill(device: str, first: int):
    from millrace.kernels.gpu import attention as gpu

    torch.manual_seed(1)
    counts, starts = (1, 18, 16, 33), (36, 0, 20, 1)
    cache, table = make_cache([s + c for s, c in zip(starts, counts, strict=True)], device,
                              torch.float32)  # fmt: skip
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    slots = torch.arange(1, 5, device=device)
    rows = PrefillRows(slots, torch.tensor(starts, device=device), offsets, counts, starts)
    q = torch.randn(sum(counts), KV_HEADS * GROUP, DIM, device=device)
    want = attention.attend_prefill.__wrapped__(q, cache, table, rows, 0.2, first)
    got = gpu.attend_prefill(q, cache, table, rows, 0.2, first)
    seen = torch.ones(sum(counts), dtype=torch.bool, device=device)
    seen[1] = first == 0  # position 0 sees nothing when the first row is 1
    assert relative(got[seen], want[seen]) < 1e-5


@on_each_device
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    "rows", [((1, 18, 16, 33), (36, 0, 20, 1)), ((37,), (0,)), ((5, 3), (0, 40))]
)
def test_prefill_of_widened_keys(
    device: str, first: int, rows: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
):
    """Without boxes the same bits as from pages, which the products see as the same numbers."""
    from millrace.kernels.gpu import attention as gpu
    from millrace.kernels.gpu.attention import prefill

    monkeypatch.setattr(prefill, "BOXES", False)
    torch.manual_seed(3)
    counts, starts = rows
    lengths = [s + c for s, c in zip(starts, counts, strict=True)]
    narrow = torch.float16 if INTERPRETED else torch.float8_e4m3fn
    cache, table = make_cache(lengths, device, narrow)
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    slots = torch.arange(1, len(counts) + 1, device=device)
    some = PrefillRows(slots, torch.tensor(starts, device=device), offsets, counts, starts)
    q = torch.randn(sum(counts), KV_HEADS * GROUP, DIM, device=device).bfloat16()
    config = (16, 16, 4, 1)
    got = gpu.attend_prefill(q, cache, table, some, 0.2, first, config, widen=True)
    want = gpu.attend_prefill(q, cache, table, some, 0.2, first, config, widen=False)
    seen = torch.ones(sum(counts), dtype=torch.bool, device=device)
    starting = [sum(counts[:i]) for i, s in enumerate(starts) if s == 0]
    seen[starting] = first == 0  # position 0 sees nothing when the first row is 1
    assert torch.equal(got[seen], want[seen])


@on_each_device
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("rows", "room"),
    [(((1, 18, 16, 33), (36, 0, 20, 1)), 4096), (((37, 3, 40), (0, 90, 60)), 100)],
)
def test_prefill_from_boxes(
    device: str, first: int, known: bool, rows: tuple[tuple[int, ...], ...], room: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Of rows that are widened, beside others that find no room; what nobody wrote is NaN."""
    from millrace.kernels.gpu import attention as gpu
    from millrace.kernels.gpu.attention import prefill, wide

    torch.manual_seed(4)
    monkeypatch.setattr(prefill, "WIDENED_MOST", room)
    counts, starts = rows
    lengths = [s + c for s, c in zip(starts, counts, strict=True)]
    narrow = torch.float16 if INTERPRETED else torch.float8_e4m3fn
    cache, table = make_cache(lengths, device, narrow, dim=32)
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    slots = torch.arange(1, len(counts) + 1, device=device)
    lengths_known = (counts, starts) if known else (None, None)
    some = PrefillRows(slots, torch.tensor(starts, device=device), offsets, *lengths_known)
    q = torch.randn(sum(counts), KV_HEADS * GROUP, 32, device=device).bfloat16()
    seen = torch.ones(sum(counts), dtype=torch.bool, device=device)
    starting = [sum(counts[:i]) for i, s in enumerate(starts) if s == 0]
    seen[starting] = first == 0  # position 0 sees nothing when the first row is 1
    want = gpu.attend_prefill(q, cache, table, some, 0.2, first, widen=False)
    seen_by_boxes: list[int] = []
    attend, empty = wide.attend, torch.empty

    def noted(*given: object, **options: object) -> None:
        seen_by_boxes.append(1)
        attend(*given, **options)

    def poisoned(*shape: object, **options: object) -> torch.Tensor:
        made = empty(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(prefill, "BOXES", True)
    monkeypatch.setattr(wide, "attend", noted)
    monkeypatch.setattr(torch, "empty", poisoned)
    for config in ((16, 16, 4, 1), (16, 32, 4, 2)):
        got = gpu.attend_prefill(q, cache, table, some, 0.2, first, config, widen=True)
        assert relative(got[seen], want[seen]) < 4e-3
    assert len(seen_by_boxes) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(8))
def test_prefill_by_the_kernel_for_hopper(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random rows beside some that find no room; what nobody wrote is NaN."""
    from millrace.kernels.gpu import attention as gpu
    from millrace.kernels.gpu.attention import hopper, prefill

    torch.manual_seed(seed)
    monkeypatch.setattr(prefill, "WIDENED_MOST", 3000)
    counts = tuple(int(n) for n in torch.randint(1, 700, (4,)))
    starts = tuple(int(n) for n in torch.randint(0, 500, (4,)) * (torch.rand(4) < 0.7))
    lengths = [s + c for s, c in zip(starts, counts, strict=True)]
    cache, table = make_cache(lengths, "cuda", torch.float8_e4m3fn, dim=256)
    offsets = torch.tensor([0, *counts]).cumsum(0).int().cuda()
    slots = torch.arange(1, 5, device="cuda")
    rows = PrefillRows(slots, torch.tensor(starts, device="cuda"), offsets, counts, starts)
    q = torch.randn(sum(counts), KV_HEADS * GROUP, 256, device="cuda").bfloat16()
    want = gpu.attend_prefill(q, cache, table, rows, 1 / 16, widen=False)
    empty = torch.empty

    def poisoned(*shape: object, **options: object) -> torch.Tensor:
        made = empty(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(hopper, "ON", True)
    monkeypatch.setattr(torch, "empty", poisoned)
    if hopper.kernel_for(rows.starts.dtype, offsets.dtype) is None:
        pytest.skip("needs a Hopper GPU and its compiler")
    got = gpu.attend_prefill(q, cache, table, rows, 1 / 16, widen=True)
    assert relative(got, want) < 4e-3


def test_rows_are_widened_as_long_as_there_is_room() -> None:
    """Those that are longer than all the room, or whose keys are split, take none."""
    from millrace.kernels.gpu.attention import prefill as gpu

    counts, starts = (10, 20, 5, 1, 300, 300, 0), (40, 30, 0, 1200, 3000, 900, 0)
    offsets = torch.tensor([7, *counts]).cumsum(0).int()
    slots = torch.arange(7)
    for known in ((counts, starts), (None, None)):
        rows = PrefillRows(slots, torch.tensor(starts), offsets, *known)
        assert gpu._places_of_keys(rows, 2200).tolist() == [0, 50, 100, -1, -1, 105, -1]


@on_each_device
@pytest.mark.parametrize(
    ("first", "known", "programs"),
    [(0, True, 132), (1, False, 3)]
    if INTERPRETED
    else [(0, True, 132), (1, False, 132), (0, False, 3)],
)
def test_few_tokens_behind_a_long_context(
    device: str, first: int, known: bool, programs: int, monkeypatch: pytest.MonkeyPatch
):
    """Their keys are split; what else is in the batch, what the host knows, and how many parts a
    program has to go through, changes no bit."""
    from millrace.kernels.gpu import attention as gpu
    from millrace.kernels.gpu.attention import split

    torch.manual_seed(5)
    monkeypatch.setattr(split, "PROGRAMS", programs)
    counts, starts = (3, 12, 1, 30), (1100, 0, 2100, 1015)
    cache, table = make_cache([s + c for s, c in zip(starts, counts, strict=True)], device,
                              torch.float32)  # fmt: skip
    at, slots = torch.tensor(starts, device=device), torch.arange(1, 5, device=device)
    offsets = torch.tensor([2, *counts]).cumsum(0).int().to(device)
    lengths = (counts, starts) if known else (None, None)
    rows = PrefillRows(slots, at, offsets, *lengths)
    assert split.split_rows(rows).tolist() == [True, False, True, True]
    q = torch.randn(2 + sum(counts) + 3, KV_HEADS * GROUP, DIM, device=device)
    got = gpu.attend_prefill(q, cache, table, rows, 0.2, first)[2:-3]
    host = PrefillRows(slots, at, offsets - 2, counts, starts)
    want = attention.attend_prefill.__wrapped__(q[2:-3], cache, table, host, 0.2, first)
    seen = torch.ones(sum(counts), dtype=torch.bool, device=device)
    seen[counts[0]] = first == 0
    assert relative(got[seen], want[seen]) < 1e-5
    for row in (0, 3):
        begin = sum(counts[:row])
        end = begin + counts[row]
        one = PrefillRows(slots[row : row + 1], at[row : row + 1], offsets[:2] * 0,
                          (counts[row],), (starts[row],))  # fmt: skip
        one.offsets[1] = counts[row]
        alone = gpu.attend_prefill(q[2 + begin : 2 + end], cache, table, one, 0.2, first)
        assert torch.equal(alone, got[begin:end])


@on_each_device
@pytest.mark.parametrize("decode", [0, 2])
def test_a_padded_batch(device: str, decode: int):
    """Both kinds of rows at once, in more room than they need."""
    from millrace.kernels.gpu import attention as gpu

    torch.manual_seed(6)
    counts, starts, width = (4, 17, 0), (20, 0, 0), 2
    cache, table = make_cache([24, 17, 30, 5], device, torch.float32)
    slots = torch.tensor([1, 2, 0], device=device)
    offsets = torch.tensor([decode * width, *counts]).cumsum(0).int().to(device)
    rows = PrefillRows(slots, torch.tensor(starts, device=device), offsets, None, None, 64)
    slots, lengths = ([4, 3, 0, 0], [3, 28, 0, 0]) if decode else ([0, 0], [0, 0])
    part = DecodeRows(*(torch.tensor(x, device=device) for x in (slots, lengths)), width, 64)
    tokens = torch.zeros(32, dtype=torch.int64, device=device)
    batch = Batch(tokens, tokens, tokens, part, rows, padded=True)
    q = torch.randn(32, KV_HEADS * GROUP, DIM, device=device)
    want = attention.attend.__wrapped__(q, cache, table, batch, 0.2)
    got = gpu.attend(q, cache, table, batch, 0.2)
    live = decode * width + sum(counts)
    assert relative(got[:live], want[:live]) < 1e-5


@on_each_device
@pytest.mark.parametrize(
    ("gated", "normed", "rotary"), [(True, True, 16), (False, True, 32), (False, False, 16)]
)
def test_norm_rope_store(device: str, gated: bool, normed: bool, rotary: int):
    """The fused form equals the ops one after another, and store_kv alone the reference; without
    queries it stores the same."""
    from millrace.kernels.gpu import attention as gpu
    from millrace.kernels.gpu import rope as gpu_rope

    torch.manual_seed(2)
    tokens, dim, heads, kv_heads = 7, 32, 4, 2
    table = rope.rope_table(dim, rotary, 1e4, 50, None, device)
    positions = torch.tensor([0, 5, 6, 49, 3, 2, 1], device=device)
    widths = [heads * dim, heads * dim * gated, kv_heads * dim, kv_heads * dim]
    qkv = torch.randn(tokens, sum(widths) + 9, device=device)[:, : sum(widths)]
    q_weight, k_weight = torch.randn(2, dim, device=device) if normed else (None, None)
    place = torch.randperm(36, device=device)[:tokens]

    def empty() -> KVCache:
        return KVCache(*(torch.zeros(9, 4, kv_heads, dim, device=device) for _ in range(2)))

    def one_by_one(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x.reshape(-1, dim)
        x = x if weight is None else norm.rms_norm.__wrapped__(x, weight, 1e-6)
        turned = rope.apply_rope.__wrapped__(x.view(tokens, -1, dim), positions, table)
        assert (
            relative(gpu_rope.apply_rope(x.view(tokens, -1, dim), positions, table), turned) < 1e-6
        )
        return turned

    q, _, k, v = qkv.split(widths, -1)
    want_q, want_k, v = one_by_one(q, q_weight), one_by_one(k, k_weight), v.unflatten(-1, (-1, dim))
    want, fused, alone = empty(), empty(), empty()
    attention.store_kv.__wrapped__(want_k, v, want, place)
    gpu.store_kv(want_k, v, alone, place)
    got_q = gpu.norm_rope_store(
        qkv, widths, q_weight, k_weight, 1e-6, positions, table, fused, place
    )
    assert relative(got_q, want_q) < 1e-5
    assert relative(fused.keys, want.keys) < 1e-5
    only, widths = empty(), [0, 0, *widths[2:]]
    none = gpu.norm_rope_store(
        qkv[:, -sum(widths) :], widths, q_weight, k_weight, 1e-6, positions, table, only, place
    )
    assert none.shape == (tokens, 0, dim)
    for got, wanted in ((fused.values, want.values), (alone.keys, want.keys),
                        (alone.values, want.values), (only.keys, fused.keys),
                        (only.values, want.values)):  # fmt: skip
        assert torch.equal(got, wanted)
