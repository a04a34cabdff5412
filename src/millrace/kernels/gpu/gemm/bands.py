"""The order in which the programs of a Triton GEMM take its tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_in_bands(program, tiles_t, tiles_o, SUPER: tl.constexpr):
    """The tile of tokens and the tile of outputs of a program.

    Tiles run in bands of SUPER output tiles, so that programs alive together share operands.
    """
    band = program // (SUPER * tiles_t)
    width = tl.minimum(tiles_o - band * SUPER, SUPER)
    place = program % (SUPER * tiles_t)
    return place // width, band * SUPER + place % width
