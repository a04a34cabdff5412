"""Parameters that know which parts of which checkpoint tensors they are made of.

A `Piece` names a checkpoint tensor and the rows (and columns) of it that this rank needs. A
parameter is the concatenation of its pieces. Fused projections and tensor parallelism are both only
lists of pieces, so the loader (`weights.py`) knows no layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from millrace.kernels.formats import FP8_BLOCK

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a checkpoint tensor.

    name: as in a flat checkpoint (`model.layers.0. ...`). shape: of the full tensor. rows: the
    ranges [start, stop) of dimension 0 that are taken, in this order. columns: the range of
    dimension 1; None: all. quantized: the checkpoint has it in e4m3 with block scales. pad_rows,
    pad_columns: zeros behind what is taken. offset: added to what is read.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[Range, ...]
    columns: Range | None = None
    quantized: bool = False
    pad_rows: int = 0
    pad_columns: int = 0
    offset: float = 0.0

    @property
    def taken_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)

    @property
    def num_rows(self) -> int:
        """Rows in the parameter, padding included."""
        return self.taken_rows + self.pad_rows

    @property
    def num_columns(self) -> int:
        """Columns in the parameter, padding included; for tensors with two dimensions."""
        start, stop = self.columns or (0, self.shape[1])
        return stop - start + self.pad_columns

    @property
    def is_full(self) -> bool:
        """Whether the piece is the full tensor, unchanged."""
        return self.rows == ((0, self.shape[0]),) and self.columns in (None, (0, self.shape[-1]))

    def scale(self) -> Piece | None:
        """The piece of the block scales [ceil(rows/128), ceil(columns/128)] for this piece.

        None if a block of 128 x 128 of this piece would need several scales; then it can only be
        used dequantized.
        """
        rows = _blocks_of(self.rows)
        columns = _blocks_of(((0, self.shape[1]) if self.columns is None else self.columns,))
        if rows is None or columns is None:
            return None
        return Piece(
            name=self.name + "_scale_inv",
            shape=tuple(_blocks(size) for size in self.shape),
            rows=tuple((block, block + 1) for block in rows),
            columns=(columns[0], columns[-1] + 1) if columns else (0, 0),
            pad_rows=_blocks(self.num_rows) - len(rows),
            pad_columns=_blocks(self.num_columns) - len(columns),
        )


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


def fits_blocks(pieces: list[Piece]) -> bool:
    """Whether these pieces, concatenated, can stay e4m3 with one scale for each block."""
    edges = all(piece.num_rows % FP8_BLOCK == 0 for piece in pieces[:-1])
    return edges and all(piece.scale() is not None for piece in pieces)


def full_tensor(name: str, *shape: int) -> Piece:
    """A checkpoint tensor that every rank takes in full."""
    return Piece(name, shape, ((0, shape[0]),))


def parameter(
    pieces: list[Piece],
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] | None = None,
) -> nn.Parameter:
    """An empty parameter made of `pieces`. shape: None: their rows, concatenated.

    If the shape has more rows than the pieces, the last rows are zeros.
    """
    if shape is None:
        first = pieces[0]
        rest = first.shape[1:] if len(first.shape) != 2 else (first.num_columns,)
        shape = (sum(piece.num_rows for piece in pieces), *rest)
    made = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
    made.pieces = tuple(pieces)  # type: ignore[attr-defined]
    return made


def fp8_parameters(pieces: list[Piece], device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """The e4m3 weight made of `pieces`, for which `fits_blocks` holds, and its float32 scales."""
    kept = [replace(piece, quantized=False) for piece in pieces]
    weight = parameter(kept, torch.float8_e4m3fn, device)
    scales = [scale for piece in kept if (scale := piece.scale()) is not None]
    return weight, parameter(scales, torch.float32, device)


def pieces_of(param: Tensor) -> tuple[Piece, ...]:
    found: tuple[Piece, ...] = param.pieces  # type: ignore[attr-defined]
    return found


def parameters_with_pieces(
    model: nn.Module,
) -> Iterator[tuple[nn.Parameter, tuple[Piece, ...]]]:
    """Every parameter once, with its pieces."""
    for param in model.parameters():
        yield param, pieces_of(param)
