"""The interface between linear layers and the formats that their weights are stored in.

A `WeightFormat` knows how the weight of a linear layer is named, shaped and cut in a checkpoint,
how it is dequantized, and which `Linear` multiplies with it as it is. Layers know none of that:
they say which rows and columns they take (`Piece`), and the checkpoint's `Quantization` says which
layers are in which format. The formats themselves are in `formats/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from millrace.kernels.quantize import Quantized
from millrace.model.initializers import Initializer
from millrace.model.parameter import Piece, TensorFile, TensorSpec

if TYPE_CHECKING:
    from millrace.model.build_context import BuildContext


class HasGemms(nn.Module, ABC):
    """A module with GEMMs, which may need kernels of their own for each number of tokens."""

    @property
    @abstractmethod
    def gemm_shape(self) -> tuple[int, ...]:
        """Modules of equal shapes need equal kernels."""

    @abstractmethod
    def multiply(self, tokens: int) -> None:
        """The GEMMs of so many tokens, whose results nobody needs: so that what is compiled for
        them, or loaded, is there."""


class Linear(HasGemms):
    """A linear layer: this rank's share of its weight, [outputs, inputs], in some format.

    dtype: of its results. takes_fp8: whether it multiplies with inputs that are quantized to e4m3
    in groups of 128 (`Quantized`); inputs that are not quantized yet are quantized first.
    """

    takes_fp8 = False

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        (self.outputs, self.inputs), self.dtype = shape, dtype

    @abstractmethod
    def forward(self, x: Tensor | Quantized) -> Tensor:
        """x: [T, inputs]; returns [T, outputs] in `dtype`."""

    @abstractmethod
    def forward_from(self, first: int, x: Tensor | Quantized) -> Tensor:
        """As forward, but only the outputs from `first` on, where one of the pieces begins."""

    @property
    def gemm_shape(self) -> tuple[int, ...]:
        return self.outputs, self.inputs

    def multiply(self, tokens: int, first: int = 0) -> None:
        """As for `HasGemms`, with the outputs from `first` on."""
        device = next(self.parameters()).device
        x = torch.zeros(tokens, self.inputs, dtype=self.dtype, device=device)
        if first:
            self.forward_from(first, x)
        else:
            self(x)


class Stack(NamedTuple):
    """The parameters of the weights of all experts, as in `ExpertWeights`, one behind the other."""

    values: nn.Parameter
    scales: nn.Parameter | None = None
    factor: nn.Parameter | None = None
    zeros: nn.Parameter | None = None
    group: int = 0
    floats: bool = False


class WeightFormat(ABC):
    """One way to store the weights of linear layers. Formats are stateless.

    name: for messages. methods: the `quant_method`s of config.json that are read by this format.
    block: rows and columns of a weight that are never split between ranks, if it can be avoided.
    """

    name: str
    methods: tuple[str, ...] = ()
    block: int = 1

    def read_config(self, entries: Mapping[str, Any]) -> Quantization:
        """What the `quantization_config` of a checkpoint says, if its method is one of `methods`.

        Raises CheckpointError for options that are not implemented.
        """
        raise NotImplementedError(f"{self.name} has no quant_method")

    @abstractmethod
    def is_fast_on(self, device: torch.device) -> bool:
        """Whether the device has a GEMM for this format; else weights are dequantized at load."""

    def has_experts_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the device has a kernel for experts in this format, with inputs of the dtype."""
        return self.is_fast_on(device)

    @abstractmethod
    def linear(self, build: BuildContext, pieces: list[Piece]) -> Linear | None:
        """A layer that keeps the format; None if these pieces cannot be kept in it.

        For example, a rank's share may begin within a block that has one scale.
        """

    def stack(self, build: BuildContext, pieces: list[Piece]) -> Stack | None:
        """Weights of experts, one behind the other, kept in this format, with their scales.

        None if these pieces cannot be kept in it, or if no kernel for experts reads the format.
        """
        return None

    # Formats are the `Reader`s of weights that become the model dtype when they are loaded.

    @abstractmethod
    def tensors(self, piece: Piece) -> dict[str, TensorSpec]:
        """Every tensor that the whole weight has in a checkpoint, by flat name."""

    @abstractmethod
    def read(self, files: TensorFile, piece: Piece) -> Tensor:
        """What the piece takes, dequantized."""

    def init(self, piece: Piece) -> Initializer:
        """Random numbers like those that `read` returns."""
        return piece.random


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which linear layers of a checkpoint are in which format.

    method: `quant_method` of config.json, or "none". format: of all linear layers but those in
    skipped, which are plain: whole names, or parts of names between dots. unused: last parts of the
    names of tensors that a checkpoint may have and that are not read. Where a checkpoint has
    several quantized formats, a subclass says by `format_of` which layer has which.
    """

    method: str
    format: WeightFormat
    plain: WeightFormat
    skipped: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def format_of(self, module: str) -> WeightFormat:
        """The format of the linear layer of this flat name (`model.layers.0.mlp.up_proj`)."""
        name = f".{module}."
        return self.plain if any(f".{skip}." in name for skip in self.skipped) else self.format

    def format_of_small(self, module: str) -> WeightFormat:
        """The format of a layer that quantizers mostly leave out, such as routers."""
        return self.plain

    def with_tensors(self, names: Iterable[str]) -> Quantization:
        """Once the flat names of all tensors are known, for formats that are told by them."""
        return self

    def renamed(self, flat_name: Callable[[str], str | None]) -> Quantization:
        """With the flat names of what is skipped; a checkpoint has those of its files."""
        names = (flat_name(name) for name in self.skipped)
        return replace(self, skipped=tuple(name for name in names if name is not None))
