"""Experts on the GPU: routing, groups and both GEMMs, against the references.

Without a GPU the Triton kernels run in Triton's interpreter, with e4m3 values in float32, and the
CUDA kernel through g++, its warps emulated (cuda_on_cpu.h).
"""

from __future__ import annotations

import ctypes
import functools
import random
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from millrace.kernels import moe
from millrace.kernels.gemm import quantize_blocks
from millrace.kernels.moe import ExpertWeights, Routes, Shared
from millrace.kernels.quantize import Quantized, quantize
from tests.kernels.gpu.gpu_support import INTERPRETED, on_each_device, relative

if TYPE_CHECKING:
    from millrace.kernels.gpu.moe.routing import Groups

HERE = Path(__file__).parents[1]  # where cuda_on_cpu.h is
E4M3 = torch.float8_e4m3fn
on_cpu = pytest.mark.skipif(INTERPRETED, reason="runs without Triton")


def drawn(tokens: int, count: int, top_k: int, kind: str, device: str) -> Routes:
    """kind: of random experts, the same for all tokens, only the last ones, or with experts of
    other ranks among them."""
    rng, every = random.Random(tokens * count + top_k), range(count)
    some = {"same": every[:top_k], "last": every[count - top_k :]}.get(kind, every)
    chosen = [rng.sample(some, top_k) for _ in range(tokens)]
    if kind == "ranks":
        chosen = [[-1 if rng.random() < 0.5 else expert for expert in row] for row in chosen]
    experts = torch.tensor(chosen, dtype=torch.int32, device=device).view(tokens, top_k)
    return Routes(experts, torch.rand(tokens, top_k, device=device) + 0.1)


