"""The CPU's compiled ops against the references, in both dtypes, with NaN where nothing may be
read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.kernels import activation, attention, gdn, gemm, norm
from millrace.kernels.batch import DecodeRows, GDNState, KVCache, PrefillRows
from millrace.kernels.cpu import activation as cpu_activation
from millrace.kernels.cpu import attention as cpu_attention
from millrace.kernels.cpu import build, call
from millrace.kernels.cpu import gdn as cpu_gdn
from millrace.kernels.cpu import gemm as cpu_gemm
from millrace.kernels.dispatch import op
from millrace.kernels.rope import rope_table

torch.set_num_threads(1)
NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not build.is_enabled(), reason="needs a C++ compiler"
)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    build.build()
    build.library()
    build.wait_until_built()
    assert build.library() is not None


def reference(wrapped: Callable[..., Any]) -> Callable[..., Any]:
    return wrapped.__wrapped__  # type: ignore[attr-defined, no-any-return]


def close(got: Tensor, want: Tensor) -> None:
    """To 1e-5 in float32; in bfloat16 within two roundings of the largest value in a row."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    else:
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2, equal_nan=True)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


# --- attention ---------------------------------------------------------------------------------


def pages(dtype: torch.dtype, slots: int, per_slot: int, kv_heads: int, dim: int) -> Any:
    """A cache and its table: page 0 is null and holds NaN, as does nothing else yet."""
    cache = KVCache(*(draw(1 + slots * per_slot, 4, kv_heads, dim, dtype=dtype) for _ in "kv"))
    table = torch.zeros(slots + 1, per_slot, dtype=torch.int32)
    table[1:] = 1 + torch.randperm(slots * per_slot).view(slots, per_slot)
    return cache, table


