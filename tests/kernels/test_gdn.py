"""The window form against the plain recurrence in float64, and the ops over slots around it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.kernels.batch import DecodeRows, GDNState, PrefillRows
from millrace.kernels.gdn import (
    Window,
    advance,
    conv_decode,
    conv_prefill,
    fold,
    gates,
    gdn_decode,
    gdn_decode_conv,
    gdn_prefill,
)

torch.set_num_threads(1)
NAN = float("nan")
KEY_DIM, VALUE_DIM = 8, 6


def sequential(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One token after the other, one value head after the other: (o, S after the last token)."""
    state, out = state.clone(), torch.zeros_like(v)
    ratio = v.shape[0] // k.shape[0]
    for h in range(v.shape[0]):
        for t in range(v.shape[1]):
            key, query = k[h // ratio, t], q[h // ratio, t]
            decayed = g[h, t].exp() * state[h]
            u = beta[h, t] * (v[h, t] - decayed.t() @ key)
            state[h] = decayed + torch.outer(key, u)
            out[h, t] = state[h].t() @ query
    return out, state


class Sequence:
    """Random inputs of one sequence, by head: q, k [Hk, T, Dk], v [Hv, T, Dv], g, beta [Hv, T]."""

    def __init__(self, key_heads: int, ratio: int, length: int, decay: float, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        heads = key_heads * ratio
        unit = torch.nn.functional.normalize
        self.q, self.k = (unit(draw(key_heads, length, KEY_DIM), dim=-1) for _ in range(2))
        self.q = self.q * KEY_DIM**-0.5
        self.v, self.state = draw(heads, length, VALUE_DIM), draw(heads, KEY_DIM, VALUE_DIM)
        self.g = -decay * draw(heads, length).square()
        self.beta = torch.sigmoid(draw(heads, length))

    def part(self, tokens: list[int]) -> list[Tensor]:
        """Tokens at these places, as `advance` takes them, for one row."""
        return [x[:, tokens].unsqueeze(0) for x in (self.q, self.k, self.v, self.g, self.beta)]


shapes = st.tuples(st.integers(1, 2), st.integers(1, 3))
decays = st.sampled_from([1e-3, 0.3, 5.0, 700.0])


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    decay=decays,
    drafts=st.integers(0, 5),
    spare=st.integers(0, 12),
    choices=st.lists(st.integers(0, 5), min_size=1, max_size=14),
    seed=st.integers(0, 999),
)
def test_window_is_the_recurrence(
    shape: tuple[int, int], decay: float, drafts: int, spare: int, choices: list[int], seed: int
) -> None:
    """Verify rows with rejected drafts and folds at the window's edge, to 1e-12 in float64.

    Rows of the window past its fill hold NaN, as do those of rejected drafts.
    """
    width, size = drafts + 1, drafts + 1 + spare
    accepted = [1 + choice % width for choice in choices]
    x = Sequence(*shape, sum(accepted) + width, decay, seed)
    heads = x.v.shape[0]
    k = torch.full((1, shape[0], size, KEY_DIM), NAN, dtype=torch.float64)
    u = torch.full((1, heads, size, VALUE_DIM), NAN, dtype=torch.float64)
    log_a = torch.full((1, heads, size), NAN, dtype=torch.float64)
    state, fill, kept, outputs = x.state.unsqueeze(0).clone(), 0, [], []
    wrong = Sequence(*shape, width, decay, seed + 1000)
    for count in accepted:
        if fill + width > size:
            state, fill = fold(state, Window(k, u, log_a, torch.tensor([fill]))), 0
        start = len(kept)
        right = x.part(list(range(start, start + count)))
        fallen = wrong.part(list(range(width - count)))
        row = [torch.cat(pair, 2) for pair in zip(right, fallen, strict=True)]
        o, new_u, new_a = advance(state, Window(k, u, log_a, torch.tensor([fill])), *row)
        for buffer, new in ((k, row[1]), (u, new_u), (log_a, new_a)):
            buffer[:, :, fill : fill + width] = new
            buffer[:, :, fill + count :] = NAN
        outputs.append(o[0, :, :count])
        kept += range(start, start + count)
        fill += count
    expected, last = sequential(x.state, *(p[0] for p in x.part(kept)))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-11, atol=1e-12)
    folded = fold(state, Window(k, u, log_a, torch.tensor([fill])))
    torch.testing.assert_close(folded[0], last, rtol=1e-11, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, decay=decays, length=st.integers(1, 200), seed=st.integers(0, 999))
