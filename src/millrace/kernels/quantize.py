"""Activations in FP8: e4m3 in groups of 128 channels, each with a scale that multiplies.

Each op here is an op of `norm` or `activation` whose result only an FP8 GEMM reads, so a fast path
can quantize while the values are in registers. The references are compositions of the plain ops.
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
MIN_ABSMAX = 1e-10  # the largest absolute value of a group of zeros counts as this


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
    scales = groups.abs().amax(-1).clamp(min=MIN_ABSMAX) / E4M3_MAX
    values = (groups / scales.unsqueeze(-1)).flatten(1)[:, : x.shape[1]]
    return Quantized(values.to(torch.float8_e4m3fn), scales)


@op
def silu_mul_quantize(gate_up: Tensor) -> Quantized:
    """`silu_mul`, quantized."""
    return quantize(activation.silu_mul(gate_up))


@op
def sigmoid_gate_quantize(x: Tensor, gate: Tensor) -> Quantized:
    """`sigmoid_gate`, quantized."""
    return quantize(activation.sigmoid_gate(x, gate))


@op
def gated_rms_norm_quantize(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Quantized:
    """`gated_rms_norm`, quantized."""
    return quantize(norm.gated_rms_norm(o, z, weight, eps))


@op
def rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor | None, Quantized, Tensor]:
    """(rms_norm(s), the same quantized, s) for s = x + residual, or s = x without a residual.

    x, residual: [T, H]. The plain norm is None unless keep is set.
    """
    total = x if residual is None else x + residual
    normed = norm.rms_norm(total, weight, eps)
    return (normed if keep else None), quantize(normed), total
