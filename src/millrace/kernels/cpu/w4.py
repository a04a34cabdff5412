"""GEMMs with weights of 4 bits on a CPU: they are unpacked panel by panel, where they are used.

Weights are rounded to the dtype of the inputs as the reference rounds them, and multiplied as
`linear` multiplies: so results are the same bits as those of dequantized weights.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

from millrace.kernels.cpu.build import is_enabled
from millrace.kernels.cpu.call import all_contiguous, function, is_bf16, pointer, threads
from millrace.kernels.dispatch import is_invariant, remembered
from millrace.kernels.gemm import E2M1, SYMMETRIC, W4

TORCH_IS_FASTER = 512  # from so many rows on


@remembered
def is_supported() -> bool:
    """Whether the compiled function can run here, once it is there."""
    if not is_enabled() or platform.system() != "Linux":
        return False
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text()


def w4_linear(x: Tensor, weight: W4) -> Tensor:
    """As the reference."""
    run, (columns, n) = function("w4_linear"), weight.shape
    parts = [part for part in weight[:4] if isinstance(part, Tensor)]
    if run is None or not all_contiguous(x):
        return NotImplemented
    if x.shape[0] >= TORCH_IS_FASTER and not is_invariant():
        return NotImplemented
    if not all(part.is_contiguous() for part in parts):
        return NotImplemented
    out = x.new_empty(x.shape[0], columns)
    done = run(
        *map(pointer, (x, *weight[:4], _values(weight), out)),
        *(x.shape[0], columns, n, weight.group, weight.scales.shape[1], is_bf16(x), threads()),
    )
    return out if done else NotImplemented


def _values(weight: W4) -> Tensor:
    """What the 16 codes stand for before zeros are taken off, float32."""
    kind = "floats" if weight.floats else "symmetric" if weight.zeros is None else "whole"
    return VALUES[kind]


_WHOLE = torch.arange(16, dtype=torch.float32)
VALUES = {
    "floats": torch.tensor(E2M1, dtype=torch.float32),
    "symmetric": _WHOLE - SYMMETRIC,
    "whole": _WHOLE,
}
