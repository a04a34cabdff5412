"""The backend of each op on this GPU, one line each, logged at the start.

The modules that choose a backend are asked for their reasons; nothing is chosen here. Ops with a
single backend share one line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
import triton

from millrace.kernels.dispatch import BackendChoice, all_ops, find_fast_path
from millrace.kernels.gpu import gdn_decode, gemm

logger = logging.getLogger("millrace.kernels")


def backends(fp8: torch.dtype | None, gdn: gdn_decode.Shape | None) -> Iterator[BackendChoice]:
    """fp8: output dtype of GEMMs with FP8 weights; None for a model without them.

    gdn: shape of the GDN decode kernels; None for a model without GDN layers.
    """
    if fp8 is not None:
        yield from gemm.fp8_backends(fp8)
    if gdn is not None:
        yield gdn_decode.decode_backend(gdn)
    plain = [f"{m.rpartition('.')[2]}.{n}" for m, n in all_ops() if not find_fast_path("gpu", m, n)]
    by_torch = f"; PyTorch for {', '.join(plain)}" if plain else ""
    yield BackendChoice("other ops", f"Triton {triton.__version__}{by_torch}")


def log_backends(choices: Iterable[BackendChoice]) -> None:
    """One line each; a warning where a remedy would make a faster backend available."""
    for choice in choices:
        logger.log(logging.WARNING if choice.remedy else logging.INFO, "%s", choice)
