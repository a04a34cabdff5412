"""Experts on the CPU: tokens are grouped by expert, and experts without tokens are not read."""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.activation import silu_mul
from millrace.kernels.gemm import linear
from millrace.kernels.moe import ExpertWeights, Routes


def run_experts(x: Tensor, routes: Routes, gate_up: ExpertWeights, down: ExpertWeights) -> Tensor:
    """As the reference, reading only the experts that have tokens."""
    if x.device.type != "cpu":
        return NotImplemented
    chosen, order = routes.experts.flatten().sort(stable=True)
    tokens = order // routes.experts.shape[1]
    weights = routes.weights.flatten()[order].float().unsqueeze(1)
    total = torch.zeros_like(x, dtype=torch.float32)
    start = 0
    for expert, count in enumerate(chosen.bincount().tolist()):
        if not count:
            continue
        mine = slice(start, start + count)
        inner = silu_mul(linear(x[tokens[mine]], gate_up.of(expert, x.dtype)))
        out = linear(inner, down.of(expert, x.dtype))
        total.index_add_(0, tokens[mine], out.float() * weights[mine])
        start += count
    return total.to(x.dtype)
