"""Batch invariant ops of a GPU: near the references, and the same bits in any company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from millrace.kernels import attention, gdn
from millrace.kernels.batch import Batch, DecodeRows, GDNState, KVCache, PrefillRows
from millrace.kernels.dispatch import invariant
from tests.kernels.gpu.gpu_support import on_each_device, relative

HK, HV, DK, DV, W = 1, 2, 32, 32, 16


@pytest.fixture(autouse=True)
def rounded_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products are NumPy's, whose last bits depend on the place of a row with
    some of its libraries: what a GPU does not do, and these tests do not ask. So they are rounded
    from float64."""
    matmul = np.matmul

    def product(a: Any, b: Any, dtype: Any = None, **more: Any) -> Any:
        if dtype != np.float32:
            return matmul(a, b, dtype=dtype, **more)
        return matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)

    monkeypatch.setattr(np, "matmul", product)


CHANNELS = 2 * HK * DK + HV * DV
LENGTH = 37


def state_of(device: str, dtype: torch.dtype) -> GDNState:
    """Three slots at length 0: their windows hold NaN."""
    nan = torch.nan
    return GDNState(
        torch.zeros(3, HV, DK, DV, device=device, dtype=dtype),
        torch.full((3, HK, W, DK), nan, device=device),
        torch.full((3, HV, W, DV), nan, device=device),
        torch.full((3, HV, W), nan, device=device),
        torch.zeros(3, 3 + 2, CHANNELS, device=device),
    )


def fill_of(length: int) -> int:
    return (length - 1) % W + 1 if length else 0


class Sequence:
    """Two slots that read the same tokens, in pieces of their own."""

    def __init__(self, device: str, dtype: torch.dtype, reference: bool) -> None:
        torch.manual_seed(3)
        self.x = torch.randn(LENGTH, CHANNELS)
        self.a, self.b = torch.randn(2, LENGTH, HV)
        self.a_log, self.bias = torch.rand(2, HV)
        self.weight = torch.randn(CHANNELS, 4)
        self.cache, self.device, self.reference = state_of(device, dtype), device, reference
        self.lengths, self.offset = [0, 0, 0], [0, 0, 0]
        self.out = torch.full((3, LENGTH, HV, DV), torch.nan)

    def step(self, decode: list[tuple[int, int, int]], prompts: list[tuple[int, int]]) -> None:
        """decode: slots, tokens of their rows, and how many of these are accepted; prompts: slots
        and tokens."""
        width = decode[0][1] if decode else 0
        rows = [(slot, n) for slot, n, _ in decode] + prompts
        at = [self.lengths[slot] + i for slot, n in rows for i in range(n)]
        index = torch.tensor(at).clamp(max=LENGTH - 1)
        put = lambda values, dtype: torch.tensor(values, dtype=dtype).to(self.device)  # noqa: E731
        slots, starts = [r[0] for r in rows], [self.lengths[r[0]] for r in rows]
        ends = [sum(n for _, n in rows[:i]) for i in range(len(rows) + 1)]
        d, ints = len(decode), torch.int64
        decoding = DecodeRows(put(slots[:d], ints), put(starts[:d], ints), width, 99) if d else None
        counts = tuple(n for _, n in prompts)
        prefill = PrefillRows(
            put(slots[d:], ints), put(starts[d:], ints), put(ends[d:], torch.int32), counts,
            tuple(starts[d:]),
        ) if prompts else None  # fmt: skip
        places = put(at, ints)
        batch = Batch(places, places, places, decoding, prefill)
        fill = put([fill_of(length) for length in self.lengths], torch.int32)
        inputs = [x[index].to(self.device) for x in (self.x, self.a, self.b)]
        fixed = [x.to(self.device) for x in (self.weight, self.a_log, self.bias)]
        got = self.run(*inputs, *fixed, fill, put(self.offset, torch.int32), batch).cpu()
        for (slot, n), first in zip(rows, ends, strict=False):
            count = next((c for s, _, c in decode if s == slot), n)
            begin = self.lengths[slot]
            if (slot, n) not in prompts:  # none behind the end of the window
                count = min(count, W - begin % W)
            self.out[slot, begin : begin + count] = got[first : first + count]
            self.lengths[slot] += count
            self.offset[slot] = count - 1 if (slot, n) not in prompts else 0

    def run(
        self, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, a_log: Tensor, bias: Tensor,
        fill: Tensor, offset: Tensor, batch: Batch,
    ) -> Tensor:  # fmt: skip
        given = (x, weight, a, b, a_log, bias, self.cache, fill, offset, batch)
        with invariant():
            if self.reference:
                return gdn.gdn.__wrapped__(*given)
            from millrace.kernels.gpu import gdn as gpu

            return gpu.gdn(*given)


