"""GEMMs with FP8 and W4 weights on the GPU: ops of `millrace.kernels.gemm`, of several modules."""

from __future__ import annotations

from millrace.kernels.gpu.gemm.fixed import fixed_linear
from millrace.kernels.gpu.gemm.fp8 import fp8_linear
from millrace.kernels.gpu.gemm.w4 import w4_linear
from millrace.kernels.warmup import StepLimits, Warmup

__all__ = ["fixed_linear", "fp8_linear", "w4_linear", "warmup"]
SMALL = (16, 24, 32, 48, 96)  # tokens, beside multiples of 64


def warmup(limits: StepLimits) -> Warmup:
    """Kernels are tiled by 16 and 32 tokens and by multiples of 64, and backends (choice.py) change
    there and at a few numbers between. So each of these covers the smaller ones; large ones differ
    little."""
    most = limits.tokens
    return Warmup(
        tokens=frozenset({*SMALL, *range(64, min(most, 4096) + 1, 64), *range(1024, most, 1024)})
    )
