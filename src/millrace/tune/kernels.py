"""`millrace tune kernels`: has this machine's GPU measured, by a process that knows kernels."""

from __future__ import annotations

import os
import subprocess
from typing import Literal

import msgspec

from millrace.common.child_process import python_module

PROGRAM = "millrace.runtime.kernel_tuning"


class KernelFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernels are measured for, and where the table goes."""

    tensor_parallel_size: int = 1
    num_speculative_tokens: int = 1
    kv_cache_dtype: Literal["fp8_e4m3", "bfloat16"] = "fp8_e4m3"
    block_size: int = 64
    by: Literal["time", "energy"] = "time"
    sections: list[str] = []
    tokens: list[int] = []
    out: str | None = None


HELP = {
    "tensor_parallel_size": "GPUs that the model is split over; its shapes depend on it.",
    "num_speculative_tokens": "Drafts of a decode row.",
    "kv_cache_dtype": "Of cached keys and values.",
    "block_size": "Tokens of a page of the KV cache.",
    "by": "What counts: time, or the energy that the GPU takes.",
    "sections": "Measure these alone: fp8_products, fp8_tiles, w4_products, decode_attention.",
    "tokens": "Sizes of products (default: those where choices are known to change).",
    "out": "File to write (default: the one that `millrace serve` reads).",
}


def measure(model: str, flags: KernelFlags) -> int:
    """Measure, and return the exit status. Progress goes to stderr, the file's path to stdout."""
    words = [
        "--parent", str(os.getpid()), "--model", model, "--ranks", str(flags.tensor_parallel_size),
        "--drafts", str(flags.num_speculative_tokens), "--cached", flags.kv_cache_dtype,
        "--page", str(flags.block_size), "--by", flags.by,
    ]  # fmt: skip
    words += ["--sections", ",".join(flags.sections)] if flags.sections else []
    words += ["--tokens", ",".join(map(str, flags.tokens))] if flags.tokens else []
    words += ["--out", flags.out] if flags.out else []
    return subprocess.run(python_module(PROGRAM, *words), check=False).returncode
