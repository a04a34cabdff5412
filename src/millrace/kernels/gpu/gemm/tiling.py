"""Which of DeepGEMM's kernels a GEMM on Hopper takes: the tiles that its cost model prefers.

DeepGEMM compiles one kernel for each tiling, number of pipeline stages, cluster and number of
multiprocessors, whatever the shape of the weight. It does not tell which kernel a GEMM takes before
it has compiled it. What stands here follows the model of version 0.1.3, and only the order in which
kernels are compiled depends on it: where another version decides otherwise, some are compiled twice
at once, and none is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

SHARED_MEMORY = 232448  # bytes that a block may have
BARRIERS = 16 * 8 * 2  # bytes, for as many stages as there may be
MOST_STAGES = 16
BLOCK_K = 128  # inputs of a tile: bytes in e4m3
L2_BANDWIDTH = 64.0, 8e6 / 1.3e3  # bytes a cycle: of a multiprocessor, and of all at most
L1_BANDWIDTH = 128  # bytes a cycle and multiprocessor


class Kernel(NamedTuple):
    """What a kernel is compiled for. rows, columns: of a tile of the outputs [tokens, outputs].
    shared: which operand the two blocks of a cluster share; "" where a block is alone."""

    rows: int
    columns: int
    stages: int
    shared: str
    multiprocessors: int


def kernel_of(tokens: int, outputs: int, inputs: int, multiprocessors: int) -> Kernel:
    """The kernel of a GEMM of e4m3 activations [tokens, inputs] and a weight [outputs, inputs] with
    scales for blocks, into bfloat16. multiprocessors: an even number that it may use."""
    kernels = list(_kernels(tokens, inputs, multiprocessors))
    return min(kernels, key=lambda kernel: _cycles(kernel, tokens, outputs, inputs))


def _kernels(tokens: int, inputs: int, multiprocessors: int) -> Iterator[Kernel]:
    """Those that may be taken; of equal ones, the first is."""
    rows = [64, 128, *(small for small in (16, 32) if tokens <= small), 256]
    for shared in ("", "activations", "weight"):
        for height in rows:
            for width in range(16, 193, 16):
                stages = stages_of(height, width, inputs)
                enough = 3 if height * width >= 128 * 192 else 4
                if stages >= enough and min(height, width) <= 128 and _unrolls(width):
                    yield Kernel(height, width, stages, shared, multiprocessors)


def _unrolls(width: int) -> bool:
    """Whether scales of blocks of 128 outputs divide a tile of this width evenly."""
    over = width - BLOCK_K
    return over <= 0 or width % over == 0 or BLOCK_K % over == 0


def stages_of(height: int, width: int, inputs: int) -> int:
    """Pipeline stages that fit beside a tile of outputs and the weight's scales."""
    kinds = 1 if BLOCK_K % width == 0 else 2  # of scales that a tile may need
    scales = _up(4 * kinds * -(-inputs // BLOCK_K), 8)
    left = SHARED_MEMORY - _up(2 * height * width, 1024) - BARRIERS - scales
    return min(left // ((height + width) * BLOCK_K + _up(4 * height, 128)), MOST_STAGES)


def _cycles(kernel: Kernel, tokens: int, outputs: int, inputs: int) -> float:
    """Cycles that moving data to and from the second-level and first-level caches takes."""
    height, width, count = kernel.rows, kernel.columns, kernel.multiprocessors
    tiles = -(-tokens // height) * -(-outputs // width)
    waves = -(-tiles // count)
    if kernel.shared and waves <= 1:
        return float("inf")
    own_rows = height // 2 if kernel.shared == "activations" else height
    own_columns = width // 2 if kernel.shared == "weight" else width
    out = 2 * height * width
    l2 = (inputs * (own_rows + own_columns) + out) * tiles
    loaded, multiplied = height + width, max(64, height) + width
    l1 = (inputs * (loaded + multiplied) + 2 * out) * tiles
    each, most = L2_BANDWIDTH
    cycles = max(l2 // int(min(each * count, most)), l1 // (L1_BANDWIDTH * count))
    return int(cycles / (tiles / (waves * count)))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
