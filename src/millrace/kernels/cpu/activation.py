"""The gates of the MLP and of attention on the CPU, each in one pass."""

from __future__ import annotations

from torch import Tensor

from millrace.kernels.cpu.call import (
    all_contiguous,
    function,
    is_bf16,
    pointer,
    rows_contiguous,
    threads,
)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As the reference; rounded once."""
    run = function("silu_mul")
    if run is None or not all_contiguous(gate_up):
        return NotImplemented
    tokens, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, n)
    run(pointer(gate_up), tokens, n, pointer(out), is_bf16(gate_up), threads())
    return out


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """As the reference; rounded once."""
    run = function("sigmoid_gate")
    if run is None or not all_contiguous(x) or not rows_contiguous(gate) or gate.dtype != x.dtype:
        return NotImplemented
    out, n = x.new_empty(x.shape), x.shape[1]
    stride = gate.stride(0)
    run(pointer(x), pointer(gate), stride, x.shape[0], n, pointer(out), is_bf16(x), threads())
    return out
