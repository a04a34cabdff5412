"""Which kernels are launched before the one in front of them has ended: the switches, by name.

Early: FP8 products behind what quantises their input; chained: norms, silu, products of few tokens
and the pass over recurrent states, too, and CUDA kernels are launched by a call of the driver.
"""

from __future__ import annotations

WAYS = ("default", "apart", "early", "chained")


def choose_launches(way: str) -> None:
    """From now on; graphs that are captured already keep theirs. "default" changes nothing."""
    if way == "default":
        return
    try:
        from millrace.kernels.gpu import cuda_source, quantize
        from millrace.kernels.gpu.gemm import fp8
    except ImportError:  # a machine without Triton
        return
    quantize.EARLY_LAUNCHES = way != "apart"
    quantize.CHAINED_LAUNCHES = cuda_source.DIRECT_LAUNCHES = way == "chained"
    quantize.launches_early.cache_clear()
    fp8.allow_early_launches.cache_clear()
