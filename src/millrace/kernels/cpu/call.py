"""Calls the compiled functions with tensors: their signatures, and checks of their arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from millrace.kernels.cpu.build import library

LANES = 16  # head sizes are multiples of it
DTYPES = (torch.float32, torch.bfloat16)


# Parameters of each function: p a tensor's memory, l an int64_t, i an int, f a float.
SIGNATURES = {
    "attend": "pppppppp" + "ii" + "iiiiiii" + "fii",
    "conv": "plpiipppp" + "ii" + "p" + "ii",
    "gated_rms_norm": "ppl" + "pfl" + "ii" + "pii",
    "gdn_decode": "ppppppppppp" + "p" + "iiii" + "iii" + "ll" + "iiiii",
    "gdn_fixed": "ppppppppppp" + "pp" + "iii" + "iii" + "ll" + "iiiii",
    "gdn_prefill": "ppppppp" + "iii" + "ll" + "iiiii",
    "linear": "ppiii" + "pi",
    "linear_floats": "ppiii" + "pii",
    "norm_rope_store": "plppfp" + "pipppp" + "iiiiiiii",
    "rms_norm": "pppflil" + "ppii",
    "run_experts": "ppppp" + "pppppp" + "iiiii",
    "sigmoid_gate": "pplli" + "pii",
    "silu_mul": "pli" + "pii",
    "w4_linear": "ppppppp" + "iiiiiii",
}
_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
}
_declared: dict[str, Callable[..., Any]] = {}


def function(name: str) -> Callable[..., Any] | None:
    """A function of the library, by its name without the prefix; None if there is no library."""
    compiled = library()
    if compiled is None:
        return None
    if name not in _declared:
        declared = getattr(compiled, f"millrace_{name}")
        declared.argtypes = [_TYPES[kind] for kind in SIGNATURES[name]]
        _declared[name] = declared
    return _declared[name]


def pointer(x: Tensor | None) -> int | None:
    """Address of a tensor's memory; None for None."""
    return None if x is None else x.data_ptr()


def is_bf16(x: Tensor) -> int:
    """The dtype flag of a function: 1 for bfloat16, 0 for float32."""
    return int(x.dtype == torch.bfloat16)


def all_contiguous(*tensors: Tensor) -> bool:
    """Whether all are contiguous and float32 or bfloat16."""
    return all(x.dtype in DTYPES and x.is_contiguous() for x in tensors)


def rows_contiguous(x: Tensor) -> bool:
    """Whether each row is contiguous, with any distance between rows, and float32 or bfloat16."""
    if x.dtype not in DTYPES or not x.shape[0]:
        return False
    return x[0].is_contiguous()


def threads() -> int:
    """How many threads a function may use."""
    return torch.get_num_threads()