def test_a_full_chunk_is_the_recurrence(
    shape: tuple[int, int], decay: float, length: int, seed: int
) -> None:
    x = Sequence(*shape, length, decay, seed)
    q, k, v, g, beta = x.part(list(range(length)))
    empty = Window(k[:, :, :0], v[:, :, :0], g[:, :, :0], None)
    o, u, log_a = advance(x.state.unsqueeze(0), empty, q, k, v, g, beta)
    expected, last = sequential(x.state, q[0], k[0], v[0], g[0], beta[0])
    torch.testing.assert_close(o[0], expected, rtol=1e-9, atol=1e-10)
    folded = fold(x.state.unsqueeze(0).clone(), Window(k, u, log_a, None))
    torch.testing.assert_close(folded[0], last, rtol=1e-9, atol=1e-10)


def test_rows_past_fill_are_selected_away() -> None:
    """The result is the same bits whatever stands there: zeros, infinities or NaN."""
    x = Sequence(2, 2, 12, 0.5, seed=3)
    results = []
    for junk in (0.0, float("inf"), NAN):
        window = [x.k[None, :, :9].clone(), x.v[None, :, :9].clone(), x.g[None, :, :9].cumsum(-1)]
        for buffer in window:
            buffer[:, :, 4:] = junk
        w = Window(window[0], window[1], window[2], torch.tensor([4]))
        state = x.state.unsqueeze(0).clone()
        results.append([*advance(state, w, *x.part([10, 11])), fold(state, w)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert bool((a == b).all())


def test_gates_keep_float32() -> None:
    """beta and g are those of float32 arithmetic on the given inputs, not of bfloat16's."""
    a, b = (torch.randn(50, 3).to(torch.bfloat16) for _ in range(2))
    a_log, bias = torch.tensor([1.2345678, 2.3456789, 0.1234567]), torch.tensor([-5.01, 0.3, 2.7])
    g, beta = gates(a, b, a_log, bias)
    assert g.dtype == beta.dtype == torch.float32
    expected = -a_log.double().exp() * torch.log1p((a.double() + bias.double()).exp())
    torch.testing.assert_close(g.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(beta.double(), torch.sigmoid(b.double()), rtol=1e-6, atol=1e-7)
    assert float((beta - beta.to(torch.bfloat16).float()).abs().max()) > 1e-4


# --- ops over slots ----------------------------------------------------------------------------


def empty_cache(slots: int, key_heads: int, heads: int, window: int, drafts: int) -> GDNState:
    """NaN everywhere; state and conv of the live slots zero, as at admission."""
    channels = 2 * key_heads * KEY_DIM + heads * VALUE_DIM
    cache = GDNState(
        state=torch.full((slots, heads, KEY_DIM, VALUE_DIM), NAN),
        window_k=torch.full((slots, key_heads, window, KEY_DIM), NAN),
        window_u=torch.full((slots, heads, window, VALUE_DIM), NAN),
        window_g=torch.full((slots, heads, window), NAN),
        conv=torch.full((slots, 3 + drafts, channels), NAN),
    )
    cache.state[1:] = 0
    cache.conv[1:] = 0
    return cache


def prefill_rows(slots: list[int], counts: list[int]) -> PrefillRows:
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    zeros = torch.zeros(len(slots), dtype=torch.int64)
    return PrefillRows(torch.tensor(slots), zeros, offsets, tuple(counts), tuple(0 for _ in counts))


def decode_rows(slots: list[int], width: int, neighbours: bool = False) -> DecodeRows:
    starts = torch.zeros(len(slots), dtype=torch.int64)
    return DecodeRows(torch.tensor(slots), starts, width, 99, slots[0] if neighbours else None)


def straight_conv(x: Tensor, weight: Tensor) -> Tensor:
    padded = torch.cat([torch.zeros(3, x.shape[1]), x])
    rows = [(padded[t : t + 4] * weight.t()).sum(0) for t in range(x.shape[0])]
    return torch.nn.functional.silu(torch.stack(rows))


@settings(max_examples=40, deadline=None)
@given(
    drafts=st.integers(0, 5),
    prompts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    choices=st.lists(st.integers(0, 5), max_size=8),
    seed=st.integers(0, 99),
)
def test_conv_over_steps(drafts: int, prompts: list[int], choices: list[int], seed: int) -> None:
    """Prompts in chunks, then verify rows with rejected drafts, equal one pass."""
    rng = torch.Generator().manual_seed(seed)
    width, cache = drafts + 1, empty_cache(4, 1, 2, 8, drafts)
    channels = cache.conv.shape[2]
    x = torch.randn(200, channels, generator=rng)
    weight = torch.randn(channels, 4, generator=rng)
    offset, at, outputs = torch.zeros(4, dtype=torch.int32), 0, []
    for count in prompts:
        beside = torch.randn(5, channels, generator=rng)
        rows = prefill_rows([3, 1], [5, count])
        out = conv_prefill(torch.cat([beside, x[at : at + count]]), cache, weight, rows, offset)
        outputs.append(out[5:])
        at += count
    for choice in choices:
        accepted = 1 + choice % width
        row = torch.cat([x[at : at + accepted], torch.full((width - accepted, channels), 7.0)])
        null = torch.full((width, channels), NAN)
        rows = decode_rows([1, 0, 0], width)
        out = conv_decode(torch.cat([row, null, null]), cache, weight, rows, offset)
        outputs.append(out[:accepted])
        offset[1] = accepted - 1
        at += accepted
    torch.testing.assert_close(
        torch.cat(outputs), straight_conv(x[:at], weight), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 9, 5)])
@pytest.mark.parametrize("drafts", range(6))
def test_slots_over_steps(drafts: int, order: tuple[int, ...]) -> None:
    """Three slots of different progress equal the plain recurrence, null rows beside some.

    Neighbours in order (read in place), out of order (as a range) and far apart (copied).
    """
    neighbours = order == (1, 2, 3)
    key_heads, heads, width = 2, 4, drafts + 1
    window = 3 * width
    cache = empty_cache(10, key_heads, heads, window, drafts)
    rng = torch.Generator().manual_seed(drafts)
    channels, total = cache.conv.shape[2], 60 + 12 * width
    qkv = {slot: torch.randn(total, channels, generator=rng) for slot in order}
    g = {slot: -torch.rand(total, heads, generator=rng) for slot in qkv}
    beta = {slot: torch.rand(total, heads, generator=rng) for slot in qkv}
    fill = torch.zeros(10, dtype=torch.int32)
    prompts = dict(zip(order, (1, 60, 17), strict=True))
    kept = {slot: list(range(count)) for slot, count in prompts.items()}

    def gather(tokens: dict[int, list[int]]) -> list[Tensor]:
        return [torch.cat([x[slot][t] for slot, t in tokens.items()]) for x in (qkv, g, beta)]

    rows = prefill_rows(list(kept), [len(t) for t in kept.values()])
    prompt_out = gdn_prefill(*gather(kept), cache, rows)
    outputs = dict(zip(kept, prompt_out.split(list(rows.counts)), strict=True))
    for step in range(10):
        row = {slot: list(range(len(kept[slot]), len(kept[slot]) + width)) for slot in qkv}
        slots, inputs = list(qkv), gather(row)
        if 9 in order:
            slots = [*slots, 0, 0]
            inputs = [torch.cat([x, torch.full_like(x[: 2 * width], NAN)]) for x in inputs]
        out = gdn_decode(*inputs, cache, fill, decode_rows(slots, width, neighbours))
        for index, slot in enumerate(qkv):
            accepted = 1 + (step + slot) % width
            folded = int(fill[slot]) + width > window
            fill[slot] = (0 if folded else int(fill[slot])) + accepted
            kept[slot] += row[slot][:accepted]
            mine = out[index * width : index * width + accepted]
            outputs[slot] = torch.cat([outputs[slot], mine])
    for slot, tokens in kept.items():
        x = qkv[slot][tokens].double()
        q, k, v = x.split([key_heads * KEY_DIM] * 2 + [heads * VALUE_DIM], dim=-1)
        q, k = (y.view(-1, key_heads, KEY_DIM).transpose(0, 1) for y in (q, k))
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        expected, _ = sequential(
            torch.zeros(heads, KEY_DIM, VALUE_DIM, dtype=torch.float64),
            q * KEY_DIM**-0.5,
            k,
            v.view(-1, heads, VALUE_DIM).transpose(0, 1),
            g[slot][tokens].double().t(),
            beta[slot][tokens].double().t(),
        )
        torch.testing.assert_close(
            outputs[slot].double(), expected.transpose(0, 1), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("width", range(1, 7))
def test_decode_writes_its_rows_alone(width: int) -> None:
    """However many drafts: other slots, other window rows and the state keep their bits."""
    cache = empty_cache(4, 1, 2, 18, width - 1)
    for buffer in (cache.state, cache.window_k, cache.window_u, cache.window_g):
        buffer.copy_(torch.randn(buffer.shape) * 0.1)
    before = [x.clone() for x in (cache.state, cache.window_k, cache.window_u, cache.window_g)]
    fill = torch.tensor([0, 3, 18 - width, 2], dtype=torch.int32)
    channels = cache.conv.shape[2]
    gdn_decode(
        torch.randn(2 * width, channels),
        -torch.rand(2 * width, 2),
        torch.rand(2 * width, 2),
        cache,
        fill,
        decode_rows([1, 2], width),
    )
    assert bool((cache.state == before[0]).all())
    for buffer, old in zip(
        (cache.window_k, cache.window_u, cache.window_g), before[1:], strict=True
    ):
        changed = (buffer != old).flatten(3).any(-1) if buffer.dim() > 3 else buffer != old
        rows = changed.any(1)
        expected = torch.zeros_like(rows)
        expected[1, 3 : 3 + width] = True
        expected[2, 18 - width :] = True
        assert bool((rows == expected).all())


@pytest.mark.parametrize("width", [1, 3])
def test_decode_with_its_convolution(width: int) -> None:
    """The op of both is one after the other: gates of the projection, offsets of the slots."""
    torch.manual_seed(width)
    cache = empty_cache(4, 1, 2, 8, width - 1)
    for buffer in (cache.state, cache.window_k, cache.window_u, cache.window_g, cache.conv):
        buffer.copy_(torch.randn(buffer.shape) * 0.1)
    fill = torch.tensor([0, 3, 8, 2], dtype=torch.int32)
    offset = torch.tensor([0, width - 1, 0, 0], dtype=torch.int32)
    channels, rows = cache.conv.shape[2], decode_rows([1, 2], width)
    x, weight = torch.randn(2 * width, channels), torch.randn(channels, 4)
    a, b, (a_log, bias) = torch.randn(2 * width, 2), torch.randn(2 * width, 2), torch.rand(2, 2)
    twin = copy.deepcopy(cache)
    qkv = conv_decode(x, twin, weight, rows, offset)
    want = gdn_decode(qkv, *gates(a, b, a_log, bias), twin, fill, rows)
    got = gdn_decode_conv(x, weight, a, b, a_log, bias, cache, fill, offset, rows)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for name in ("state", "window_k", "window_u", "window_g", "conv"):
        torch.testing.assert_close(getattr(cache, name), getattr(twin, name), rtol=1e-5, atol=1e-6)
