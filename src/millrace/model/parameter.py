"""Parameters that know which parts of which published tensors they are made of.

A `Piece` names a published tensor and the rows (and columns) that this rank takes of it; a
parameter is its pieces, one below the other. Fusing projections and cutting them over ranks are
both only a list of pieces, so the loader (`weights.py`) needs to know no layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from millrace.model.config import FP8_BLOCK

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a published tensor.

    name: as published in a flat checkpoint (`model.layers.0. ...`). shape: the whole tensor's.
    rows: the ranges [start, stop) of dimension 0 taken, in this order. columns: the range taken of
    dimension 1; None takes all. quantized: published as e4m3 with block scales beside it.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[Range, ...]
    columns: Range | None = None
    quantized: bool = False

    @property
    def num_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)

    @property
    def whole(self) -> bool:
        """Whether this is the published tensor as it is."""
        return self.rows == ((0, self.shape[0]),) and self.columns in (None, (0, self.shape[-1]))

    def scale(self) -> Piece:
        """The part of the block scales [ceil(rows/128), ceil(columns/128)] that belongs here."""
        return Piece(
            name=self.name + "_scale_inv",
            shape=tuple(_blocks(size) for size in self.shape),
            rows=tuple((start // FP8_BLOCK, _blocks(stop)) for start, stop in self.rows),
            columns=None
            if self.columns is None
            else (self.columns[0] // FP8_BLOCK, _blocks(self.columns[1])),
        )


def _blocks(size: int) -> int:
    return -(-size // FP8_BLOCK)


def whole(name: str, *shape: int) -> Piece:
    """A published tensor that every rank takes as it is."""
    return Piece(name, shape, ((0, shape[0]),))


def parameter(
    pieces: list[Piece],
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] | None = None,
) -> nn.Parameter:
    """An empty parameter made of `pieces`; shape: where it is not simply their rows together.

    A shape with more rows than the pieces have ends in rows of zeros.
    """
    if shape is None:
        first = pieces[0]
        rest = first.shape[1:] if first.columns is None else (first.columns[1] - first.columns[0],)
        shape = (sum(piece.num_rows for piece in pieces), *rest)
    made = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
    made.pieces = tuple(pieces)  # type: ignore[attr-defined]
    return made


def fp8_parameters(pieces: list[Piece], device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """The e4m3 weight made of `pieces` and its float32 block scales.

    Every piece's ranges must start at a block's edge, and all but the last end at one.
    """
    kept = [replace(piece, quantized=False) for piece in pieces]
    weight = parameter(kept, torch.float8_e4m3fn, device)
    return weight, parameter([piece.scale() for piece in kept], torch.float32, device)


def pieces_of(param: Tensor) -> tuple[Piece, ...]:
    found: tuple[Piece, ...] = param.pieces  # type: ignore[attr-defined]
    return found


def parameters_with_pieces(
    model: nn.Module,
) -> Iterator[tuple[nn.Parameter, tuple[Piece, ...]]]:
    """Every parameter once, with its pieces."""
    for param in model.parameters():
        yield param, pieces_of(param)
