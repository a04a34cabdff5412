"""The attention kernel for Hopper on a CPU: its index arithmetic, masks and barriers.

Its source runs through g++; hopper_on_cpu.h stands in for TMA, mbarriers and wgmma.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from millrace.kernels.gpu.attention import hopper
from millrace.kernels.gpu.attention.softmax import LOG2_E
from tests.kernels.gpu.gpu_support import relative

HERE = Path(__file__).parent
ENTRY = """
#include "cuda_on_cpu.h"
#define BN {block}
#include "hopper_on_cpu.h"
#undef BN
{source}
extern "C" void run(const u16* k, const u16* v, int keys, int width, const u16* q,
                    const i64* starts, const int* offsets, const int* wide_at, const int* tiles,
                    u16* out, int q_stride, int count, int heads, int group, u32 scale) {{
  TensorMap key_map{{k, keys, width}}, value_map{{v, keys, width}};
  void* given[] = {{&key_map, &value_map, &q, &starts, &offsets, &wide_at, &tiles, &out, &q_stride,
                   &count, &heads, &group, &scale}};
  call(attend_wide, given, heads, count, 384);
}}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    stem = tmp_path_factory.mktemp("attention") / "wide"
    source = hopper.source(torch.int64, torch.int32)
    stem.with_suffix(".cpp").write_text(ENTRY.format(source=source, block=hopper.BLOCK))
    command = ["g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{HERE}", "-o"]
    subprocess.run([*command, f"{stem}.so", f"{stem}.cpp"], check=True, timeout=120)
    return ctypes.CDLL(f"{stem}.so")


def test_rows_as_by_float64(emulated: ctypes.CDLL) -> None:
    """A cached context, rows of one and of two tiles, one that is not widened, a tile of nobody.
    What lies between and behind the rows is NaN, and nothing is written for others."""
    torch.manual_seed(0)
    heads, kv_heads, scale = 4, 2, 1 / 16
    counts, starts, wide_at = (1, 130, 9, 70), (0, 37, 5, 250), (3, 10, -1, 200)
    keys, values = (torch.full((540, kv_heads, 256), torch.nan).half() for _ in range(2))
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    q = torch.randn(sum(counts), heads, 256).bfloat16()
    want = torch.full(q.shape, torch.nan, dtype=torch.float64)
    for row, (count, start, at) in enumerate(zip(counts, starts, wide_at, strict=True)):
        if at < 0:
            continue
        total, begin = start + count, int(offsets[row])
        for x in (keys, values):
            x[at : at + total] = torch.randn(total, kv_heads, 256).half()
        k, v = (x[at : at + total].double() for x in (keys, values))
        for head in range(heads):
            s = q[begin : begin + count, head].double() @ k[:, head // 2].T * scale
            later = torch.arange(total) > start + torch.arange(count)[:, None]
            shares = s.masked_fill(later, -torch.inf).softmax(1)
            want[begin : begin + count, head] = shares @ v[:, head // 2]
    tiles = torch.tensor([[0, 1, 1, 2, 3, -1], [0, 0, 1, 0, 0, 0]], dtype=torch.int32)
    out = torch.full_like(q, torch.nan)
    bits = struct.unpack("<i", struct.pack("<f", scale * LOG2_E))[0]
    rows = (torch.tensor(starts), offsets, torch.tensor(wide_at, dtype=torch.int32), tiles, out)
    at = [ctypes.c_void_p(x.data_ptr()) for x in (keys, values, q, *rows)]
    emulated.run(
        *at[:2], len(keys), kv_heads * 256, *at[2:], heads * 256, tiles.shape[1], heads,
        heads // kv_heads, bits,
    )  # fmt: skip
    assert relative(out, want) < 4e-3