def spoil(cache: KVCache, table: Tensor, slot: int, end: int) -> None:
    """NaN in all of a slot's rows from `end` on."""
    for position in range(end, table.shape[1] * 4):
        for buffer in (cache.keys, cache.values):
            if buffer.dtype == torch.float8_e4m3fn:  # which knows one NaN and no assignment
                buffer.view(torch.uint8)[table[slot, position // 4], position % 4] = 0x7F
            else:
                buffer[table[slot, position // 4], position % 4] = NAN


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    kv_dtype=st.sampled_from([*DTYPES, torch.float8_e4m3fn]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    dim=st.sampled_from([16, 48, 128, 256]),
    width=st.integers(1, 6),
    starts=st.lists(st.integers(1, 33), min_size=1, max_size=3),
    first=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_attend_decode(
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    heads: tuple[int, int],
    dim: int,
    width: int,
    starts: list[int],
    first: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    cache, table = pages(kv_dtype, 3, 10, heads[1], dim)
    slots = torch.randperm(3)[: len(starts)] + 1
    for slot, start in zip(slots.tolist(), starts, strict=True):
        spoil(cache, table, slot, start + width)
    q = draw(len(starts) * width, heads[0], dim, dtype=dtype)
    rows = DecodeRows(slots, torch.tensor(starts), width, 99)
    arguments = (q, cache, table, rows, dim**-0.5, first)
    close(cpu_attention.attend_decode(*arguments), reference(attention.attend_decode)(*arguments))


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    eighth=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (6, 1)]),
    rows=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 120)), min_size=1, max_size=3),
    first=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_attend_prefill(
    dtype: torch.dtype,
    eighth: bool,
    heads: tuple[int, int],
    rows: list[tuple[int, int]],
    first: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    cache, table = pages(torch.float8_e4m3fn if eighth else dtype, 3, 68, heads[1], 32)
    for slot, (start, count) in enumerate(rows, 1):
        spoil(cache, table, slot, start + count)
    batch = prompt_rows(list(range(1, len(rows) + 1)), rows)
    q = draw(sum(batch.counts), heads[0], 32, dtype=dtype)
    arguments = (q, cache, table, batch, 32**-0.5, first)
    close(cpu_attention.attend_prefill(*arguments), reference(attention.attend_prefill)(*arguments))


def test_every_e4m3_number_is_read_as_torch_reads_it() -> None:
    """Subnormals, both zeros, the largest and NaN: attention to one position is its value."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    cache = KVCache(
        torch.zeros(2, 4, 1, 256).to(codes.dtype), torch.zeros(2, 4, 1, 256).to(codes.dtype)
    )
    cache.values.view(torch.uint8)[1, 0, 0] = codes.view(torch.uint8)
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    rows = DecodeRows(torch.tensor([1]), torch.tensor([0]), 1, 1)
    got = cpu_attention.attend_decode(draw(1, 1, 256), cache, table, rows, 1.0)
    torch.testing.assert_close(got[0, 0], codes.float(), rtol=0, atol=0, equal_nan=True)


def prompt_rows(slots: list[int], rows: list[tuple[int, int]]) -> PrefillRows:
    starts, counts = zip(*rows, strict=True)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    return PrefillRows(torch.tensor(slots), torch.tensor(starts), offsets, counts, starts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(32, 8), (256, 64), (24, 24), (128, 128)])
@pytest.mark.parametrize(
    ("heads", "gates", "normed"),
    [(4, 4, True), (4, 0, True), (0, 0, True), (4, 0, False)],
    ids=["", "no-gates", "no-queries", "no-norms"],
)
def test_norm_rope_store(
    dtype: torch.dtype, dim: int, rotary: int, heads: int, gates: int, normed: bool
) -> None:
    kv_heads = 2
    widths = [heads * dim, gates * dim, kv_heads * dim, kv_heads * dim]
    qkv = draw(7, sum(widths), dtype=dtype)
    table = rope_table(dim, rotary, 1e4, 64, None, "cpu")
    kv_rows, positions = torch.randperm(12)[:7], torch.randperm(64)[:7]
    caches = [KVCache(*(torch.full((3, 4, kv_heads, dim), 7.0, dtype=dtype),) * 2) for _ in "ab"]
    for cache in caches:
        cache.values = cache.keys.clone()
    weights = (draw(dim), draw(dim)) if normed else (None, None)
    out = [
        run(qkv, widths, *weights, 1e-6, positions, table, cache, kv_rows)
        for run, cache in zip(
            (cpu_attention.norm_rope_store, reference(attention.norm_rope_store)),
            caches,
            strict=True,
        )
    ]
    assert out[0].shape == (7, heads, dim)
    close(*out)
    close(caches[0].keys, caches[1].keys)
    assert bool((caches[0].keys != 7.0).any(-1).sum() == 7 * kv_heads)
    assert bool((caches[0].values == caches[1].values).all())


# --- Gated DeltaNet ----------------------------------------------------------------------------


def gdn_cache(dtypes: list[torch.dtype], heads: tuple[int, int], window: int, k: int) -> GDNState:
    key_heads, value_heads = heads
    channels = 2 * key_heads * 32 + value_heads * 48
    return GDNState(
        state=draw(5, value_heads, 32, 48).to(dtypes[0]),
        window_k=torch.nn.functional.normalize(draw(5, key_heads, window, 32), dim=-1).to(
            dtypes[1]
        ),
        window_u=draw(5, value_heads, window, 48),
        window_g=-torch.rand(5, value_heads, window).cumsum(-1),
        conv=draw(5, 3 + k, channels).to(dtypes[1]),
    )


def copies(cache: GDNState) -> GDNState:
    return GDNState(
        *(
            x.clone()
            for x in (cache.state, cache.window_k, cache.window_u, cache.window_g, cache.conv)
        )
    )


def same(a: GDNState, b: GDNState) -> None:
    for name in ("state", "window_k", "window_u", "window_g", "conv"):
        close(getattr(a, name), getattr(b, name))


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    state=st.sampled_from(DTYPES),
    heads=st.sampled_from([(1, 1), (2, 4), (1, 3), (2, 2)]),
    width=st.integers(1, 6),
    fills=st.lists(st.integers(0, 18), min_size=4, max_size=4),
    decay=st.sampled_from([0.01, 1.0, 300.0]),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_gdn_decode(
    dtype: torch.dtype,
    state: torch.dtype,
    heads: tuple[int, int],
    width: int,
    fills: list[int],
    decay: float,
    count: int,
    seed: int,
) -> None:
    """Any order of slots, folds among them; window rows past the fill hold NaN."""
    torch.manual_seed(seed)
    cache = gdn_cache([state, dtype], heads, 18, width - 1)
    fill = torch.tensor([0, *fills], dtype=torch.int32)
    for slot in range(5):
        for buffer in (cache.window_k, cache.window_u, cache.window_g):
            buffer[slot, :, int(fill[slot]) :] = NAN
    twin, slots = copies(cache), (torch.randperm(4) + 1)[:count]
    tokens = count * width
    ab = draw(tokens, 2 * heads[1], dtype=dtype)
    inputs = (
        draw(tokens, cache.conv.shape[2], dtype=dtype),
        *ab.chunk(2, dim=-1),
        torch.rand(heads[1]).mul(decay).log(),
        draw(heads[1]),
    )
    rows = DecodeRows(slots, torch.zeros_like(slots), width, 99)
    out = cpu_gdn.gdn_decode_raw(*inputs, cache, fill, rows)
    close(out, reference(gdn.gdn_decode_raw)(*inputs, twin, fill, rows))
    same(cache, twin)


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    state=st.sampled_from(DTYPES),
    heads=st.sampled_from([(1, 1), (2, 4), (1, 3)]),
    counts=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_gdn_prefill(
    dtype: torch.dtype, state: torch.dtype, heads: tuple[int, int], counts: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    cache = gdn_cache([state, dtype], heads, 6, 0)
    twin, total = copies(cache), sum(counts)
    rows = prompt_rows([4, 2, 3][: len(counts)], [(0, count) for count in counts])
    inputs = (
        draw(total, cache.conv.shape[2], dtype=dtype),
        -torch.rand(total, heads[1]),
        torch.rand(total, heads[1]),
    )
    out = cpu_gdn.gdn_prefill(*inputs, cache, rows)
    close(out, reference(gdn.gdn_prefill)(*inputs, twin, rows))
    same(cache, twin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", range(1, 7))
def test_conv(dtype: torch.dtype, width: int) -> None:
    """Decode rows and prompts of 1 to 90 tokens, from a slice of a wider projection."""
    cache = gdn_cache([dtype, dtype], (2, 4), 6, width - 1)
    twin, channels = copies(cache), cache.conv.shape[2]
    weight = draw(channels, 4, dtype=dtype)
    offset = torch.randint(0, width, (5,), dtype=torch.int32)
    slots = torch.tensor([3, 1])
    decode = DecodeRows(slots, torch.zeros_like(slots), width, 99)
    prompts = prompt_rows([2, 4, 3], [(0, 1), (0, 2), (0, 90)])
    for name, rows, tokens in (("conv_decode", decode, 2 * width), ("conv_prefill", prompts, 93)):
        x = draw(tokens, channels + 40, dtype=dtype)[:, :channels]
        out = getattr(cpu_gdn, name)(x, cache, weight, rows, offset)
        close(out, reference(getattr(gdn, name))(x, twin, weight, rows, offset))
    same(cache, twin)


# --- norms and gates ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_gates(dtype: torch.dtype) -> None:
    x, y, weight = draw(5, 96, dtype=dtype), draw(5, 96, dtype=dtype), draw(96)
    o, z = draw(5, 3, 32, dtype=dtype), draw(5, 200, dtype=dtype)[:, 104:].unflatten(1, (3, 32))
    wide = draw(5, 200, dtype=dtype)[:, 7:103]
    calls = [
        (norm.rms_norm, (x, weight, 1e-6)),
        (norm.add_rms_norm, (x, y, weight, 1e-6)),
        (norm.gated_rms_norm, (o, z, draw(32), 1e-6)),
        (activation.silu_mul, (x * 20,)),
        (activation.sigmoid_gate, (x, wide)),
    ]
    for run, arguments in calls:
        got, want = run(*arguments), reference(run)(*arguments)
        for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
            close(a, b)


@pytest.mark.parametrize("tokens", [1, 3, 4, 6, 16, 33])
@pytest.mark.parametrize(("columns", "n"), [(8, 32), (100, 96), (512, 256)])
def test_linear(tokens: int, columns: int, n: int) -> None:
    """As exact as one rounding. With few rows, no row depends on the others."""
    x, weight = (draw(size, n, dtype=torch.bfloat16) for size in (tokens, columns))
    out = gemm.linear(x, weight)
    torch.testing.assert_close(
        out.double(), x.double() @ weight.double().t(), rtol=2**-8, atol=1e-3
    )
    if cpu_gemm.linear(x, weight) is not NotImplemented:
        assert bool((cpu_gemm.linear(x[-1:], weight)[0] == out[-1]).all())


# --- choosing ----------------------------------------------------------------------------------


def test_unsupported_shapes_and_dtypes_run_the_reference() -> None:
    """Head sizes that are no multiple of the vector length, float64, other float8 caches."""
    cache, table = pages(torch.float32, 2, 3, 1, 24)
    q, rows = draw(1, 1, 24), DecodeRows(torch.tensor([1]), torch.tensor([3]), 1, 9)
    assert cpu_attention.attend_decode(q, cache, table, rows, 1.0) is NotImplemented
    close(
        attention.attend_decode(q, cache, table, rows, 1.0),
        reference(attention.attend_decode)(q, cache, table, rows, 1.0),
    )
    eighth, table = pages(torch.float8_e5m2, 2, 3, 1, 32)
    q = draw(1, 1, 32)
    assert cpu_attention.attend_decode(q, eighth, table, rows, 1.0) is NotImplemented
    x = torch.randn(3, 8, dtype=torch.float64)
    assert norm.rms_norm(x, torch.zeros(8), 1e-6).dtype == torch.float64


def test_no_library_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "library", lambda: None)
    assert call.function("attend") is None
    x = draw(3, 32)
    assert bool((norm.rms_norm(x, torch.ones(32), 1e-6) != 0).all())


def test_a_compiler_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "COMPILE", ("--no-such-option",))
    state = build.LibraryState()
    state.fill()
    assert state.library is None
    assert len(caplog.records) == 1
    assert "torch's ops run instead" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


def test_dispatch_has_the_reference_within_reach() -> None:
    def nothing(x: Tensor) -> Tensor:
        return x

    assert op(nothing).__wrapped__ is nothing  # type: ignore[attr-defined]


# --- threads -----------------------------------------------------------------------------------


def test_any_number_of_threads_and_of_callers_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tasks run in any order; a second caller at the same time works alone."""
    x, weight = draw(70, 64, dtype=torch.bfloat16), draw(999, 64, dtype=torch.bfloat16)
    wide = draw(900, 128, dtype=torch.float32)
    want = [run(*arguments).clone() for run, arguments in _products(x, weight, wide)]
    for module in (cpu_gemm, cpu_activation):
        monkeypatch.setattr(module, "threads", lambda: 4)

    def check(_: int) -> None:
        for _ in range(50):
            for (run, arguments), expected in zip(_products(x, weight, wide), want, strict=True):
                assert torch.equal(run(*arguments), expected)

    with ThreadPoolExecutor(3) as callers:
        list(callers.map(check, range(3)))


def _products(x: Tensor, weight: Tensor, wide: Tensor) -> list[Any]:
    return [(gemm.linear, (x, weight)), (activation.silu_mul, (wide,))]
