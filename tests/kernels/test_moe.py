"""Routing and experts: each against its formula in float64, by the reference and on the CPU."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.kernels.cpu import build
from millrace.kernels.gemm import quantize_blocks
from millrace.kernels.moe import (
    ExpertWeights,
    Routes,
    Shared,
    count_load,
    route,
    run_experts,
    with_shared,
)

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16]
HAS_NATIVE = shutil.which("g++") is not None and build.is_enabled()


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """With a compiler, the CPU's path is the compiled one from the start."""
    if HAS_NATIVE:
        build.build()
        build.library()
        build.wait_until_built()


@pytest.mark.parametrize("normalize", [False, True])
def test_route_takes_the_best(normalize: bool) -> None:
    logits = torch.randn(50, 16)
    chosen, weights = route(logits, 5, normalize)
    for row, experts, found in zip(logits.double(), chosen, weights, strict=True):
        best = sorted(range(16), key=lambda expert: -float(row[expert]))[:5]
        shares = row.exp() / row.exp().sum()
        expected = shares[best] / (shares[best].sum() if normalize else 1.0)
        assert experts.tolist() == best
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_equal_logits_go_to_the_lower_expert() -> None:
    """Also where the softmax makes different logits equal, and in bfloat16, which has many ties."""
    rng = random.Random(0)
    logits = torch.tensor([[float(rng.randint(0, 3)) for _ in range(64)] for _ in range(40)])
    for dtype in DTYPES:
        chosen, weights = route(logits.to(dtype), 8, True)
        assert weights.dtype == dtype
        for row, experts in zip(logits.tolist(), chosen.tolist(), strict=True):
            order = [expert for _, expert in sorted((-x, expert) for expert, x in enumerate(row))]
            assert experts == order[:8]
    far = torch.tensor([[-300.0, -200.0, 0.0]])  # two shares of 0
    assert route(far, 2, True).experts.tolist() == [[2, 1]]


def written_out(x: Tensor, routes: Routes, gate_up: Tensor, down: Tensor) -> Tensor:
    """Token by token, in float64."""
    rows = []
    for token, experts, weights in zip(x.double(), routes.experts, routes.weights, strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(experts.tolist(), weights.double(), strict=True):
            gate, up = (gate_up[expert].double() @ token).chunk(2)
            total += weight * (down[expert].double() @ (gate / (1 + (-gate).exp()) * up))
        rows.append(total)
    return torch.stack(rows)


def drawn_routes(rng: random.Random, tokens: int, experts: int, top_k: int, kind: str) -> Routes:
    """kind: of random experts, the same for all tokens, or only the last ones."""
    every = range(experts)
    some = {"random": every, "same": every[:top_k], "last": every[experts - top_k :]}[kind]
    chosen = [rng.sample(some, top_k) for _ in range(tokens)]
    weights = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(rng.randrange(99)))
    return Routes(torch.tensor(chosen).view(tokens, top_k), weights)


