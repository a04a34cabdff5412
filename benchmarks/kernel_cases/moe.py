"""Experts of published models: every way to multiply, at few tokens and at many.

Tokens go to experts as `spread_routes` says: not evenly, as a trained router's do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_cases.case import Case, relative
from kernel_cases.shapes import DEVICE
from millrace.kernels.gpu import moe as gpu_moe
from millrace.kernels.gpu import quantize as gpu_quantize
from millrace.kernels.gpu.gemm.grouped import grouped_matmul, has_grouped
from millrace.kernels.gpu.moe import few, routing, rows, tiles
from millrace.kernels.gpu.moe.combine import combine
from millrace.kernels.gpu.moe.tiles import TileConfig
from millrace.kernels.moe import ExpertWeights, Routes, Shared
from millrace.kernels.quantize import Quantized

TOKENS = (1, 2, 4, 8, 32, 64, 128, 512, 1024, 2048, 8192)
SPREAD = 0.6  # standard deviation of an expert's own bias, in those of the logits


class Sizes(NamedTuple):
    """Of one layer."""

    experts: int
    top_k: int
    hidden: int
    width: int


MODELS = {
    "35B": Sizes(256, 8, 2048, 512),
    "coder-30B": Sizes(128, 8, 2048, 768),
}


def spread_routes(tokens: int, sizes: Sizes, seed: int = 0) -> Routes:
    """Logits are normal numbers, and some experts are liked better: a bias for each, of SPREAD.
    The busiest of 256 experts then has some 4 times the mean, and the most idle a tenth of it."""
    torch.manual_seed(seed)
    bias = torch.randn(sizes.experts, device=DEVICE) * SPREAD
    logits = torch.randn(tokens, sizes.experts, device=DEVICE) + bias
    return gpu_moe.route(logits.bfloat16(), sizes.top_k, True)


class Layer:
    """Random weights of all experts, and the work that routes make of them."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.gate_up = _weights(sizes.experts, 2 * sizes.width, sizes.hidden)
        self.down = _weights(sizes.experts, sizes.hidden, sizes.width)

    def hit(self, routes: Routes) -> int:
        return len(routes.experts.unique())


