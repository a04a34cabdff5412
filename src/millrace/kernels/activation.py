"""The gates of the MLP and of attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.dispatch import by_token, op


@op
@by_token("gate_up")
def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [T, 2 * I], gate first; returns [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@op
@by_token("x", "gate")
def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate). x, gate: [T, query_heads * head_dim]; returns x's shape and dtype."""
    return x * torch.sigmoid(gate)