def reference(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function.__wrapped__  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("way", [run_experts, reference(run_experts)], ids=["cpu", "reference"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    experts=st.sampled_from([1, 4, 7, 16, 64]),
    width=st.sampled_from([8, 24, 32, 96]),
    hidden=st.sampled_from([16, 40, 64, 160]),
    tokens=st.sampled_from([1, 2, 3, 17, 50]),
    kind=st.sampled_from(["random", "same", "last"]),
)
def test_experts(
    way: Callable[..., Tensor], seed: int, dtype: torch.dtype, experts: int, width: int,
    hidden: int, tokens: int, kind: str,
) -> None:  # fmt: skip
    """Also experts without tokens: their weights are NaN, and nothing may come of it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    routes = drawn_routes(rng, tokens, experts, rng.randint(1, min(8, experts)), kind)
    routes = Routes(routes.experts, routes.weights.to(dtype))
    x = torch.randn(tokens, hidden).to(dtype)
    gate_up = (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(experts, hidden, width) / width**0.5).to(dtype)
    idle = sorted(set(range(experts)) - set(routes.experts.flatten().tolist()))
    gate_up[idle], down[idle] = torch.nan, torch.nan
    out = way(x, routes, ExpertWeights(gate_up), ExpertWeights(down))
    exact = written_out(x, routes, gate_up, down)
    assert out.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("way", [run_experts, reference(run_experts)], ids=["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_experts(way: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Of e4m3 weights each block has its scale."""
    torch.manual_seed(0)
    routes = drawn_routes(random.Random(0), 9, 3, 2, "random")
    routes = Routes(routes.experts, routes.weights.to(dtype))
    x = torch.randn(9, 256).to(dtype)
    made = [
        [quantize_blocks(torch.randn(shape) / 16) for _ in range(3)]
        for shape in ((256, 256), (256, 128))
    ]
    stacked = [
        ExpertWeights(*(torch.stack(part) for part in zip(*both, strict=True))) for both in made
    ]
    plain = [torch.stack([weights.of(e, dtype) for e in range(3)]) for weights in stacked]
    out = way(x, routes, *stacked)
    exact, at = written_out(x, routes, *plain), 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact, rtol=at, atol=at)


@pytest.mark.skipif(not HAS_NATIVE, reason="needs a C++ compiler")
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_every_e4m3_number(tokens: int) -> None:
    """Those next to 0 too, and any scales: as near to the exact sum as bfloat16 inputs allow."""
    torch.manual_seed(tokens)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = 0  # not numbers
    gate_up, down = (
        ExpertWeights(
            codes[torch.randint(256, shape)].view(torch.float8_e4m3fn),
            torch.rand(shape[0], shape[1] // 128, shape[2] // 128) / 1000 + 1e-6,
        )
        for shape in ((5, 512, 128), (5, 128, 256))
    )
    plain = [torch.stack([w.of(e, torch.float32) for e in range(5)]) for w in (gate_up, down)]
    routes = drawn_routes(random.Random(tokens), tokens, 5, 2, "random")
    routes = Routes(routes.experts, routes.weights.bfloat16())
    x = torch.randn(tokens, 128).bfloat16()
    exact = written_out(x, routes, *plain)
    error = (run_experts(x, routes, gate_up, down).double() - exact).norm() / exact.norm()
    assert float(error) < 5e-3


@pytest.mark.skipif(not HAS_NATIVE, reason="needs a C++ compiler")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_does_not_depend_on_others(threads: int) -> None:
    """Bit for bit: alone, in a batch, with one thread or two."""
    torch.manual_seed(0)
    x = torch.randn(40, 256)
    routes = drawn_routes(random.Random(1), 40, 8, 3, "random")
    gate_up = ExpertWeights(torch.randn(8, 2 * 144, 256) / 16)
    down = ExpertWeights(torch.randn(8, 256, 144) / 12)
    torch.set_num_threads(threads)
    try:
        together = run_experts(x, routes, gate_up, down)
    finally:
        torch.set_num_threads(1)
    for i in range(40):
        own = Routes(*(part[i : i + 1] for part in routes))
        assert torch.equal(run_experts(x[i : i + 1], own, gate_up, down)[0], together[i])


def test_no_tokens() -> None:
    routes = Routes(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    weights = ExpertWeights(torch.randn(4, 32, 16)), ExpertWeights(torch.randn(4, 16, 16))
    assert run_experts(torch.zeros(0, 16), routes, *weights).shape == (0, 16)


def test_a_token_that_is_nan_spoils_no_other() -> None:
    """Rows of padding may hold anything; their routes are in range all the same."""
    torch.manual_seed(0)
    x, weights = torch.randn(6, 16), ExpertWeights(torch.randn(4, 16, 16))
    down = ExpertWeights(torch.randn(4, 16, 8))
    router = torch.randn(16, 4)
    alone = run_experts(x, route(x @ router, 2, True), weights, down)
    x[3] = torch.nan
    routes = route(x @ router, 2, True)
    assert bool(((routes.experts >= 0) & (routes.experts < 4)).all())
    for way in (run_experts, reference(run_experts)):
        beside = way(x, routes, weights, down)
        live = [0, 1, 2, 4, 5]
        torch.testing.assert_close(beside[live], alone[live], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_shared(dtype: torch.dtype) -> None:
    out, shared, gate = (torch.randn(7, n).to(dtype) for n in (12, 12, 1))
    exact = out.double() + shared.double() / (1 + (-gate.double()).exp())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    got = with_shared(out, Shared(shared, gate))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def test_load_counts_tokens_but_no_padding() -> None:
    load, experts = torch.tensor([5, 0, 0, 0]), torch.tensor([[0, 2], [2, 1], [3, 0]])
    count_load(load, experts, torch.tensor([4, 1, 0]))
    assert load.tolist() == [6, 1, 2, 0]
    count_load(load, experts.to(torch.int32), torch.tensor([0, 0, 9]))
    assert load.tolist() == [7, 1, 2, 1]
