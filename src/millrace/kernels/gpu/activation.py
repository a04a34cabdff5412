"""The gates of the MLP and of attention. See `millrace.kernels.activation`."""

from __future__ import annotations

from torch import Tensor

from millrace.kernels.gpu.quantize import SIGMOID_GATE, SILU_MUL, pointwise


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2 I]; [T, I]."""
    width = gate_up.shape[1] // 2
    return pointwise(SILU_MUL, gate_up, gate_up[:, width:], width)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x, gate: [T, K], gate possibly a slice of a wider projection."""
    return pointwise(SIGMOID_GATE, x, gate, x.shape[1])
