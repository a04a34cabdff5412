"""Formats of 4 bits, whatever their layout: parts of weights for ranks, readers, linear layers.

What differs between formats is in their `Layout`, and in how a config.json names them
(`formats/`). Here a weight becomes a `W4`: its rows are concatenated like those of any other
format, and its groups are made smaller where a rank's share begins within one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from millrace.errors import CheckpointError
from millrace.kernels.gemm import (
    CODES_PER_WORD,
    SYMMETRIC,
    W4,
    dequantize_w4,
    pack,
    unpack,
    w4_linear,
)
from millrace.kernels.quantize import Quantized
from millrace.model.build_context import BuildContext
from millrace.model.initializers import Initializer
from millrace.model.parameter import Piece, TensorFile, TensorSpec, parameter
from millrace.model.w4.layouts import (
    SPREAD_OF_CODES,
    SPREAD_OF_E2M1,
    Layout,
    Shape,
    random_scales,
    random_words,
)
from millrace.model.weight_format import Linear, Stack, WeightFormat

LOWEST_TOP = 15  # the largest scale of a row is at least 2^14, and below 2^15, if it is not float16


@dataclass(frozen=True)
class W4Format(WeightFormat):
    """Weights of 4 bits in one layout. group: columns that share a scale; -1: all."""

    name: str
    layout: Layout
    group: int = 128

    @property
    def block(self) -> int:  # type: ignore[override]
        """Shares of ranks should not begin within a group."""
        return max(self.group, 1)

    def is_fast_on(self, device: torch.device) -> bool:
        if device.type == "cuda":
            return torch.cuda.get_device_capability(device) >= (8, 0)
        from millrace.kernels.cpu.w4 import is_supported

        return device.type == "cpu" and is_supported()

    def linear(self, build: BuildContext, pieces: list[Piece]) -> Linear | None:
        if any(self.kept_group(piece) is None for piece in pieces):
            return None
        if self.layout.in_order or self.group < 0:
            groups = [self.kept_group(piece) or 0 for piece in pieces]
            return W4Linear(build, self, pieces, math.gcd(*groups))
        return PartsLinear([W4Linear(build, self, part, self.group) for part in _by_name(pieces)])

    def has_experts_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """There is no kernel for such experts on GPUs yet: they become the model dtype."""
        return device.type == "cpu" and self.is_fast_on(device)

    def stack(self, build: BuildContext, pieces: list[Piece]) -> Stack | None:
        groups = [self.kept_group(piece) for piece in pieces]
        if build.device.type == "cuda" or not self.layout.in_order or None in groups:
            return None
        group = math.gcd(*(size or 0 for size in groups))
        found = w4_parameters(build, self, pieces, group)
        return Stack(
            found["codes"], found["scales"], found["factor"], found.get("zeros"), group,
            self.layout.floats,
        )  # fmt: skip

    def tensors(self, piece: Piece) -> dict[str, TensorSpec]:
        return self.layout.tensors(self.shape_of(piece))

    def read(self, files: TensorFile, piece: Piece) -> Tensor:
        """float32, rows and columns in the checkpoint's order."""
        weight = self.read_packed(files, piece)
        full = dequantize_w4(weight)
        order = self.order(files, piece)
        if order is not None:
            full = full[:, order.argsort()]
        return full if piece.columns is None else full[:, slice(*piece.columns)]

    # --- parts of a weight, as `W4` has them ----------------------------------------------------

    def shape_of(self, piece: Piece) -> Shape:
        outputs, inputs = piece.shape
        group = inputs if self.group < 0 else min(self.group, inputs)
        return Shape(piece.module, outputs, inputs, group)

    def kept_group(self, piece: Piece) -> int | None:
        """Columns of a group in what the piece takes; None if it cannot be kept in 4 bits."""
        of = self.shape_of(piece)
        start, stop = piece.columns or (0, of.inputs)
        if start % CODES_PER_WORD or piece.num_columns % CODES_PER_WORD:
            return None
        if (start, stop) == (0, of.inputs):
            return of.group
        if not self.layout.in_order and of.groups > 1:
            return None  # its columns belong to any of the groups
        return math.gcd(of.group, start) if start else of.group

    def read_packed(self, files: TensorFile, piece: Piece) -> W4:
        """All columns of the piece's rows."""
        of = self.shape_of(piece)
        scales, factor = self.scales(files, piece)
        zeros = self.zeros(files, piece) if self.layout.has_zeros else None
        return W4(self.codes(files, piece), scales, factor, zeros, of.group, self.layout.floats)

    def codes(self, files: TensorFile, piece: Piece) -> Tensor:
        """int32 [rows, K / 8], columns sorted by groups."""
        found = self.layout.codes(files, self.shape_of(piece), piece.rows)
        order = self.order(files, piece)
        return found if order is None else pack(unpack(found)[:, order])

    def scales(self, files: TensorFile, piece: Piece) -> tuple[Tensor, Tensor]:
        """float16 [rows, groups], and the factor of each row, float32 [rows, 1].

        Where scales are no float16, the factor has a power of two that brings those of a row into
        its range.
        """
        of = self.shape_of(piece)
        scales = self.layout.scales(files, of, piece.rows)
        factor = torch.ones(len(scales), 1)
        if scales.dtype != torch.float16:
            exponent = torch.frexp(scales.float().abs().amax(1, keepdim=True)).exponent - LOWEST_TOP
            scales = torch.ldexp(scales.float(), -exponent).half()
            factor = torch.ldexp(factor, exponent)
        more = self.layout.factor(files, of)
        return scales, factor if more is None else factor * more

    def zeros(self, files: TensorFile, piece: Piece) -> Tensor:
        return self.layout.zeros(files, self.shape_of(piece), piece.rows)

    def order(self, files: TensorFile, piece: Piece) -> Tensor | None:
        """int64 [K]: the columns by groups; None if they are in order."""
        of = self.shape_of(piece)
        if of.groups == 1:
            return None
        group_of = self.layout.group_of(files, of)
        in_order = torch.arange(of.inputs) // of.group
        if group_of is None or torch.equal(group_of.long(), in_order):
            return None if self.layout.in_order else torch.arange(of.inputs)
        order = group_of.long().argsort(stable=True)
        if self.layout.in_order or not torch.equal(group_of.long()[order], in_order):
            raise CheckpointError(
                f"{of.module}: its g_idx has columns in another order than config.json says; "
                f"groups of {of.group} columns each can be run, in any order if desc_act or "
                "actorder says so"
            )
        return order


