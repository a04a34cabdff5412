"""Parameters that know which parts of which checkpoint tensors they are made of.

A `Piece` names a weight of the checkpoint and the rows (and columns) of it that this rank needs. A
parameter is the concatenation of its pieces. Fused projections and tensor parallelism are both only
lists of pieces, so the loader (`weights.py`) knows no layer. How the part of a weight is read, from
one tensor or several, is said by the piece's `Reader`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from millrace.model.initializers import Initializer, matrix

Range = tuple[int, int]
FLOATS = frozenset({"F32", "BF16", "F16"})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A checkpoint tensor: its shape, the dtypes that are accepted (safetensors names), what
    random numbers are like it, and whether a checkpoint may do without it."""

    shape: tuple[int, ...]
    dtypes: frozenset[str]
    init: Initializer = field(default=matrix, compare=False)
    optional: bool = False


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Part of a checkpoint tensor of three or more dimensions, by a name of its own.

    name: flat. index: of dimension 0, which the part does without. rows: of dimension 1.
    """

    name: str
    index: int
    rows: Range


class TensorFile(Protocol):
    """Opened checkpoint files."""

    def read(self, piece: Piece) -> Tensor:
        """The part of the tensor `piece.name` that the piece takes, row ranges concatenated,
        without padding."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this flat name."""
        ...


class Reader(Protocol):
    """How a part of a weight is read from the checkpoint."""

    def tensors(self, piece: Piece) -> dict[str, TensorSpec]:
        """Every tensor that the whole weight has in a checkpoint, by flat name."""
        ...

    def read(self, files: TensorFile, piece: Piece) -> Tensor:
        """What the piece takes, without padding, in any dtype that can be copied."""
        ...

    def init(self, piece: Piece) -> Initializer:
        """Random numbers like those that `read` returns."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """Reads one tensor as it is stored, in one of these dtypes."""

    dtypes: frozenset[str] = FLOATS

    def tensors(self, piece: Piece) -> dict[str, TensorSpec]:
        return {piece.name: TensorSpec(piece.shape, self.dtypes, piece.random)}

    def read(self, files: TensorFile, piece: Piece) -> Tensor:
        return files.read(piece)

    def init(self, piece: Piece) -> Initializer:
        return piece.random


AS_STORED = Stored()


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a weight of the checkpoint.

    name: as in a flat checkpoint (`model.layers.0. ...`). shape: of the full weight. rows: the
    ranges [start, stop) of dimension 0 that are taken, in this order. columns: the range of
    dimension 1; None: all. pad_rows, pad_columns: zeros behind what is taken. offset: added to what
    is read. reader: how it is read. random: random numbers like the weight's.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[Range, ...]
    columns: Range | None = None
    pad_rows: int = 0
    pad_columns: int = 0
    offset: float = 0.0
    reader: Reader = AS_STORED
    random: Initializer = field(default=matrix, compare=False)

    @property
    def module(self) -> str:
        """The name of the layer whose weight this is."""
        return self.name.removesuffix(".weight")

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
        if not self.shape:
            return True
        return self.rows == ((0, self.shape[0]),) and self.columns in (None, (0, self.shape[-1]))


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


def pieces_of(param: Tensor) -> tuple[Piece, ...]:
    found: tuple[Piece, ...] = param.pieces  # type: ignore[attr-defined]
    return found


def parameters_with_pieces(
    model: nn.Module,
) -> Iterator[tuple[nn.Parameter, tuple[Piece, ...]]]:
    """Every parameter once, with its pieces."""
    for param in model.parameters():
        yield param, pieces_of(param)
