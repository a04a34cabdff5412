"""RMS norms in one pass each. See `millrace.kernels.norm`."""

from __future__ import annotations

from torch import Tensor

from millrace.kernels.gpu.quantize import GATED_NORM, _rows, norm, pointwise


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., H]; as the reference."""
    normed = norm(x.reshape(-1, x.shape[-1]), None, weight, eps)[0]
    assert normed is not None
    return normed.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference: (rms_norm(x + residual), x + residual)."""
    normed, _, total = norm(x, residual, weight, eps)
    assert normed is not None
    assert total is not None
    return normed, total


def gated_rms_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference; z may be a slice of a wider projection."""
    width, dim = o[0].numel(), o.shape[-1]
    return pointwise(GATED_NORM, _rows(o), _rows(z), width, dim, weight, eps)
