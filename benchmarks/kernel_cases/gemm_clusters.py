"""DeepGEMM's kernel with tiles and clusters that its own model of costs does not pick.

Every shape at 256 to 16,384 tokens: what is taken today, and tilings whose clusters share the
weight or the tokens. A tiling that the machine cannot hold, or that the table has already, is left
out of what is timed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernel_cases.case import Case
from kernel_cases.gemm import GEMM_SHAPES, product_case
from millrace.kernels.gpu.gemm import clusters, fp8
from millrace.kernels.gpu.gemm.clusters import Tiling

TOKENS = (256, 320, 384, 448, 512, 576, 640, 768, 896, 1024, 1536, 2048, 4096, 16384)
TILES = ("128x128", "128x160", "128x176", "256x96", "256x128")


def product(tiling: Tiling, x: object, weight: Tensor, scale: Tensor) -> Tensor:
    out = clusters.cluster_matmul(x, weight, scale, tiling)
    if out is None:
        raise RuntimeError("it cannot be compiled")
    return out


def cases(quick: bool) -> Iterator[Case]:
    """At 512 tokens, us, taken then / no operand shared / weight / tokens: down 96.6, 114.7, 70.0,
    71.9; o 34.2, 40.6, 26.2, 26.6."""
    tiles = TILES[1:2] if quick else TILES
    tilings = [Tiling.parse(f"{tile}/{who}") for tile in tiles for who in ("weight", "tokens")]
    clusters.prepare(tilings)
    ways: dict[str, Callable[..., Tensor]] = {
        "taken": lambda q, w, s: fp8.fp8_matmul(q, w, s, torch.bfloat16)
    }
    ways |= {str(tiling): functools.partial(product, tiling) for tiling in tilings}
    for tokens in (384, 448, 512, 1024) if quick else TOKENS:
        for name in GEMM_SHAPES:
            for way, run in ways.items():
                yield product_case(name, tokens, way, run, calls=12)
