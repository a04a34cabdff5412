"""CUDA sources beside this module, compiled at run time by PyTorch's bundled compiler.

A source takes its constants by name; each set of them is another kernel. Callers keep what they
were given, so that nothing is compiled twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib import resources

import torch

logger = logging.getLogger(__name__)


def read(file: str, constants: Mapping[str, int]) -> str:
    """The text of `file` after its constants, whose names it writes in capitals."""
    head = "".join(f"#define {name.upper()} {int(value)}\n" for name, value in constants.items())
    return head + resources.files(__package__).joinpath(file).read_text()


def compiled(text: str, name: str) -> Callable[..., None] | None:
    """The kernel `name` of a source; None, and a warning, where this machine cannot compile it."""
    compiler = getattr(torch.cuda, "_compile_kernel", None)
    if compiler is None:
        _warn(name, f"PyTorch {torch.__version__} has no torch.cuda._compile_kernel")
        return None
    try:
        kernel: Callable[..., None] = compiler(text, name)
    except (RuntimeError, OSError) as error:  # no compiler library on this machine
        _warn(name, error)
        return None
    return kernel


def _warn(name: str, why: object) -> None:
    logger.warning("the kernel %s cannot be compiled; a slower one runs: %s", name, why)
