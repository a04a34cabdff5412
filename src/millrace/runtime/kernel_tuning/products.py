"""Products with weights of 8 and of 4 bits: which library, and which tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from millrace.kernels.gemm import W4, dequantize_w4
from millrace.kernels.gpu.gemm import choice, clusters, fp8, w4
from millrace.kernels.gpu.gemm.choice import GemmBackend
from millrace.kernels.gpu.gemm.clusters import Tiling
from millrace.kernels.gpu.gemm.few import MAX_TOKENS
from millrace.kernels.gpu.quantize import quantize
from millrace.kernels.gpu.tables import Shape, Way
from millrace.kernels.quantize import GROUP, Quantized
from millrace.runtime.kernel_tuning.choice import Problem, Run

Fp8Weight = tuple[Tensor, Tensor]  # values, and the scales of their blocks
W = TypeVar("W")

SMALL = (16, 24, 32, 48, 64, 96, 128, 192, 256)
LIBRARY_TOKENS = (*SMALL, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, *range(1024, 3073, 128))
TILE_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CACHE = 120 << 20  # bytes of weights that no L2 cache holds
MOST_COPIES = 64
FP8_ERROR, W4_ERROR = 5e-3, 1e-2
MULTIPROCESSORS = (0, 128, 124, 120, 112)
TILINGS = ("128x160/weight", "128x160/tokens", "128x128/weight", "256x128/weight")
CLUSTER_TOKENS = 256  # so few do not fill the tiles of clusters
WIDE_TILES = [(64, 128, 0, 4, 4), (128, 128, 0, 8, 3), (128, 64, 0, 4, 4), (64, 64, 0, 4, 4)]
FEW_TILES = [(0, 64, 1, 4, 6), (0, 64, 1, 4, 3), (0, 128, 1, 4, 4), (0, 32, 1, 4, 6)]
W4_FEW = [(0, 64, 128, 1, 4, 4), (0, 64, 64, 1, 4, 4), (0, 128, 64, 1, 4, 4), (0, 64, 128, 1, 4, 2)]
W4_WIDE = [
    (128, 128, 64, 1, 8, 3), (256, 128, 64, 1, 8, 3), (128, 128, 64, 0, 8, 3),
    (128, 128, 32, 1, 4, 4), (256, 64, 64, 1, 8, 3), (128, 256, 64, 0, 8, 3),
]  # fmt: skip
SPLITS = (1, 2, 4, 8)


class Fp8Libraries:
    """Where cuBLAS and DeepGEMM are: which of them, and with how many multiprocessors."""

    name = choice.SECTION

    def __init__(self, shapes: Sequence[Shape], tokens: Sequence[int] = ()) -> None:
        self._shapes, self._tokens = shapes, tokens or LIBRARY_TOKENS

    def shapes(self) -> Sequence[Shape]:
        return self._shapes

    def sizes(self, shape: Shape) -> Sequence[int]:
        return [count for count in self._tokens if count > MAX_TOKENS]

    def ways(self, shape: Shape, size: int) -> list[Way]:
        default = str(choice.rule(size, shape[0]))
        there = fp8.multiprocessors_of(0)
        counts = [count for count in MULTIPROCESSORS if count < there]
        tilings = TILINGS if size > CLUSTER_TOKENS else ()
        found = [*(GemmBackend("deep_gemm", count) for count in counts), choice.CUBLAS]
        found += [GemmBackend("deep_gemm", 0, text) for text in tilings]
        return list(dict.fromkeys([default, *map(str, found)]))

    def prepare(self, shape: Shape) -> Callable[[int], Problem]:
        copies = fp8_copies(shape)

        def problem(size: int) -> Problem:
            x = activations(size, shape[1])
            reference = fp8.cublas_matmul(x, *copies[0]).float()
            return Problem(lambda way: self._runs(x, copies, str(way)), reference, FP8_ERROR)

        return problem

    def _runs(self, x: Quantized, copies: list[Fp8Weight], text: str) -> list[Run]:
        way = GemmBackend.parse(text)
        if way.library == "cublas":
            return _each(lambda w: fp8.cublas_matmul(x, *w), copies)
        if way.tiling:
            return _each(lambda w: _clustered(x, w, way.tiling), copies)
        return _each(lambda w: fp8.deep_gemm_matmul(x, *w, way.multiprocessors), copies)


def _clustered(x: Quantized, weight: Fp8Weight, tiling: str) -> Tensor:
    out = clusters.cluster_matmul(x, *weight, Tiling.parse(tiling))
    if out is None:
        raise RuntimeError(f"tiles of {tiling} cannot be compiled, or do not take these tensors")
    return out


class Fp8Tiles:
    """Where these libraries are not: the tiles of our Triton kernel."""

    name = fp8.SECTION

    def __init__(self, shapes: Sequence[Shape], tokens: Sequence[int] = ()) -> None:
        self._shapes, self._tokens = shapes, tokens or TILE_TOKENS

    def shapes(self) -> Sequence[Shape]:
        return self._shapes

    def sizes(self, shape: Shape) -> Sequence[int]:
        return self._tokens

    def ways(self, shape: Shape, size: int) -> list[Way]:
        wide = [tiles for tiles in WIDE_TILES if size > 16]
        few = [(_padded(size), *tiles[1:]) for tiles in FEW_TILES if size <= 128]
        return list(dict.fromkeys([tuple(map(int, fp8.tile_rule(size))), *few, *wide]))

    def prepare(self, shape: Shape) -> Callable[[int], Problem]:
        copies = fp8_copies(shape)

        def problem(size: int) -> Problem:
            x = activations(size, shape[1])
            reference = _dequantized(*x) @ _blocks(*copies[0]).t()
            return Problem(lambda way: runs(x, way), reference, FP8_ERROR)

        def runs(x: Quantized, way: Way) -> list[Run]:
            tiles = fp8.Tiles._make(way)
            return _each(lambda w: fp8.triton_matmul(x, *w, dtype(), tiles), copies)

        return problem


class W4Products:
    """Weights of 4 bits behind the few tokens that a CUDA kernel takes: tiles, or cuBLAS."""

    name = w4.SECTION

    def __init__(
        self, shapes: Sequence[Shape], make: Callable[[Shape], W4], tokens: Sequence[int] = ()
    ) -> None:
        """shapes: (outputs, inputs, group). make: a weight of a shape, as the model has them."""
        self._shapes, self._make, self._tokens = shapes, make, tokens or TILE_TOKENS

    def shapes(self) -> Sequence[Shape]:
        return self._shapes

    def sizes(self, shape: Shape) -> Sequence[int]:
        return self._tokens

    def ways(self, shape: Shape, size: int) -> list[Way]:
        outputs, inputs, group = shape
        rule = w4.tile_rule(size, outputs, inputs, group)
        most = w4.inputs_of(group)
        default: Way = w4.TORCH if size >= w4.TORCH_FROM else tuple(map(int, rule))
        splits = [n for n in SPLITS if n == 1 or inputs // n >= w4.LEAST_INPUTS]
        few = [
            (_padded(size), tiles[1], min(tiles[2], most), tiles[3], parts, *tiles[4:])
            for tiles in W4_FEW for parts in splits if size <= 64
        ]  # fmt: skip
        wide = [(*t[:2], min(t[2], most), t[3], 1, *t[4:]) for t in W4_WIDE if size > 32]
        return list(dict.fromkeys([default, *few, *wide, w4.TORCH]))

    def prepare(self, shape: Shape) -> Callable[[int], Problem]:
        outputs, inputs, _ = shape
        copies = [self._make(shape) for _ in range(_copies(outputs * inputs // 2))]

        def problem(size: int) -> Problem:
            x = torch.randn(size, inputs, device=device()).to(dtype())
            reference = x.float() @ dequantize_w4(copies[0]).float().t()
            return Problem(lambda way: runs(x, way), reference, W4_ERROR)

        def runs(x: Tensor, way: Way) -> list[Run]:
            if way == w4.TORCH:
                return _each(lambda w: w4.torch_matmul(x, w), copies)
            tiles = w4.Tiles._make(way)
            return _each(lambda w: w4.triton_matmul(x, w, tiles), copies)

        return problem


def _each(multiply: Callable[[W], Tensor], copies: Sequence[W]) -> list[Run]:
    """A call for each copy of a weight."""
    return [partial(multiply, weight) for weight in copies]


# --- operands ----------------------------------------------------------------------------------


def fp8_copies(shape: Shape) -> list[Fp8Weight]:
    """Weights [outputs, inputs] with their block scales, as many as exceed the L2 cache."""
    return [_fp8_weight(*shape) for _ in range(_copies(shape[0] * shape[1]))]


def _fp8_weight(outputs: int, inputs: int) -> Fp8Weight:
    values = torch.randn(outputs, inputs, device=device()).mul(100).clamp(-448, 448)
    blocks = -(-outputs // GROUP), -(-inputs // GROUP)
    return values.to(torch.float8_e4m3fn), torch.rand(blocks, device=device()) * 0.01 + 0.01


def activations(tokens: int, inputs: int) -> Quantized:
    """Quantized as the model's are."""
    return quantize(torch.randn(tokens, inputs, device=device(), dtype=dtype()))


def device() -> str:
    """Where everything lies; a CPU where kernels are interpreted."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype() -> torch.dtype:
    """Of activations. Triton's interpreter multiplies no bfloat16."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _copies(size: int) -> int:
    return max(1, min(MOST_COPIES, -(-CACHE // size))) if torch.cuda.is_available() else 1


def _padded(tokens: int) -> int:
    return max(16, 1 << (tokens - 1).bit_length())


def _dequantized(values: Tensor, scales: Tensor) -> Tensor:
    """float32 [tokens, inputs] of activations with a scale for each group."""
    wide = scales.float().repeat_interleave(GROUP, 1)[:, : values.shape[1]]
    return values.float() * wide


def _blocks(values: Tensor, scales: Tensor) -> Tensor:
    """float32 [outputs, inputs] of a weight with a scale for each block."""
    tall = scales.float().repeat_interleave(GROUP, 0)[: values.shape[0]]
    return values.float() * tall.repeat_interleave(GROUP, 1)[:, : values.shape[1]]
