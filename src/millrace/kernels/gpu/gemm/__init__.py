"""FP8 GEMMs on the GPU: the ops of `millrace.kernels.gemm`, gathered from their modules."""

from __future__ import annotations

from millrace.kernels.gpu.gemm.fp8 import fp8_linear

__all__ = ["fp8_linear"]
