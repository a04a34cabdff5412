"""Which of DeepGEMM's kernels is foretold: those that its version 0.1.3 takes on an H200.

Whether the library agrees, test_prebuild.py asks on a GPU.
"""

from __future__ import annotations

import pytest

from tests.kernels.gpu.gpu_support import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="the package imports Triton")

from millrace.kernels.gpu.gemm.tiling import SHARED_MEMORY, Kernel, kernel_of  # noqa: E402

SHAPES = [(16384, 5120), (5120, 17408), (34816, 5120), (2048, 5120), (248320, 5120)]


@pytest.mark.parametrize(
    ("tokens", "shape", "kernel"),
    [
        (16384, (34816, 5120), Kernel(256, 128, 3, "activations", 132)),
        (2560, (5120, 6144), Kernel(128, 160, 5, "weight", 132)),
        (48, (5120, 17408), Kernel(64, 48, 15, "", 132)),
        (16, (248320, 5120), Kernel(16, 192, 8, "weight", 132)),
    ],
)
def test_kernels(tokens: int, shape: tuple[int, int], kernel: Kernel) -> None:
    assert kernel_of(tokens, *shape, 132) == kernel


@pytest.mark.parametrize("shape", SHAPES)
def test_a_kernel_fits_into_a_multiprocessor(shape: tuple[int, int]) -> None:
    seen = set()
    for tokens in (9, 16, 17, 33, 64, 100, 300, 1024, 16384):
        kernel = kernel_of(tokens, *shape, 132)
        operands = kernel.stages * (kernel.rows + kernel.columns) * 128
        assert operands + 2 * kernel.rows * kernel.columns < SHARED_MEMORY
        assert kernel.rows >= 64 or tokens <= kernel.rows
        assert kernel_of(tokens, *shape, 112)._replace(multiprocessors=132).rows >= 16
        seen.add(kernel)
    assert len(seen) > 2
