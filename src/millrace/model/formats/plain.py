"""Weights in float32, bfloat16 or float16, which become the model dtype when they are loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.gemm import linear
from millrace.kernels.quantize import Quantized
from millrace.model.build_context import BuildContext
from millrace.model.parameter import AS_STORED, Piece, TensorFile, TensorSpec, parameter
from millrace.model.weight_format import Linear, Quantization, WeightFormat


class PlainLinear(Linear):
    """A linear layer whose weight is in the model dtype, whatever it is in the checkpoint."""

    def __init__(self, build: BuildContext, pieces: list[Piece]) -> None:
        weight = parameter(pieces, build.dtype, build.device)
        super().__init__(weight.shape, build.dtype)
        self.weight = weight

    def forward(self, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)
        return linear(x, self.weight)

    def forward_from(self, first: int, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)
        return linear(x, self.weight[first:])


class Plain(WeightFormat):
    name = "plain"

    def is_fast_on(self, device: torch.device) -> bool:
        return True

    def linear(self, build: BuildContext, pieces: list[Piece]) -> Linear:
        return PlainLinear(build, pieces)

    def tensors(self, piece: Piece) -> dict[str, TensorSpec]:
        return AS_STORED.tensors(piece)

    def read(self, files: TensorFile, piece: Piece) -> Tensor:
        return files.read(piece)


FORMAT = Plain()
UNQUANTIZED = Quantization("none", FORMAT, FORMAT)
