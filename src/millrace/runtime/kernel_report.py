"""The backend of each op on this GPU, one log line for each, at the start.

The modules that choose a backend give the reasons; nothing is chosen here. Ops with a single
backend share one line.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator

import torch
import triton

from millrace.kernels.dispatch import BackendChoice, all_ops, find_fast_path
from millrace.kernels.gpu import moe
from millrace.kernels.gpu.gdn import decode
from millrace.kernels.gpu.gemm import fp8 as gemm
from millrace.kernels.gpu.gemm.w4 import w4_backends

logger = logging.getLogger("millrace.kernels")


def backends(
    dtype: torch.dtype,
    fp8: Collection[tuple[int, int]],
    gdn: decode.Shape | None,
    experts: Collection[tuple[int, int, int]] | None = None,
    w4: bool = False,
) -> Iterator[BackendChoice]:
    """dtype: the model's. fp8: (outputs, inputs) of its FP8 weights.

    gdn: shape of its GDN decode kernels; None for a model without GDN layers. experts: (experts,
    hidden channels, channels of one) of its FP8 experts; None for a model without experts. w4:
    whether it has weights of 4 bits.
    """
    if fp8:
        yield from gemm.fp8_backends(dtype, fp8)
    if w4:
        yield from w4_backends()
    if experts is not None:
        yield from moe.backends(dtype, experts)
    if gdn is not None:
        yield decode.decode_backend(gdn)
    plain = [f"{m.rpartition('.')[2]}.{n}" for m, n in all_ops() if not find_fast_path("gpu", m, n)]
    by_torch = f"; PyTorch for {', '.join(plain)}" if plain else ""
    yield BackendChoice("other ops", f"Triton {triton.__version__}{by_torch}")


def log_backends(choices: Iterable[BackendChoice]) -> None:
    """One line each; a warning where a remedy would make a faster backend available."""
    for choice in choices:
        logger.log(logging.WARNING if choice.remedy else logging.INFO, "%s", choice)
