"""Attention of prompts over keys and values in rows of their own, by a CUDA kernel for Hopper.

As `wide`, whose rows it takes; wide.cu says how. It is compiled at run time, for heads of 256
channels and queries in bfloat16. Where it does not take something, or cannot be compiled, `wide`
has the work.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from millrace.kernels.batch import KVCache, PrefillRows
from millrace.kernels.dispatch import remembered
from millrace.kernels.gpu import cuda_source
from millrace.kernels.gpu.attention.softmax import LOG2_E
from millrace.kernels.gpu.cuda_source import FLOAT16, CudaKernel, TensorMap
from millrace.kernels.gpu.device import gpu

ON = False  # whether `prefill` gives it rows: not until a GPU has compared
TILE, DIM, PANEL = 128, 256, 64  # tokens of a block; channels of a head, and of a box
BLOCK, STAGES = 80, 2  # keys of a block, and how many blocks of keys and of values are on the way
THREADS = 384
SHARED_BYTES = TILE * DIM * 2 + 2 * STAGES * BLOCK * DIM * 2 + 4 * STAGES * 8 + 1024
C_TYPES = {torch.int32: "int", torch.int64: "i64"}


def takes(q: Tensor, wide: KVCache, rows: PrefillRows, first: int, out: Tensor) -> bool:
    """Whether the kernel is for these, and this machine has it."""
    return (
        ON and first == 0 and q.dtype == out.dtype == torch.bfloat16 and q.shape[2] == DIM
        and wide.keys.dtype == torch.float16 and q.stride(0) % 8 == 0 and q.data_ptr() % 16 == 0
        and kernel_for(rows.starts.dtype, rows.offsets.dtype) is not None
    )  # fmt: skip


def attend(
    q: Tensor, wide: KVCache, rows: PrefillRows, wide_at: Tensor, scale: float, out: Tensor
) -> None:
    """Write to out what `attend_prefill` wants of the rows that are widened; as `wide.attend`."""
    kernel = kernel_for(rows.starts.dtype, rows.offsets.dtype)
    if kernel is None:
        raise RuntimeError("there is no kernel for these; ask `takes` first")
    heads, kv_heads = q.shape[1], wide.keys.shape[1]
    tiles = rows.tiles(TILE, q.shape[0])
    bits = struct.unpack("<i", struct.pack("<f", scale * LOG2_E))[0]
    kernel(
        grid=(heads, tiles.shape[1], 1), block=(THREADS, 1, 1),
        args=[_boxes(wide.keys), _boxes(wide.values), q, rows.starts, rows.offsets, wide_at, tiles,
              out, q.stride(0), tiles.shape[1], heads, heads // kv_heads, bits],
        shared_bytes=SHARED_BYTES,
    )  # fmt: skip


def source(starts: torch.dtype, offsets: torch.dtype) -> str:
    """The kernel `attend_wide`, for starts and offsets of these types."""
    types = f"#define STARTS {C_TYPES[starts]}\n#define OFFSETS {C_TYPES[offsets]}\n"
    text = cuda_source.read({"bn": BLOCK, "stages": STAGES}, "attention/wide.cu")
    products = f"#ifndef EMULATED{_scores(BLOCK)}{_shares()}#endif\n"
    return types + products + text


def _scores(keys: int) -> str:
    """scores(S, a, b, add): 64 queries by so many keys, 16 channels, both from shared memory."""
    count = keys // 2
    return f"""
__device__ __forceinline__ void scores(float* S, unsigned long long a, unsigned long long b,
                                       int add) {{
  asm volatile("{{ .reg .pred add; setp.ne.b32 add, %{count + 2}, 0;"
               "wgmma.mma_async.sync.aligned.m64n{keys}k16.f32.f16.f16 {{{_numbers(count)}}},"
               "%{count}, %{count + 1}, add, 1, 1, 0, 0; }}"
               : {_outputs("S", count)} : "l"(a), "l"(b), "r"(add));
}}
"""


def _shares() -> str:
    """shares(O, P, v): 64 queries by 256 channels, 16 keys: P in registers, v read across rows."""
    count = DIM // 2
    shares = ", ".join(f"%{count + i}" for i in range(4))
    return f"""
__device__ __forceinline__ void shares(float* O, const unsigned* P, unsigned long long v) {{
  asm volatile("wgmma.mma_async.sync.aligned.m64n{DIM}k16.f32.f16.f16 {{{_numbers(count)}}},"
               "{{{shares}}}, %{count + 4}, 1, 1, 1, 1;"
               : {_outputs("O", count)} : "r"(P[0]), "r"(P[1]), "r"(P[2]), "r"(P[3]), "l"(v));
}}
"""


def _numbers(count: int) -> str:
    return ", ".join(f"%{i}" for i in range(count))


def _outputs(name: str, count: int) -> str:
    return ", ".join(f'"+f"({name}[{i}])' for i in range(count))


@remembered
def kernel_for(starts: torch.dtype, offsets: torch.dtype) -> CudaKernel | None:
    """None where there is no compiler, or no Hopper GPU. Compiled at the first call, which must not
    be while a graph is captured."""
    if not gpu().is_hopper or starts not in C_TYPES or offsets not in C_TYPES:
        return None
    return cuda_source.compiled(source(starts, offsets), "attend_wide", "90a", SHARED_BYTES)


def _boxes(x: Tensor) -> TensorMap:
    """Boxes of BLOCK keys and 64 channels of [keys, kv_heads, head_dim]."""
    keys, width = x.shape[0], x.shape[1] * x.shape[2]
    return TensorMap.of(x.data_ptr(), FLOAT16, (keys, width), 2 * width, (BLOCK, PANEL), 128)
