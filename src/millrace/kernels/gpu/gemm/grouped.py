"""FP8 GEMMs of many rows with the weights of many experts, by DeepGEMM.

Rows are grouped by expert, each group in whole tiles. The library multiplies a tile of 64 rows if
its first one has an expert. It loads every tile, those behind the last group included: there are as
many as the number of tokens allows at most, because nobody reads the counts on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.common.optional import probe
from millrace.kernels.gpu.device import gpu
from millrace.kernels.gpu.gemm.fp8 import allow_early_launches, multiprocessors_of
from millrace.kernels.quantize import Quantized

TILE = 128  # rows


def has_grouped() -> bool:
    """Whether DeepGEMM is there, on a GPU that it runs on, with the GEMM of groups."""
    return gpu().is_hopper and hasattr(probe("deep_gemm").module, _NAME)


def grouped_matmul(
    x: Quantized, weight: Tensor, scale: Tensor, experts: Tensor, tile: int = TILE,
    multiprocessors: int = 0,
) -> Tensor:  # fmt: skip
    """Each row times the weight of its expert, bfloat16 [P, out].

    x: [P, in], P a multiple of `tile`; weight: e4m3 [E, out, in]; scale: float32 [E, out / 128,
    in / 128]; experts: int32 [P], -1 for rows without one, whose results may be anything.
    multiprocessors: 0 for all.
    """
    library = probe("deep_gemm").module
    assert library is not None
    shape = len(x.values), weight.shape[1]
    out = torch.empty(shape, dtype=torch.bfloat16, device=weight.device)
    allow_early_launches()
    library.set_num_sms(multiprocessors_of(multiprocessors))
    _set_tile(library, tile)
    getattr(library, _NAME)(tuple(x), (weight, scale), out, experts)
    return out


_NAME = "m_grouped_fp8_gemm_nt_contiguous"


def _set_tile(library: object, tile: int) -> None:
    """Tiles of 128 rows are the library's own; older ones have no others."""
    change = getattr(library, "set_mk_alignment_for_contiguous_layout", None)
    if change is not None:
        change(tile)
    elif tile != TILE:
        raise ValueError(f"this DeepGEMM has tiles of {TILE} rows only, not of {tile}")
