"""FP8 products of 9 to 128 tokens: the CUDA kernel on a GPU, and its index arithmetic on a CPU.

Without a GPU the same source runs through g++ (cuda_on_cpu.h), with as many blocks as a test likes.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.kernels.gpu import cuda_source
from millrace.kernels.gpu.gemm import some
from millrace.kernels.quantize import Quantized
from tests.kernels.gpu.gpu_support import INTERPRETED, relative
from tests.kernels.gpu.test_gemm import exact, rows_of, some_tokens, some_weight

HERE = Path(__file__).parent
ENTRY = """
extern "C" void run(void** arguments, int blocks) {{
  last_block_first = true;
  memset(memory, 255, sizeof(memory));
  call(gemm_some, arguments, blocks, 1, MULTIPLIERS + 32);
}}
"""
on_cpu = pytest.mark.skipif(INTERPRETED, reason="runs without Triton")
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device"),
]


class Map(ctypes.Structure):
    """What stands for a tensor map on the CPU."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("base", "height", "width", "rows"))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    """The kernel on the CPU, of x, weight, scale and a number of blocks."""
    folder = tmp_path_factory.mktemp("some")

    @functools.cache
    def library(tokens: int) -> Any:
        stem = folder / f"some{tokens}"
        text = f'#define TOKENS {tokens}\n#include "cuda_on_cpu.h"\n#undef TOKENS\n'
        text += some.source(tokens).replace('extern "C"', "") + ENTRY.format()
        stem.with_suffix(".cpp").write_text(text)
        command = ["g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{HERE}", "-o"]
        subprocess.run([*command, f"{stem}.so", f"{stem}.cpp"], check=True, timeout=120)
        return ctypes.CDLL(f"{stem}.so")

    def product(x: Quantized, weight: Tensor, scale: Tensor, blocks: int) -> Tensor:
        (tokens, width), outputs = x.values.shape, len(weight)
        size = some.size_for(tokens)
        out = torch.full((tokens, outputs), torch.nan, dtype=torch.bfloat16)
        left = torch.full((blocks, size // 2 * some.MULTIPLIERS), torch.nan)
        flags = torch.zeros(blocks, dtype=torch.int32)
        maps = (
            Map(weight.data_ptr(), outputs, width, some.ROWS),
            Map(x.values.data_ptr(), tokens, width, size),
        )
        tensors = (x.scales, scale, out, left, flags)
        values = [
            *maps,
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
            *map(ctypes.c_int, (tokens, outputs, width, x.scales.stride(1), scale.stride(0))),
        ]
        pointers = [ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values]
        library(size).run((ctypes.c_void_p * len(values))(*pointers), blocks)
        assert not flags.any()
        return out

    return product


@on_cpu
@pytest.mark.parametrize(
    ("tokens", "outputs", "width", "blocks"),
    [(9, 256, 384, 1), (16, 256, 384, 4), (12, 128, 640, 5), (24, 384, 256, 2), (40, 256, 256, 3)],
)
def test_emulated_product(
    emulated: Callable[..., Tensor], tokens: int, outputs: int, width: int, blocks: int
) -> None:
    """Blocks have whole tiles, parts of two, or one part of a tile that several share."""
    torch.manual_seed(tokens)
    x, (weight, scale) = some_tokens(tokens, width), some_weight(outputs, width)
    assert relative(emulated(x, weight, scale, blocks), exact(x, weight, scale)) < 3e-3


@on_cpu
def test_a_ring_that_comes_round(emulated: Callable[..., Tensor]) -> None:
    """More groups than there are stages, and a block that goes on to another tile."""
    torch.manual_seed(2)
    width = 128 * (some.stages(16) + 5)
    x, (weight, scale) = some_tokens(10, width), some_weight(256, width)
    assert relative(emulated(x, weight, scale, 1), exact(x, weight, scale)) < 3e-3


@on_cpu
def test_emulated_rows_do_not_depend_on_their_number(emulated: Callable[..., Tensor]) -> None:
    torch.manual_seed(1)
    x, (weight, scale) = some_tokens(40, 384), some_weight(256, 384)
    whole = emulated(x, weight, scale, 3)
    for first, last in ((0, 10), (3, 33)):
        got = emulated(rows_of(x, first, last), weight, scale, 3)
        assert torch.equal(got, whole[first:last]), (first, last)


def test_a_block_has_the_memory_that_stages_take() -> None:
    for tokens in some.TOKENS:
        assert some.shared_bytes(tokens) <= some.SHARED_MEMORY
        assert some.stages(tokens) >= 5
    assert [some.size_for(tokens) for tokens in (9, 16, 17, 64, 128)] == [16, 16, 32, 64, 128]


def test_what_the_driver_is_told_of_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def encode(*given: Any) -> int:
        seen.append(given)
        return 0

    monkeypatch.setattr(
        cuda_source, "_driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=encode)
    )
    found = cuda_source.TensorMap.of_bytes(4096, (100, 5120), (16, 128))
    assert found.address % 64 == 0
    (at, kind, rank, base, sizes, strides, box, steps, *options) = seen[0]
    assert (at.value, kind, rank, base.value) == (found.address, 0, 2, 4096)
    assert [list(x) for x in (sizes, strides, box, steps)] == [
        [5120, 100],
        [5120],
        [128, 16],
        [1, 1],
    ]
    assert options == [0, 3, 3, 0]  # 128-byte swizzle, 256 bytes to the L2 cache, zeros outside


@pytest.mark.parametrize("tokens", [pytest.param(t, marks=on_a_gpu) for t in (9, 16, 33, 64, 100)])
@pytest.mark.parametrize("shape", [(5120, 17408), (34816, 5120), (256, 384)])
def test_on_a_gpu(tokens: int, shape: tuple[int, int]) -> None:
    """Right, the same bits each time, and the same whatever stands beside a token."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper alone")
    torch.manual_seed(tokens)
    x, (weight, scale) = some_tokens(tokens, shape[1], "cuda"), some_weight(*shape, "cuda")
    whole = some.some_matmul(x, weight, scale)
    assert whole is not None
    assert relative(whole, exact(x, weight, scale)) < 3e-3
    for first, last in ((0, tokens), (0, 9), (tokens - 9, tokens)):
        for _ in range(5):
            got = some.some_matmul(rows_of(x, first, last), weight, scale)
            assert got is not None
            assert torch.equal(got, whole[first:last]), (first, last)
