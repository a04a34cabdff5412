"""e4m3 weights with one scale for each block of 128 x 128 (`quant_method` "fp8").

A weight W [r, c] has a second tensor W_scale_inv [ceil(r / 128), ceil(c / 128)], which multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from millrace.errors import CheckpointError
from millrace.kernels.formats import FP8_BLOCK
from millrace.kernels.gemm import dequantize, fp8_linear
from millrace.kernels.quantize import E4M3_MAX, Quantized
from millrace.model.build_context import BuildContext
from millrace.model.formats import plain
from millrace.model.initializers import in_bfloat16
from millrace.model.parameter import (
    FLOATS,
    Piece,
    Range,
    Stored,
    TensorFile,
    TensorSpec,
    full_tensor,
    parameter,
)
from millrace.model.weight_format import Linear, Quantization, Stack, WeightFormat

FP8 = frozenset({"F8_E4M3"})
SPREAD = 64.0  # standard deviation of random e4m3 weights: well within their range


class Fp8BlockLinear(Linear):
    """A linear layer whose weight stays e4m3. Pieces begin at block boundaries."""

    takes_fp8 = True

    def __init__(self, build: BuildContext, pieces: list[Piece]) -> None:
        weight, scale = fp8_parameters(pieces, build.device)
        super().__init__(weight.shape, build.dtype)
        self.weight, self.weight_scale_inv = weight, scale

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return fp8_linear(x, self.weight, self.weight_scale_inv, self.dtype)

    def forward_from(self, first: int, x: Tensor | Quantized) -> Tensor:
        assert first % FP8_BLOCK == 0
        scales = self.weight_scale_inv[first // FP8_BLOCK :]
        return fp8_linear(x, self.weight[first:], scales, self.dtype)


class Fp8Block(WeightFormat):
    name = "FP8"
    methods = ("fp8",)
    block = FP8_BLOCK

    def read_config(self, entries: Mapping[str, Any]) -> Quantization:
        shape = entries.get("weight_block_size")
        if list(shape or []) != [FP8_BLOCK, FP8_BLOCK]:
            raise CheckpointError(
                f"quantization 'fp8' with weight_block_size {shape} cannot be run; "
                f"fp8 with [{FP8_BLOCK}, {FP8_BLOCK}] and unquantised checkpoints can"
            )
        skipped = entries.get("modules_to_not_convert") or entries.get("ignored_layers") or []
        if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
            raise CheckpointError(
                f"modules_to_not_convert must be a list of names, got {str(skipped)[:100]!r}"
            )
        return Quantization("fp8", self, plain.FORMAT, tuple(skipped))

    def is_fast_on(self, device: torch.device) -> bool:
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)

    def has_experts_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        from millrace.kernels.cpu.w4 import is_supported

        native = device.type == "cpu" and dtype == torch.bfloat16 and is_supported()
        return native or self.is_fast_on(device)

    def linear(self, build: BuildContext, pieces: list[Piece]) -> Linear | None:
        return Fp8BlockLinear(build, pieces) if fits_blocks(pieces) else None

    def stack(self, build: BuildContext, pieces: list[Piece]) -> Stack | None:
        whole = all(piece.num_rows % FP8_BLOCK == 0 for piece in pieces)
        kept = whole and fits_blocks(pieces)
        return Stack(*fp8_parameters(pieces, build.device)) if kept else None

    def tensors(self, piece: Piece) -> dict[str, TensorSpec]:
        weight = full_tensor(piece.name, *piece.shape)
        return CODES.tensors(_codes(weight)) | SCALES.tensors(_only_scale(weight))

    def read(self, files: TensorFile, piece: Piece) -> Tensor:
        """float32. Ranges may cut blocks."""
        weight = full_tensor(piece.name, *piece.shape)
        full = dequantize(files.read(weight), files.read(_only_scale(weight)))
        rows = torch.cat([full[start:stop] for start, stop in piece.rows])
        return rows if piece.columns is None else rows[:, slice(*piece.columns)]


def _random_codes(data: Tensor, generator: Generator) -> None:
    data.normal_(0, SPREAD, generator=generator).clamp_(-E4M3_MAX, E4M3_MAX)


def _random_scales(data: Tensor, generator: Generator) -> None:
    spread = SPREAD * math.sqrt(data.shape[1] * FP8_BLOCK)
    data.uniform_(0.5, 1.5, generator=generator).div_(spread)


CODES, SCALES = Stored(FP8), Stored(FLOATS)
FORMAT = Fp8Block()


# --- blocks -------------------------------------------------------------------------------------


def fp8_parameters(pieces: list[Piece], device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """The e4m3 weight made of `pieces`, for which `fits_blocks` holds, and its float32 scales."""
    weight = parameter([_codes(piece) for piece in pieces], torch.float8_e4m3fn, device)
    return weight, parameter([_only_scale(piece) for piece in pieces], torch.float32, device)


def fits_blocks(pieces: list[Piece]) -> bool:
    """Whether these pieces, concatenated, can stay e4m3 with one scale for each block."""
    edges = all(piece.num_rows % FP8_BLOCK == 0 for piece in pieces[:-1])
    return edges and all(scale_of(piece) is not None for piece in pieces)


def scale_of(piece: Piece) -> Piece | None:
    """The piece of the block scales [ceil(rows/128), ceil(columns/128)] for this piece.

    None if a block of 128 x 128 of this piece would need several scales; then it can only be used
    dequantized.
    """
    rows = _blocks_of(piece.rows)
    columns = _blocks_of(((0, piece.shape[1]) if piece.columns is None else piece.columns,))
    if rows is None or columns is None:
        return None
    return Piece(
        name=piece.name + "_scale_inv",
        shape=tuple(_blocks(size) for size in piece.shape),
        rows=tuple((block, block + 1) for block in rows),
        columns=(columns[0], columns[-1] + 1) if columns else (0, 0),
        pad_rows=_blocks(piece.num_rows) - len(rows),
        pad_columns=_blocks(piece.num_columns) - len(columns),
        reader=SCALES,
        random=_random_scales,
    )


def _only_scale(piece: Piece) -> Piece:
    found = scale_of(piece)
    assert found is not None
    return found


def _codes(piece: Piece) -> Piece:
    return replace(piece, reader=CODES, random=in_bfloat16(_random_codes))


def _blocks(size: int) -> int:
    return -(-size // FP8_BLOCK)


def _blocks_of(ranges: tuple[Range, ...]) -> list[int] | None:
    """For concatenated ranges, the checkpoint block that each block of 128 comes from.

    None if one of them would come from several.
    """
    found: dict[int, int] = {}
    place = 0
    for start, stop in ranges:
        while start < stop:
            step = min(stop - start, FP8_BLOCK - start % FP8_BLOCK, FP8_BLOCK - place % FP8_BLOCK)
            if found.setdefault(place // FP8_BLOCK, start // FP8_BLOCK) != start // FP8_BLOCK:
                return None
            start, place = start + step, place + step
    return list(found.values())
