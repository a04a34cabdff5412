"""RMS norms: of a residual stream, of attention heads, and the gated one behind a GDN layer.

All are computed in float32 and rounded once, at the end, to the dtype of their input. They multiply
by the weight as it is given: a model with norms of 1 + weight adds the 1 when it is loaded.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.dispatch import by_token, op


@op
@by_token("x")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight. x: [..., H] of any leading shape, weight: [H]."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


@op
@by_token("x", "residual")
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream, and norm the sum for the next layer.

    x, residual: [T, H]. Returns (rms_norm(x + residual), x + residual); the sum is rounded to the
    model dtype before it is normed, so that both results belong to the same stream.
    """
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


@op
@by_token("o", "z")
def gated_rms_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The output norm of a GDN layer: per head o / rms(o) * weight * silu(z), norm before gate.

    o, z: [T, value_heads, value_dim]; weight: [value_dim]. Returns
    [T, value_heads * value_dim] of o's dtype.
    """
    normed = F.rms_norm(o.float(), (o.shape[-1],), weight.float(), eps)
    return (normed * F.silu(z.float())).to(o.dtype).flatten(1)