@on_each_device
def test_recurrence(device: str):
    """As part of a prompt, behind another part, in rows of drafts some of which do not count, and
    alone, a token gets the same bits, near those of the reference."""
    whole, cut = (Sequence(device, torch.float32, False) for _ in "12")
    whole.step([], [(1, LENGTH)])
    cut.step([], [(1, 5), (2, 17)])
    cut.step([(1, 3, 2)], [(2, 1)])
    cut.step([(1, 3, 1), (2, 3, 3)], [])
    for _ in range(3):
        cut.step([(1, 3, 3), (2, 3, 1)], [])
    while cut.lengths[1] < LENGTH:
        cut.step([(1, 1, 1)], [])
    known = min(cut.lengths[2], LENGTH)
    assert torch.equal(cut.out[1], whole.out[1])
    assert torch.equal(cut.out[2, :known], whole.out[1, :known])
    reference = Sequence("cpu", torch.float32, True)
    reference.step([], [(1, LENGTH)])
    assert relative(whole.out[1], reference.out[1]) < 1e-4


@on_each_device
def test_attention(device: str):
    """Rows of drafts and parts of prompts, among others, against the whole prompt and the
    reference; NaN behind the ends."""
    torch.manual_seed(5)
    heads, kv_heads, dim, page = 6, 2, 32, 16
    cache = KVCache(*(torch.randn(6, page, kv_heads, dim).to(device) for _ in "kv"))
    table = torch.tensor([[0, 0, 0], [1, 2, 3], [4, 5, 0]], dtype=torch.int32).to(device)
    q, spoiled = torch.randn(40, heads, dim).to(device), (LENGTH - 32, slice(None))
    for x in (cache.keys, cache.values):
        x[3, spoiled[0] :] = torch.nan
        x[5] = torch.nan
    ints = torch.int64

    def rows(slot: int, start: int, end: int) -> Batch:
        one = [torch.tensor([v], dtype=ints).to(device) for v in (slot, start)]
        ends = torch.tensor([0, end - start], dtype=torch.int32).to(device)
        places = torch.arange(start, end).to(device)
        return Batch(
            places, places, places, None, PrefillRows(*one, ends, (end - start,), (start,))
        )

    def attend(queries: Tensor, batch: Batch) -> Tensor:
        from millrace.kernels.gpu import attention as gpu

        with invariant():
            return gpu.attend(queries, cache, table, batch, dim**-0.5)

    whole = attend(q[:LENGTH], rows(1, 0, LENGTH))
    for start, end in ((0, 5), (5, 6), (6, 21), (21, LENGTH)):
        assert torch.equal(attend(q[start:end], rows(1, start, end)), whole[start:end])
    slots, starts = (torch.tensor(v, dtype=ints).to(device) for v in ([2, 1], [7, LENGTH - 3]))
    places = torch.arange(6).to(device)
    mixed = Batch(places, places, places, DecodeRows(slots, starts, 3, 99), None)
    given = torch.cat([torch.randn(3, heads, dim).to(device), q[LENGTH - 3 : LENGTH]])
    assert torch.equal(attend(given, mixed)[3:], whole[LENGTH - 3 :])
    wanted = attention.attend.__wrapped__(q[:LENGTH], cache, table, rows(1, 0, LENGTH), dim**-0.5)
    assert relative(whole, wanted) < 1e-4


@on_each_device
def test_gemm(device: str):
    """A row among 1 to 70 others, at another place each time."""
    from millrace.kernels.gpu.gemm import fixed_linear

    torch.manual_seed(1)
    x, weight = torch.randn(70, 96).to(device), torch.randn(40, 96).to(device)
    whole = fixed_linear(x, weight)
    assert relative(whole, x @ weight.t()) < 1e-4
    for first, last in ((0, 1), (5, 6), (3, 40), (69, 70)):
        assert torch.equal(fixed_linear(x[first:last], weight), whole[first:last])