def _weights(count: int, outputs: int, inputs: int) -> ExpertWeights:
    values = torch.empty(count, outputs, inputs, device=DEVICE, dtype=torch.float8_e4m3fn)
    for part in values:  # float32 of one at a time
        part.copy_(torch.randn(outputs, inputs, device=DEVICE).mul_(64))
    scales = torch.rand(count, outputs // 128, inputs // 128, device=DEVICE) + 0.5
    return ExpertWeights(values, scales / 64 / inputs**0.5)


Way = Callable[[Quantized, Routes, Layer], Tensor]


def by_few(x: Quantized, routes: Routes, layer: Layer) -> Tensor:
    made = few.few_experts(x, routes.experts, layer.gate_up, layer.down)
    assert made is not None
    return combine(made, routes.experts, routes.weights, None, placed=False)


def by_tiles(config: TileConfig) -> Way:
    def run(x: Quantized, routes: Routes, layer: Layer) -> Tensor:
        groups = routing.group(routes.experts, layer.sizes.experts, config.rows)
        inner = tiles.gate_up(x, groups, layer.gate_up, layer.sizes.top_k, config)
        made = tiles.down(inner, groups, layer.down, torch.bfloat16, config)
        return combine(made, groups.rows, routes.weights, None)

    return run


def by_deep_gemm(tile: int) -> Way:
    def run(x: Quantized, routes: Routes, layer: Layer) -> Tensor:
        return gpu_moe.by_deep_gemm(x, routes, layer.gate_up, layer.down, None, tile)

    return run


def ways(tokens: int, sizes: Sizes, quick: bool) -> dict[str, Way]:
    found: dict[str, Way] = {}
    if tokens <= few.MAX_TOKENS or (tokens <= 512 and not quick):
        found["few"] = by_few
    mean = tokens * sizes.top_k / sizes.experts
    if tokens <= 2048:
        heights = [16] if mean < 2 else [16, 32] if mean <= 8 else [16, 32, 64]
        heights = [64, 128] if mean > 32 else heights
        for height in heights:
            options = [(4, (4, 4)), (8, (4, 4)), (4, (3, 3)), (8, (3, 4))]
            for warps, stages in options[: 1 if tokens < 8 or quick else None]:
                if not (height >= 64 and warps == 4):
                    config = TileConfig(height, 128, 128, height < 64, warps, stages)
                    found[f"tiles {height} w{warps} {stages}"] = by_tiles(config)
            if height == 64:
                config = TileConfig(64, 128, 128, True, 8, (3, 4))
                found["tiles 64 swapped w8 (3, 4)"] = by_tiles(config)
    if tokens >= 128 and has_grouped():
        found["deepgemm 128"] = by_deep_gemm(128)
        found["deepgemm 64"] = by_deep_gemm(64)
    return found


def check(run: Way, layer: Layer, tokens: int) -> float:
    """Of a few tokens, against their experts in float32."""
    routes = spread_routes(tokens, layer.sizes)
    x = gpu_quantize.quantize(torch.randn(tokens, layer.sizes.hidden, device=DEVICE).bfloat16())
    got, plain = run(x, routes, layer), x.dequantize()
    wanted, some = [], list(range(0, tokens, max(1, tokens // 4)))
    for token in some:
        total = torch.zeros(layer.sizes.hidden, device=DEVICE)
        for expert, weight in zip(
            routes.experts[token].tolist(), routes.weights[token].float(), strict=True
        ):
            gate, up = (layer.gate_up.of(expert, torch.float32) @ plain[token]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            total += weight * (layer.down.of(expert, torch.float32) @ inner)
        wanted.append(total)
    return relative(got[some], torch.stack(wanted))


def layer_case(name: str, layer: Layer, tokens: int, way: str, run: Way) -> Case:
    """All of a layer's experts, sorting and the sum included. Several routes by turns."""
    s = layer.sizes
    seeds = range(16 if tokens <= 8 else 4)  # so that weights fall out of the L2 cache
    hits = [layer.hit(spread_routes(tokens, s, seed)) for seed in seeds]
    each = 3 * s.hidden * s.width

    def made() -> list[Callable[[], object]]:
        x = gpu_quantize.quantize(torch.randn(tokens, s.hidden, device=DEVICE).bfloat16())
        routes = [spread_routes(tokens, s, seed) for seed in seeds]
        return [lambda r=r: run(x, r, layer) for r in routes]

    moved = sum(hits) / len(hits) * each + tokens * s.hidden * 3
    flops = 2.0 * tokens * s.top_k * each
    label = f"{name} M={tokens} {way}"
    return Case(label, lambda: check(run, layer, tokens), 0.04, made, moved, flops, "fp8")


def gemm_cases(name: str, layer: Layer, tokens: int) -> Iterator[Case]:
    """Each of the two GEMMs alone, by what the engine takes for so many tokens, with other routes
    at each call. They are checked as parts of a layer."""
    s = layer.sizes
    pairs = tokens * s.top_k
    routes = [spread_routes(tokens, s, seed) for seed in range(16 if tokens <= 64 else 4)]
    x = gpu_quantize.quantize(torch.randn(tokens, s.hidden, device=DEVICE).bfloat16())
    first: list[Callable[[], object]] = []
    second: list[Callable[[], object]] = []
    for one in routes:
        if tokens <= few.MAX_TOKENS:
            way = "few"
            tile = few.TILE if tokens > few.TILE else 0
            groups = routing.group(one.experts, s.experts, tile) if tile else None
            inner = few.few_gate_up(x, one.experts, layer.gate_up, groups)
            first.append(partial(few.few_gate_up, x, one.experts, layer.gate_up, groups))
            second.append(partial(few.few_down, inner, one.experts, layer.down, groups))
        elif gpu_moe.deep_gemm_rows(tokens, s.top_k, layer.down.shape):
            way = "deepgemm"
            tile = gpu_moe.deep_gemm_tile(pairs, s.experts)
            groups = routing.group(one.experts, s.experts, tile)
            placed = rows.gather(x, groups, s.top_k)
            up, down = layer.gate_up, layer.down
            wide = grouped_matmul(placed, up.values, up.scales, groups.experts, tile)
            made = rows.silu_mul_quantize_rows(wide, groups)
            owners = groups.experts
            first.append(partial(grouped_matmul, placed, up.values, up.scales, owners, tile))
            second.append(partial(grouped_matmul, made, down.values, down.scales, owners, tile))
        else:
            way = "tiles"
            config = gpu_moe.tile_config(pairs, s.experts, torch.bfloat16, True)
            groups = routing.group(one.experts, s.experts, config.rows)
            made = tiles.gate_up(x, groups, layer.gate_up, s.top_k, config)
            first.append(partial(tiles.gate_up, x, groups, layer.gate_up, s.top_k, config))
            second.append(partial(tiles.down, made, groups, layer.down, torch.bfloat16, config))
    weights = sum(layer.hit(one) for one in routes) / len(routes) * s.hidden * s.width
    flops = 2.0 * pairs * s.hidden * s.width
    for what, calls, moved, work in (
        ("gate_up", first, 2 * weights + tokens * s.hidden + pairs * s.width * 2, 2 * flops),
        ("down", second, weights + pairs * (s.width + 2 * s.hidden), flops),
    ):
        label = f"{name} M={tokens}: {what} {way}"
        yield Case(label, lambda: 0.0, 1.0, lambda calls=calls: calls, moved, work, "fp8")


def part_cases(name: str, layer: Layer, tokens: int) -> Iterator[Case]:
    """What stands around the GEMMs."""
    s = layer.sizes
    routes = spread_routes(tokens, s)
    logits = torch.randn(tokens, s.experts, device=DEVICE).bfloat16()
    x = gpu_quantize.quantize(torch.randn(tokens, s.hidden, device=DEVICE).bfloat16())
    groups = routing.group(routes.experts, s.experts, 128 if tokens >= 512 else 16)
    made = torch.randn(len(groups.experts), s.hidden, device=DEVICE).bfloat16()
    shared = Shared(made[:tokens], made[:tokens, :1])
    pairs = tokens * s.top_k

    def alone(what: str, run: Callable[[], object], moved: float, flops: float = 0) -> Case:
        label = f"{name} M={tokens}: {what}"
        return Case(label, lambda: 0.0, 1.0, lambda: [run] * 8, moved, flops, "fp8")

    yield alone("route", lambda: gpu_moe.route(logits, s.top_k, True), logits.nbytes + pairs * 6)
    yield alone("group", lambda: routing.group(routes.experts, s.experts, groups.tile), pairs * 12)
    yield alone(
        "combine", lambda: combine(made, groups.rows, routes.weights, shared),
        (pairs + 2 * tokens) * s.hidden * 2,
    )  # fmt: skip
    if tokens < 512 or not has_grouped():
        return
    gathered = rows.gather(x, groups, s.top_k)
    up = layer.gate_up
    wide = grouped_matmul(gathered, up.values, up.scales, groups.experts)
    yield alone("gather", lambda: rows.gather(x, groups, s.top_k), pairs * s.hidden * 2)
    yield alone("silu rows", lambda: rows.silu_mul_quantize_rows(wide, groups), pairs * s.width * 5)


def cases(quick: bool) -> Iterator[Case]:
    for name, sizes in list(MODELS.items())[: 1 if quick else None]:
        layer = Layer(sizes)
        for tokens in TOKENS:
            for way, run in ways(tokens, sizes, quick or name != "35B").items():
                yield layer_case(name, layer, tokens, way, run)
        for tokens in (1, 4, 8, 32, 128, 512, 2048, 8192):
            yield from gemm_cases(name, layer, tokens)
        if name == "35B":
            for tokens in (4, 128, 512, 8192):
                yield from part_cases(name, layer, tokens)
