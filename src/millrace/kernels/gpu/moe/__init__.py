"""Experts on the GPU: the ops of `millrace.kernels.moe`, and which kernels they take.

Few tokens stream the weights of the experts that they hit (few.py). More are grouped by expert, and
multiplied in tiles by Triton (tiles.py); many by DeepGEMM (rows.py) where it is installed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import triton
from torch import Tensor

from millrace.common.optional import probe
from millrace.kernels.dispatch import BackendChoice
from millrace.kernels.gpu.device import gpu
from millrace.kernels.gpu.gemm.grouped import TILE, grouped_matmul, has_grouped
from millrace.kernels.gpu.moe import few
from millrace.kernels.gpu.moe.combine import combine
from millrace.kernels.gpu.moe.routing import group, most_rows, route
from millrace.kernels.gpu.moe.rows import gather, silu_mul_quantize_rows
from millrace.kernels.gpu.moe.tiles import TileConfig, down, gate_up
from millrace.kernels.gpu.quantize import quantize
from millrace.kernels.moe import ExpertWeights, Routes, Shared
from millrace.kernels.quantize import GROUP, Quantized

__all__ = [
    "backends",
    "by_deep_gemm",
    "deep_gemm_rows",
    "deep_gemm_tile",
    "in_tiles",
    "route",
    "run_experts",
    "tile_config",
]

MANY = 48  # rows of an expert, on average, from which on DeepGEMM's tiles are worth their padding


def run_experts(
    x: Tensor | Quantized, routes: Routes, gate_up: ExpertWeights, down: ExpertWeights,
    shared: Shared | None = None,
) -> Tensor:  # fmt: skip
    """As the reference, rounded once, with x rounded to e4m3 by groups of 128 if the weights are
    e4m3."""
    assert gate_up.factor is None, "4-bit experts have the model dtype on a GPU"
    if gate_up.scales is None or down.scales is None:
        return in_tiles(x, routes, gate_up, down, shared)
    q = x if isinstance(x, Quantized) else quantize(x)
    experts, weights = routes
    bf16 = weights.dtype == torch.bfloat16
    if bf16 and few.takes(q, gate_up, down):
        experts = experts.to(torch.int32)
        made = few.few_experts(q, experts, gate_up, down)
        if made is not None:
            return combine(made, experts, weights, shared, placed=False)
    if bf16 and deep_gemm_rows(len(experts), experts.shape[1], down.values.shape):
        return by_deep_gemm(q, routes, gate_up, down, shared)
    return in_tiles(q, routes, gate_up, down, shared)


def deep_gemm_rows(tokens: int, top_k: int, shape: Sequence[int]) -> int:
    """Rows of DeepGEMM's GEMMs of so many tokens, padding included; 0: others multiply them.

    shape: experts, hidden channels, and channels of an expert. Results are in bfloat16.
    """
    count, hidden, width = shape
    aligned = hidden % GROUP == 0 and width % GROUP == 0
    if tokens * top_k < MANY * count or not aligned or not has_grouped():
        return 0
    return most_rows(tokens * top_k, count, deep_gemm_tile(tokens * top_k, count))


def deep_gemm_tile(pairs: int, count: int) -> int:
    """Rows of a tile for so many pairs of `count` experts: what measured faster on an H200."""
    return TILE if pairs >= TILE * count else TILE // 2


def in_tiles(
    x: Tensor | Quantized, routes: Routes, weights: ExpertWeights, last: ExpertWeights,
    shared: Shared | None,
) -> Tensor:  # fmt: skip
    """By Triton. x is quantized if the weights are."""
    tokens, top_k = routes.experts.shape
    count, dtype = len(weights.values), routes.weights.dtype
    config = tile_config(tokens * top_k, count, dtype, isinstance(x, Quantized))
    groups = group(routes.experts.to(torch.int32), count, config.rows)
    inner = gate_up(x, groups, weights, top_k, config)
    made = down(inner, groups, last, dtype, config)
    return combine(made, groups.rows, routes.weights, shared)


def by_deep_gemm(
    x: Quantized, routes: Routes, weights: ExpertWeights, last: ExpertWeights,
    shared: Shared | None, tile: int = 0,
) -> Tensor:  # fmt: skip
    """By DeepGEMM, in bfloat16. tile: rows of a tile; 0: it is chosen."""
    assert weights.scales is not None
    assert last.scales is not None
    count = len(weights.values)
    tile = tile or deep_gemm_tile(routes.experts.numel(), count)
    groups = group(routes.experts.to(torch.int32), count, tile)
    rows = gather(x, groups, routes.experts.shape[1])
    wide = grouped_matmul(rows, weights.values, weights.scales, groups.experts, tile)
    inner = silu_mul_quantize_rows(wide, groups)
    made = grouped_matmul(inner, last.values, last.scales, groups.experts, tile)
    return combine(made, groups.rows, routes.weights, shared)


def tile_config(pairs: int, count: int, dtype: torch.dtype, quantized: bool) -> TileConfig:
    """How tiles of so many pairs of `count` experts are multiplied."""
    rows = min(64, max(16, triton.next_power_of_2(pairs // max(1, count))))
    if dtype == torch.float32 and not quantized:
        return TileConfig(16, 32, 32, False, 4, (2, 2))
    if rows < 64:
        return TileConfig(rows, 128, 128, True, 4 if rows < 32 else 8, (4, 4))
    return TileConfig(rows, 128, 128, False, 8, (3, 4))


def backends(dtype: torch.dtype, shapes: Collection[tuple[int, int, int]]) -> list[BackendChoice]:
    """What runs experts, by tokens. shapes: of those with FP8 weights, as in `deep_gemm_rows`."""
    name = "experts"
    if not shapes:
        return [BackendChoice(name, "Triton kernels")]
    if dtype != torch.bfloat16 or not gpu().is_hopper:
        return [BackendChoice(name, "Triton kernels")]
    compiled = all(few.is_compiled(hidden, width) for _, hidden, width in shapes)
    reason = "" if compiled else "the CUDA kernel cannot be compiled here"
    some = BackendChoice(
        f"{name}, {few.MAX_TOKENS} tokens or less",
        "CUDA kernel" if compiled else "Triton kernels", reason,
    )  # fmt: skip
    found = probe("deep_gemm")
    if not has_grouped():
        return [some, BackendChoice(name, "Triton kernels", found.problem, found.remedy)]
    both = f"Triton kernels; DeepGEMM {found.version} for {MANY} tokens of an expert or more"
    return [some, BackendChoice(name, both)]
