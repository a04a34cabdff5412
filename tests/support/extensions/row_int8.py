"""A weight format that is added without an edit anywhere else: the example of docs/extending.md.

A weight W [r, c] is int8, and has a second tensor W_row_scale [r, 1], which multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from millrace.kernels.quantize import Quantized
from millrace.model.build_context import BuildContext
from millrace.model.formats import plain
from millrace.model.parameter import (
    FLOATS,
    Piece,
    Stored,
    TensorFile,
    TensorSpec,
    full_tensor,
    parameter,
)
from millrace.model.weight_format import Linear, Quantization, WeightFormat


class RowInt8Linear(Linear):
    """Multiplies with the int8 weight, then with the scale of each row."""

    def __init__(self, build: BuildContext, pieces: list[Piece]) -> None:
        weight = parameter([_codes(piece) for piece in pieces], torch.int8, build.device)
        super().__init__(weight.shape, build.dtype)
        self.weight = weight
        self.scale = parameter([_scale(p) for p in pieces], torch.float32, build.device)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return self.forward_from(0, x)

    def forward_from(self, first: int, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)
        out = x.float() @ self.weight[first:].float().T
        return (out * self.scale[first:, 0]).to(self.dtype)


class RowInt8(WeightFormat):
    name = "row-wise int8"
    methods = ("row_int8",)

    def read_config(self, entries: Mapping[str, Any]) -> Quantization:
        skipped = tuple(entries.get("modules_to_not_convert") or ())
        return Quantization("row_int8", self, plain.FORMAT, skipped)

    def is_fast_on(self, device: torch.device) -> bool:
        return True

    def linear(self, build: BuildContext, pieces: list[Piece]) -> Linear | None:
        return RowInt8Linear(build, pieces)

    def tensors(self, piece: Piece) -> dict[str, TensorSpec]:
        weight = full_tensor(piece.name, *piece.shape)
        return CODES.tensors(_codes(weight)) | SCALES.tensors(_scale(weight))

    def read(self, files: TensorFile, piece: Piece) -> Tensor:
        return files.read(piece).float() * files.read(_scale(piece))


def _codes(piece: Piece) -> Piece:
    return replace(piece, reader=CODES, random=_random_codes)


def _scale(piece: Piece) -> Piece:
    """A rank that takes part of the columns has the scales of all its rows."""
    shape = (piece.shape[0], 1)
    return Piece(
        piece.module + ".row_scale", shape, piece.rows, pad_rows=piece.pad_rows, reader=SCALES,
        random=lambda data, generator: data.fill_(1 / (64 * piece.shape[1] ** 0.5)),
    )  # fmt: skip


def _random_codes(data: Tensor, generator: Generator) -> None:
    data.copy_((64 * torch.randn(data.shape, generator=generator)).clamp(-127, 127))


CODES, SCALES = Stored(frozenset({"I8"})), Stored(FLOATS)
FORMAT = RowInt8()
