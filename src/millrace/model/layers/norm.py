"""RMS norms, alone and with the all-reduce and the residual add before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from millrace.kernels.norm import add_rms_norm, rms_norm
from millrace.kernels.quantize import Quantized, rms_norm_quantize
from millrace.model.build_context import BuildContext
from millrace.model.initializers import around
from millrace.model.parameter import full_tensor, parameter


class ReadsNormed(Protocol):
    """A `Linear`, or another module that takes one form of the normed input."""

    @property
    def takes_fp8(self) -> bool:
        """Whether it takes `Quantized`, else the plain form."""
        ...


class NormedInput(NamedTuple):
    """A layer's normed input, [T, H], plain and quantized; forms that no linear needs are None."""

    plain: Tensor | None
    quantized: Quantized | None

    def for_linear(self, linear: ReadsNormed) -> Tensor | Quantized:
        """The form that `linear` takes."""
        form = self.quantized if linear.takes_fp8 else self.plain
        assert form is not None
        return form


class Norm(nn.Module):
    """An RMS norm with a float32 weight.

    offset: added to the weight of the checkpoint; None: the model's own, `ModelConfig.norm_offset`.
    """

    def __init__(
        self, build: BuildContext, name: str, size: int, offset: float | None = None
    ) -> None:
        super().__init__()
        self.tp, self.eps = build.tp, build.config.eps
        offset = build.config.norm_offset if offset is None else offset
        piece = replace(full_tensor(name, size), offset=offset, random=around(1.0 - offset))
        self.weight = parameter([piece], torch.float32, build.device)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) of the residual and the all-reduced x.

        residual: None before the first layer; then x needs no all-reduce.
        """
        if residual is None:
            return self.forward(x), x
        fused = self.tp.all_reduce_norm(x, residual, self.weight, self.eps, True, False)
        if fused is not None and fused[0] is not None:
            return fused[0], fused[2]
        return add_rms_norm(self.tp.all_reduce(x), residual, self.weight, self.eps)

    def add_for(
        self, linears: Sequence[ReadsNormed], x: Tensor, residual: Tensor | None
    ) -> tuple[NormedInput, Tensor]:
        """As `add`, with the norm in the forms that `linears` need."""
        if not any(linear.takes_fp8 for linear in linears):
            plain, total = self.add(x, residual)
            return NormedInput(plain, None), total
        keep = not all(linear.takes_fp8 for linear in linears)
        if residual is not None:
            fused = self.tp.all_reduce_norm(x, residual, self.weight, self.eps, keep, True)
            if fused is not None:
                return NormedInput(*fused[:2]), fused[2]
            x = self.tp.all_reduce(x)
        kept, quantized, total = rms_norm_quantize(x, residual, self.weight, self.eps, keep)
        return NormedInput(kept, quantized), total
