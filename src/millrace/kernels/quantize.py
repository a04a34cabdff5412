"""Activations in FP8: rounded to e4m3 by groups of 128 channels, each with a scale that multiplies.

Each op here is one from `norm` or `activation` whose result is wanted by an FP8 product only, so
that a fast path can round while it has the values at hand. The references compose the plain ops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels import activation, norm
from millrace.kernels.dispatch import op

GROUP = 128
E4M3_MAX = 448.0
LEAST = 1e-10  # a group of zeros has this greatest value


class Quantized(NamedTuple):
    """values: e4m3 [T, K]; scales: float32 [T, ceil(K / 128)], of any strides."""

    values: Tensor
    scales: Tensor

    @property
    def is_cuda(self) -> bool:
        return self.values.is_cuda

    def dequantize(self) -> Tensor:
        """float32 [T, K]."""
        width = self.values.shape[1]
        return self.values.float() * self.scales.repeat_interleave(GROUP, 1)[:, :width]


@op
def quantize(x: Tensor) -> Quantized:
    """x: [T, K]."""
    padding = -x.shape[1] % GROUP
    groups = F.pad(x.float(), (0, padding)).unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1).clamp(min=LEAST) / E4M3_MAX
    values = (groups / scales.unsqueeze(-1)).flatten(1)[:, : x.shape[1]]
    return Quantized(values.to(torch.float8_e4m3fn), scales)


@op
def silu_mul_quantize(gate_up: Tensor) -> Quantized:
    """`silu_mul`, quantised."""
    return quantize(activation.silu_mul(gate_up))


@op
def sigmoid_gate_quantize(x: Tensor, gate: Tensor) -> Quantized:
    """`sigmoid_gate`, quantised."""
    return quantize(activation.sigmoid_gate(x, gate))


@op
def gated_rms_norm_quantize(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Quantized:
    """`gated_rms_norm`, quantised."""
    return quantize(norm.gated_rms_norm(o, z, weight, eps))


@op
def rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor | None, Quantized, Tensor]:
    """(rms_norm(s), the same quantised, s) for s = x + residual, or s = x without a residual.

    x, residual: [T, H]. The plain norm is None unless it is to be kept.
    """
    total = x if residual is None else x + residual
    normed = norm.rms_norm(total, weight, eps)
    return (normed if keep else None), quantize(normed), total