@on_each_device
@pytest.mark.parametrize(
    ("tokens", "count", "top_k"), [(1, 4, 1), (5, 60, 8), (2, 512, 10), (2, 8, 8)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_route(device: str, tokens: int, count: int, top_k: int, normalize: bool) -> None:
    """Also with many ties, infinite logits, and in bfloat16."""
    from millrace.kernels.gpu.moe import route

    torch.manual_seed(count)
    wide = torch.randn(tokens, count + 3, device=device)
    tied = torch.randint(-2, 2, (tokens, count + 3), device=device).float() * 0.5
    far = wide.clone()
    far[:, : count // 2] = -torch.inf
    for logits in (wide, tied, -tied, far):
        for dtype in (torch.float32, torch.bfloat16):
            given = logits.to(dtype)[:, 1 : count + 1]
            got, want = (
                route(given, top_k, normalize),
                moe.route.__wrapped__(given, top_k, normalize),
            )
            assert torch.equal(got.experts.long(), want.experts)
            gate = logits[:, :1].to(dtype)
            both = route(given, top_k, normalize, gate)
            assert torch.equal(both.experts[:, :top_k], got.experts)
            assert torch.equal(both.weights[:, :top_k], got.weights)
            assert both.experts[:, top_k].tolist() == [count] * tokens
            torch.testing.assert_close(both.weights[:, top_k:], gate.sigmoid())
            assert got.weights.dtype == dtype
            limit = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(got.weights, want.weights, rtol=limit, atol=1e-6)


@on_each_device
def test_a_token_that_is_nan_has_experts(device: str) -> None:
    from millrace.kernels.gpu.moe import route

    experts = route(torch.full((2, 16), torch.nan, device=device), 8, True).experts
    assert all(sorted(row) == sorted(set(row)) for row in experts.tolist())
    assert bool(((experts >= 0) & (experts < 16)).all())


@on_each_device
@pytest.mark.parametrize("kind", ["random", "same", "last", "ranks"])
@pytest.mark.parametrize(
    ("tokens", "count", "top_k", "tile"),
    [(1, 4, 1, 16), (9, 8, 3, 16), (40, 60, 8, 32), (130, 256, 8, 16), (600, 16, 8, 128)],
)
def test_groups(device: str, tokens: int, count: int, top_k: int, tile: int, kind: str) -> None:
    from millrace.kernels.gpu.moe.routing import Groups, group, group_in_triton

    experts = drawn(tokens, count, top_k, kind, device).experts
    found = group(experts, count, tile)
    check_groups(found, experts, count)
    if device == "cpu":
        return  # that was by Triton already
    other = Groups(*(torch.full_like(part, 77) for part in found[:3]), tile)
    group_in_triton(experts, count, other)
    check_groups(other, experts, count)


def check_groups(found: Groups, experts: Tensor, count: int) -> None:
    """Every pair has one row, in the order of experts; tiles have one expert."""
    tile = found.tile
    flat, rows = experts.flatten().tolist(), found.rows.tolist()
    row_experts, row_pairs = found.experts.tolist(), found.pairs.tolist()
    expected: list[int] = []  # the expert of each row
    order: list[int] = []
    for expert in range(count):
        own = [pair for pair, of in enumerate(flat) if of == expert]
        order += own
        expected += [expert] * len(own) + [-1] * (-len(own) % tile)
    assert len(row_experts) % tile == 0
    assert row_experts == expected + [-1] * (len(row_experts) - len(expected))
    pairs = [row_pairs[row] for row, expert in enumerate(row_experts) if expert >= 0]
    assert [flat[pair] for pair in pairs] == [flat[pair] for pair in order]
    assert sorted(pairs) == sorted(order)
    assert [row < 0 for row in rows] == [expert < 0 for expert in flat]
    assert all(row_pairs[row] == pair for pair, row in enumerate(rows) if row >= 0)


def plain_weights(
    count: int, width: int, hidden: int, device: str
) -> tuple[ExpertWeights, ExpertWeights]:
    gate_up = torch.randn(count, 2 * width, hidden, device=device) / hidden**0.5
    down = torch.randn(count, hidden, width, device=device) / width**0.5
    return ExpertWeights(gate_up), ExpertWeights(down)


def poisoned(weights: ExpertWeights, routes: Routes) -> None:
    """Experts without tokens become NaN."""
    idle = set(range(len(weights.values))) - set(routes.experts.flatten().tolist())
    for part in (weights.values, weights.scales):
        if part is not None and idle:
            view = part.view(torch.uint8) if part.dtype == E4M3 else part
            view[sorted(idle)] = 0x7F if part.dtype == E4M3 else torch.nan


def exact(
    x: Tensor, routes: Routes, gate_up: ExpertWeights, down: ExpertWeights, shared: Shared | None
) -> Tensor:
    """Token by token, in float64."""
    rows = []
    for token, experts, weights in zip(x.double(), routes.experts, routes.weights, strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(experts.tolist(), weights.double(), strict=True):
            if expert < 0:
                continue
            gate, up = (gate_up.of(expert, torch.float64).double() @ token).chunk(2)
            inner = gate / (1 + (-gate).exp()) * up
            total += weight * (down.of(expert, torch.float64).double() @ inner)
        rows.append(total)
    made = torch.stack(rows)
    if shared is not None:
        made += shared.out.double() / (1 + (-shared.gate.double()).exp())
    return made


@on_each_device
@pytest.mark.parametrize("kind", ["random", "same", "last", "ranks"])
@pytest.mark.parametrize(
    ("tokens", "count", "top_k", "width", "hidden"),
    [(1, 4, 1, 32, 64), (3, 7, 2, 24, 40), (33, 5, 3, 96, 80), (18, 9, 4, 72, 40)],
)
def test_plain_experts(
    device: str, tokens: int, count: int, top_k: int, width: int, hidden: int, kind: str
) -> None:
    from millrace.kernels.gpu.moe import run_experts

    torch.manual_seed(tokens)
    routes = drawn(tokens, count, top_k, kind, device)
    weights = plain_weights(count, width, hidden, device)
    for part in weights:
        poisoned(part, routes)
    x = torch.randn(tokens, hidden, device=device)
    shared = None
    if tokens % 2:
        wide = torch.randn(tokens, hidden + 8, device=device)
        shared = Shared(wide[:, :hidden], wide[:, -1:])
    want = exact(x, routes, *weights, shared)
    assert relative(run_experts(x, routes, *weights, shared), want) < 1e-5
    if device == "cuda":
        half = [ExpertWeights(part.values.bfloat16()) for part in weights]
        routes = Routes(routes.experts, routes.weights.bfloat16())
        want = exact(x.bfloat16(), routes, *half, shared)
        got = run_experts(x.bfloat16(), routes, *half, shared)
        assert got.dtype == torch.bfloat16
        assert relative(got, want) < 1e-2


def fp8_weights(
    count: int, width: int, hidden: int, device: str
) -> tuple[ExpertWeights, ExpertWeights]:
    def made(*shape: int) -> ExpertWeights:
        values = torch.randn(shape, device=device).mul_(64).to(E4M3)
        blocks = shape[0], shape[1] // 128, shape[2] // 128
        return ExpertWeights(
            values, (torch.rand(blocks, device=device) + 0.5) / 64 / shape[2] ** 0.5
        )

    return made(count, 2 * width, hidden), made(count, hidden, width)


def in_float(weights: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(weights.values.float(), weights.scales)


def laid_out(x: Quantized) -> Quantized:
    """With scales group by group, as the GPU ops leave them, and NaN behind."""
    tokens, groups = x.scales.shape
    padded = torch.full((groups, -(-tokens // 4) * 4), torch.nan, device=x.scales.device)
    padded[:, :tokens] = x.scales.t()
    return Quantized(x.values, padded.t()[:tokens])


@pytest.mark.skipif(not INTERPRETED, reason="its twin is test_fp8_experts")
@pytest.mark.parametrize(("tokens", "swap"), [(1, True), (5, False), (18, True)])
def test_scaled_tiles(tokens: int, swap: bool) -> None:
    """Numbers of e4m3, but stored in float32; so the second input is not rounded."""
    from millrace.kernels.gpu.moe.combine import combine
    from millrace.kernels.gpu.moe.routing import group
    from millrace.kernels.gpu.moe.tiles import TileConfig, down, gate_up

    torch.manual_seed(tokens)
    routes = drawn(tokens, 6, 3, "random", "cpu")
    first, last = (in_float(part) for part in fp8_weights(6, 256, 384, "cpu"))
    q = laid_out(quantize.__wrapped__(torch.randn(tokens, 384)))
    x = q.dequantize()
    q = Quantized(q.values.float(), q.scales)
    config = TileConfig(16, 128, 128, swap, 4, (2, 2))
    groups = group(routes.experts, 6, config.rows)
    made = down(gate_up(q, groups, first, 3, config), groups, last, torch.float32, config)
    got = combine(made, groups.rows, routes.weights, None)
    assert relative(got, exact(x, routes, first, last, None)) < 1e-5


WAYS = ["chosen", "few", "tiles", "deep_gemm", "deep_gemm_64"]


def run_way(
    way: str, x: Quantized, routes: Routes, gate_up: ExpertWeights, down: ExpertWeights
) -> Tensor:
    from millrace.common.optional import probe
    from millrace.kernels.gpu import moe as gpu
    from millrace.kernels.gpu.gemm.grouped import has_grouped
    from millrace.kernels.gpu.moe import few
    from millrace.kernels.gpu.moe.combine import combine

    if way == "chosen":
        return gpu.run_experts(x, routes, gate_up, down)
    if way == "tiles":
        return gpu.in_tiles(x, routes, gate_up, down, None)
    if way == "few":
        if not few.takes(x, gate_up, down):
            pytest.skip("more tokens than the kernel takes")
        made = few.few_experts(x, routes.experts, gate_up, down)
        assert made is not None
        return combine(made, routes.experts, routes.weights, None, placed=False)
    if len(routes.experts) < (2000 if way.endswith("64") else 300):
        pytest.skip("each shape is another kernel to compile, some seconds long")
    if not has_grouped():
        pytest.skip(f"DeepGEMM is not there: {probe('deep_gemm').problem}")
    return gpu.by_deep_gemm(x, routes, gate_up, down, None, 64 if way.endswith("64") else 128)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["random", "same", "last", "ranks"])
@pytest.mark.parametrize(
    ("tokens", "count", "top_k", "width", "hidden"),
    [(1, 256, 8, 512, 2048), (4, 128, 8, 768, 2048), (8, 512, 10, 1024, 4096), (7, 4, 1, 128, 256),
     (33, 64, 8, 512, 2048), (64, 256, 9, 768, 1024), (12, 4, 2, 1024, 512),
     (300, 16, 8, 512, 2048), (2000, 32, 8, 256, 1024)],
)  # fmt: skip
def test_fp8_experts(
    tokens: int, count: int, top_k: int, width: int, hidden: int, kind: str, way: str
) -> None:
    from millrace.kernels.gpu.quantize import quantize as quantized

    torch.manual_seed(tokens)
    routes = drawn(tokens, count, top_k, kind, "cuda")
    routes = Routes(routes.experts, routes.weights.bfloat16())
    weights = fp8_weights(count, width, hidden, "cuda")
    for part in weights:
        poisoned(part, routes)
    x = quantized(torch.randn(tokens, hidden, device="cuda").bfloat16())
    # Memory that is handed out next holds NaN.
    torch.full((1 << 26,), torch.nan, device="cuda")
    some = range(0, tokens, max(1, tokens // 16))
    got = run_way(way, x, routes, *weights)
    picked = Routes(*(part[list(some)] for part in routes))
    want = exact(x.dequantize()[list(some)], picked, *weights, None)
    assert relative(got[list(some)], want) < 0.04  # the second input is rounded to e4m3
    assert not bool(got.isnan().any())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 60, 1500])
def test_experts_in_a_graph(tokens: int) -> None:
    """Other routes than those that were captured; nothing is read on the host."""
    from millrace.kernels.gpu.moe import run_experts

    torch.manual_seed(tokens)
    weights = fp8_weights(32, 512, 1024, "cuda")
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()
    routes = [drawn(tokens, 32, 8, kind, "cuda") for kind in ("same", "random")]
    routes = [Routes(r.experts, r.weights.bfloat16()) for r in routes]
    wanted = [run_experts(x, r, *weights) for r in routes]
    held = Routes(routes[0].experts.clone(), routes[0].weights.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run_experts(x, held, *weights)
    for given, want in zip(routes, wanted, strict=True):
        held.experts.copy_(given.experts)
        held.weights.copy_(given.weights)
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got, want)


# --- few tokens, on a CPU ------------------------------------------------------------------------

ENTRY = """
#include "cuda_on_cpu.h"
{source}
extern "C" void run(void** arguments, int columns, int rows, int threads) {{
  call({name}, arguments, columns, rows, threads);
}}
"""


@functools.cache
def emulated(folder: Path, name: str, source: str) -> Callable[..., None]:
    """The kernel `name` of a source, on the CPU."""
    stem = folder / f"{name}_{zlib.crc32(source.encode())}"
    stem.with_suffix(".cpp").write_text(ENTRY.format(source=source, name=name))
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}", "-o"]
    subprocess.run([*command, f"{stem}.so", f"{stem}.cpp"], check=True, timeout=120)
    library = ctypes.CDLL(f"{stem}.so")

    def run(grid: tuple[int, ...], block: tuple[int, ...], args: list[Tensor | int]) -> None:
        values = [
            ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, Tensor) else ctypes.c_int(arg)
            for arg in args
        ]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        library.run(addresses, grid[0], grid[1], block[0])

    return run


@on_cpu
@pytest.mark.parametrize(
    ("tokens", "count", "top_k", "kind"),
    [
        (8, 3, 2, "ranks"),
        (9, 4, 3, "ranks"),
    ],
)
def test_emulated_few_experts(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    count: int,
    top_k: int,
    kind: str,
) -> None:
    from millrace.kernels.gpu.moe import few

    torch.manual_seed(tokens)
    folder = tmp_path_factory.getbasetemp()
    hidden, width = 1152, 128  # more groups than warps, and fewer
    monkeypatch.setattr(
        few, "compiled", lambda form: emulated(folder, "experts_few", few.source(form))
    )
    monkeypatch.setattr(few, "group", lambda *given: group_emulated(folder, monkeypatch, *given))
    routes = drawn(tokens, count, top_k, kind, "cpu")
    weights = fp8_weights(count, width, hidden, "cpu")
    for part in weights:
        poisoned(part, routes)
    x = laid_out(quantize.__wrapped__(torch.randn(tokens, hidden)))
    assert few.takes(x, *weights)
    made = few.few_experts(x, routes.experts, *weights)
    assert made is not None
    here = (routes.experts >= 0)[..., None]
    made = torch.where(here, made.view(tokens, top_k, hidden), 0).double()
    got = (made * routes.weights[..., None]).sum(1)
    assert relative(got, exact(x.dequantize(), routes, *weights, None)) < 1e-2


def group_emulated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, experts: Tensor, count: int, tile: int
) -> Groups:
    from millrace.kernels.gpu.moe import routing

    def compiled(name: str, *given: int) -> Callable[..., None]:
        return emulated(folder, name, routing.source(*given))

    monkeypatch.setattr(routing, "compiled", compiled)
    room = routing.most_rows(experts.numel(), count, tile)
    parts = (torch.full((n,), 77, dtype=torch.int32) for n in (room, room, experts.numel()))
    found = routing.Groups(*parts, tile)
    assert routing.group_by_cuda(experts, count, found)
    return found


@on_cpu
@pytest.mark.parametrize("kind", ["random", "same", "last", "ranks"])
@pytest.mark.parametrize("alone", [True, False])
def test_emulated_groups(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    alone: bool,
    kind: str,
) -> None:
    from millrace.kernels.gpu.moe import routing

    monkeypatch.setattr(routing, "ALONE", 4096 if alone else 64)
    monkeypatch.setattr(routing, "BLOCK", 128)
    for tokens, count, top_k, tile in ((1, 4, 1, 16), (70, 257, 3, 16)):
        experts = drawn(tokens, count, top_k, kind, "cpu").experts
        folder = tmp_path_factory.getbasetemp()
        check_groups(group_emulated(folder, monkeypatch, experts, count, tile), experts, count)


@on_cpu
def test_few_experts_are_refused() -> None:
    from millrace.kernels.gpu.moe import few

    q = quantize.__wrapped__(torch.randn(65, 128))
    weights = [
        ExpertWeights(*(part[None] for part in quantize_blocks(torch.randn(shape))))
        for shape in ((256, 128), (128, 128))
    ]
    assert not few.takes(q, *weights)
    assert few.takes(Quantized(q.values[:1], q.scales[:1]), *weights)