def _by_name(pieces: list[Piece]) -> list[list[Piece]]:
    """Runs of pieces of one weight: each weight has its own order of columns."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        if not runs or runs[-1][0].name != piece.name:
            runs.append([])
        runs[-1].append(piece)
    return runs


# --- readers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartReader:
    """Reads what one parameter of a `W4` needs of a piece of the weight.

    what: codes, scales, factor, zeros or order. group: columns of a group in the parameter.
    """

    form: W4Format
    piece: Piece
    what: str
    group: int

    def tensors(self, piece: Piece) -> dict[str, TensorSpec]:
        return self.form.tensors(self.piece)

    def read(self, files: TensorFile, piece: Piece) -> Tensor:
        form, of = self.form, self.piece
        start, stop = of.columns or (0, of.shape[1])
        if self.what == "codes":
            return form.codes(files, of)[:, start // CODES_PER_WORD : stop // CODES_PER_WORD]
        if self.what == "factor":
            return form.scales(files, of)[1]
        if self.what == "order":
            order = form.order(files, of)
            return torch.arange(of.shape[1]) if order is None else order
        every = form.scales(files, of)[0] if self.what == "scales" else form.zeros(files, of)
        firsts = torch.arange(start, stop, self.group)
        return every[:, firsts // form.shape_of(of).group]

    def init(self, piece: Piece) -> Initializer:
        spread = SPREAD_OF_E2M1 if self.form.layout.floats else SPREAD_OF_CODES
        return {
            "codes": random_words,
            "scales": random_scales(self.piece.shape[1], spread),
            "factor": _fill(1.0),
            "zeros": _fill(SYMMETRIC),
            "order": _in_order,
        }[self.what]


def _fill(value: float) -> Initializer:
    def fill(data: Tensor, generator: Generator) -> None:
        data.fill_(value)

    return fill


def _in_order(data: Tensor, generator: Generator) -> None:
    data.copy_(torch.arange(len(data), device=data.device))


# --- linear layers ------------------------------------------------------------------------------


class W4Linear(Linear):
    """A linear layer whose weight stays 4 bits.

    Its pieces have groups of `group` columns. If these are not in order, all pieces are of one
    weight, and `order` says which input is the first of the sorted ones, and so on.
    """

    zeros: nn.Parameter | None
    order: nn.Parameter | None

    def __init__(
        self, build: BuildContext, form: W4Format, pieces: list[Piece], group: int
    ) -> None:
        found = w4_parameters(build, form, pieces, group)
        super().__init__((found["codes"].shape[0], pieces[0].num_columns), build.dtype)
        self.group, self.floats = group, form.layout.floats
        self.codes, self.scales, self.factor = (found[n] for n in ("codes", "scales", "factor"))
        self.zeros, self.order = found.get("zeros"), None
        if not form.layout.in_order and form.group > 0:
            inputs = pieces[0].shape[1]
            piece = Piece(pieces[0].name, (inputs,), ((0, inputs),))
            read = PartReader(form, pieces[0], "order", group)
            self.order = parameter([replace(piece, reader=read)], torch.int64, build.device)

    @property
    def weight(self) -> W4:
        return W4(self.codes, self.scales, self.factor, self.zeros, self.group, self.floats)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return w4_linear(self._sorted(x), self.weight)

    def forward_from(self, first: int, x: Tensor | Quantized) -> Tensor:
        return w4_linear(self._sorted(x), self.weight.rows_from(first))

    def _sorted(self, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)
        return x if self.order is None else x.index_select(1, self.order)


class PartsLinear(Linear):
    """Linear layers of the same inputs, whose outputs are joined."""

    def __init__(self, parts: list[W4Linear]) -> None:
        super().__init__((sum(part.outputs for part in parts), parts[0].inputs), parts[0].dtype)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return self.forward_from(0, x)

    def forward_from(self, first: int, x: Tensor | Quantized) -> Tensor:
        found: list[Tensor] = []
        for part in self.parts:
            assert isinstance(part, W4Linear)
            if first < part.outputs:
                found.append(part.forward_from(first, x) if first > 0 else part(x))
            first -= part.outputs
        return found[0] if len(found) == 1 else torch.cat(found, -1)


def w4_parameters(
    build: BuildContext, form: W4Format, pieces: list[Piece], group: int
) -> dict[str, nn.Parameter]:
    """The parameters of a weight made of `pieces`, by the names of `W4`."""

    def made(what: str, columns: int, dtype: torch.dtype) -> nn.Parameter:
        """columns: of a column of the parameter; 0: it has one."""
        parts = [_part(form, piece, what, columns, group) for piece in pieces]
        return parameter(parts, dtype, build.device)

    found = {
        "codes": made("codes", CODES_PER_WORD, torch.int32),
        "scales": made("scales", group, torch.float16),
        "factor": made("factor", 0, torch.float32),
    }
    if form.layout.has_zeros:
        found["zeros"] = made("zeros", group, torch.uint8)
    return found


def _part(form: W4Format, piece: Piece, what: str, columns: int, group: int) -> Piece:
    start, stop = piece.columns or (0, piece.shape[1])

    def count(size: int) -> int:
        return -(-size // columns) if columns else 1

    taken = count(stop - start)
    unpadded = replace(piece, pad_rows=0, pad_columns=0)
    return Piece(
        piece.name,
        (piece.shape[0], taken),
        piece.rows,
        pad_rows=piece.pad_rows,
        pad_columns=count(piece.num_columns) - taken,
        reader=PartReader(form, unpadded, what, group),
    )
