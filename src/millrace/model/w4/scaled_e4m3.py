"""e4m3 weights with one scale, or one for each row, as layers of mixed checkpoints have them.

They become the model dtype when they are loaded: the e4m3 GEMMs need scales for blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from millrace.model.build_context import BuildContext
from millrace.model.initializers import in_bfloat16
from millrace.model.parameter import FLOATS, Piece, TensorFile, TensorSpec
from millrace.model.w4.layouts import E4M3, random_scales
from millrace.model.weight_format import Linear, WeightFormat

SPREAD = 64.0  # standard deviation of random weights


@dataclass(frozen=True)
class ScaledE4m3(WeightFormat):
    """weight e4m3 [N, K] times weight_scale: [N, 1] if by_row, else [1], or [] if is_scalar."""

    name: str
    by_row: bool = False
    is_scalar: bool = False

    def is_fast_on(self, device: torch.device) -> bool:
        return False

    def linear(self, build: BuildContext, pieces: list[Piece]) -> Linear | None:
        return None

    def tensors(self, piece: Piece) -> dict[str, TensorSpec]:
        def codes(data: Tensor, generator: torch.Generator) -> None:
            data.normal_(0, SPREAD, generator=generator).clamp_(-448, 448)

        return {
            f"{piece.module}.weight": TensorSpec(piece.shape, E4M3, in_bfloat16(codes)),
            f"{piece.module}.weight_scale": TensorSpec(
                self._scale(piece).shape, FLOATS, random_scales(piece.shape[1], SPREAD)
            ),
        }

    def read(self, files: TensorFile, piece: Piece) -> Tensor:
        weight = files.read(replace(piece, pad_rows=0, pad_columns=0))
        return weight.float() * files.read(self._scale(piece)).float()

    def _scale(self, piece: Piece) -> Piece:
        name = f"{piece.module}.weight_scale"
        if self.by_row:
            return Piece(name, (piece.shape[0], 1), piece.rows)
        return Piece(name, () if self.is_scalar else (1,), ((0, 1),))
