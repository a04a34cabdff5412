"""FP8 products of few tokens: the CUDA kernel on a GPU, and its index arithmetic on a CPU.

Without a GPU the same source runs through g++, its warps emulated (cuda_on_cpu.h).
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from millrace.kernels.gemm import dequantize
from millrace.kernels.gpu.gemm import few as gemm_few
from millrace.kernels.quantize import Quantized, quantize
from tests.kernels.gpu.gpu_support import INTERPRETED, relative

HERE = Path(__file__).parents[1]  # where cuda_on_cpu.h is
ENTRY = """
#include "cuda_on_cpu.h"
{source}
static const u8 *X, *W;
static const float *SX, *SW;
static u16* OUTPUT;
static int COUNT, OUTPUTS, WIDTH, X_STRIDE, W_STRIDE;
static void one() {{
  gemm_few(X, SX, W, SW, OUTPUT, COUNT, OUTPUTS, WIDTH, X_STRIDE, W_STRIDE);
}}
extern "C" void run(const u8* x, const float* sx, const u8* w, const float* sw, u16* out, int t,
                    int outputs, int width, int x_stride, int w_stride) {{
  X = x, SX = sx, W = w, SW = sw, OUTPUT = out, COUNT = t, OUTPUTS = outputs, WIDTH = width;
  X_STRIDE = x_stride, W_STRIDE = w_stride;
  launch(outputs / ROWS, 32 * WARPS, one);
}}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    """The kernel on the CPU, of x, weight and scale."""
    stem = tmp_path_factory.mktemp("gemm") / "gemm"
    stem.with_suffix(".cpp").write_text(ENTRY.format(source=gemm_few.source()))
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}", "-o"]
    subprocess.run([*command, f"{stem}.so", f"{stem}.cpp"], check=True, timeout=120)
    library = ctypes.CDLL(f"{stem}.so")

    def product(x: Quantized, weight: Tensor, scale: Tensor) -> Tensor:
        (tokens, width), outputs = x.values.shape, len(weight)
        out = torch.full((tokens, outputs), torch.nan, dtype=torch.bfloat16)
        tensors = (x.values, x.scales, weight, scale, out)
        library.run(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
            tokens, outputs, width, x.scales.stride(1), scale.stride(0),
        )  # fmt: skip
        return out

    return product


def some_weight(outputs: int, width: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    weight = torch.randn(outputs, width, device=device).mul_(64).to(torch.float8_e4m3fn)
    return weight, torch.rand(-(-outputs // 128), -(-width // 128), device=device) + 0.1


def some_tokens(tokens: int, width: int, device: str = "cpu") -> Quantized:
    """Random ones; scales lie group by group, as the GPU ops leave them."""
    values, scales = quantize.__wrapped__(torch.randn(tokens, width, device=device))
    padded = torch.full((-(-width // 128), -(-tokens // 4) * 4), torch.nan, device=device)
    padded[:, :tokens] = scales.t()
    return Quantized(values, padded.t()[:tokens])


def exact(x: Quantized, weight: Tensor, scale: Tensor) -> Tensor:
    return x.dequantize().double() @ dequantize(weight, scale).double().t()


def rows_of(x: Quantized, first: int, last: int) -> Quantized:
    """Those tokens alone, with scales laid out anew."""
    count = last - first
    padded = torch.full((x.scales.shape[1], -(-count // 4) * 4), torch.nan, device=x.scales.device)
    padded[:, :count] = x.scales[first:last].t()
    return Quantized(x.values[first:last].clone(), padded.t()[:count])


on_cpu = pytest.mark.skipif(INTERPRETED, reason="runs without Triton")


@on_cpu
@pytest.mark.parametrize(("tokens", "width"), [(1, 1024), (3, 128), (7, 640), (8, 2304)])
def test_emulated_product(emulated: Callable[..., Tensor], tokens: int, width: int):
    torch.manual_seed(tokens)
    x, (weight, scale) = some_tokens(tokens, width), some_weight(256, width)
    assert relative(emulated(x, weight, scale), exact(x, weight, scale)) < 3e-3


@on_cpu
def test_emulated_rows_do_not_depend_on_their_number(emulated: Callable[..., Tensor]):
    torch.manual_seed(1)
    x, (weight, scale) = some_tokens(8, 1152), some_weight(384, 1152)
    whole = emulated(x, weight, scale)
    assert relative(whole, exact(x, weight, scale)) < 3e-3
    for first, last in ((0, 1), (3, 5), (7, 8), (1, 8)):
        got = emulated(rows_of(x, first, last), weight, scale)
        assert torch.equal(got, whole[first:last]), (first, last)


@on_cpu
def test_every_channel_meets_its_own(emulated: Callable[..., Tensor]):
    """Identity tokens against a weight of distinct bytes: an exchanged channel would show."""
    width = 256
    bytes_ = torch.arange(128 * width, dtype=torch.int32).mul(37).remainder(251).to(torch.uint8)
    bytes_[(bytes_ & 127) == 127] = 1  # NaN
    weight, scale = bytes_.view(torch.float8_e4m3fn).view(128, width), torch.ones(1, 2)
    for first in range(0, width, 8):
        values = torch.eye(width)[first : first + 8].to(torch.float8_e4m3fn)
        got = emulated(Quantized(values, torch.ones(2, 8).t()), weight, scale)
        assert torch.equal(got.float(), weight.float().t()[first : first + 8])


@pytest.mark.parametrize("tokens", [9, 64])
def test_refuses_more_tokens(tokens: int):
    x, (weight, scale) = some_tokens(tokens, 128), some_weight(128, 128)
    assert gemm_few.few_matmul(x, weight, scale) is None


@pytest.mark.parametrize("shape", [(128, 100), (100, 128)])
def test_refuses_ragged_weights(shape: tuple[int, int]):
    weight, scale = torch.zeros(shape).to(torch.float8_e4m3fn), torch.ones(1, 1)
    x = Quantized(torch.zeros(1, shape[1]).to(torch.float8_e4m3fn), torch.ones(1, 1))
    assert gemm_few.few_matmul(x, weight, scale) is None


def on_gpu(x: Quantized, weight: Tensor, scale: Tensor) -> Tensor:
    out = gemm_few.few_matmul(x, weight, scale)
    assert out is not None
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("outputs", [128, 384, 5120])
@pytest.mark.parametrize("width", [128, 640, 5248])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8])
def test_product(tokens: int, width: int, outputs: int):
    torch.manual_seed(tokens)
    x, (weight, scale) = some_tokens(tokens, width, "cuda"), some_weight(outputs, width, "cuda")
    assert relative(on_gpu(x, weight, scale), exact(x, weight, scale)) < 3e-3


@pytest.mark.gpu
def test_rows_do_not_depend_on_their_number():
    torch.manual_seed(1)
    x, (weight, scale) = some_tokens(8, 5248, "cuda"), some_weight(640, 5248, "cuda")
    whole = on_gpu(x, weight, scale)
    for first, last in ((0, 1), (3, 5), (7, 8), (1, 8), (0, 8)):
        got = on_gpu(rows_of(x, first, last), weight, scale)
        assert torch.equal(got, whole[first:last]), (first, last)


@pytest.mark.gpu
def test_extreme_scales_and_a_row_of_nan():
    torch.manual_seed(2)
    x, (weight, scale) = some_tokens(5, 1024, "cuda"), some_weight(384, 1024, "cuda")
    x.scales[1] *= 1e-30
    x.scales[2] *= 1e20
    scale[0], scale[1] = scale[0] * 1e-5, scale[1] * 1e5
    values = x.values.view(torch.uint8).clone()
    values[4] = 0x7F  # NaN, as a padded row may hold
    x = Quantized(values.view(torch.float8_e4m3fn), x.scales)
    got = on_gpu(x, weight, scale)
    want = exact(x, weight, scale)
    assert bool(got[4].isnan().all())
    for row in range(4):
        for block in range(3):
            columns = slice(128 * block, 128 * block + 128)
            assert relative(got[row, columns], want[row, columns]) < 4e-3, (row, block)


@pytest.mark.gpu
def test_product_in_a_graph():
    torch.manual_seed(3)
    x, (weight, scale) = some_tokens(2, 1024, "cuda"), some_weight(384, 1024, "cuda")
    want = on_gpu(x, weight, scale).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = on_gpu(x, weight, scale)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_who_multiplies_few_tokens(monkeypatch: pytest.MonkeyPatch):
    from millrace.kernels.gpu.device import gpu
    from millrace.kernels.gpu.gemm import fp8

    torch.manual_seed(4)
    x, (weight, scale) = some_tokens(9, 1024, "cuda"), some_weight(384, 1024, "cuda")
    seen: list[int] = []

    def noted(few: Quantized, *others: Tensor) -> Tensor:
        seen.append(len(few.values))
        return on_gpu(few, *others)

    monkeypatch.setattr(fp8, "few_matmul", noted)
    for count in (1, 8, 9):
        some = rows_of(x, 0, count)
        got = fp8.fp8_matmul(some, weight, scale, torch.bfloat16)
        assert got.shape == (count, 384)
        assert relative(got, exact(some, weight, scale)) < 3e-3
    assert seen == ([1, 8] if gpu().is_hopper else [])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 9, 256, 8800])
def test_a_large_vocabulary(tokens: int):
    """The draft head's output of the 27B model; of 8,800 tokens it has more than 2^31 numbers."""
    from millrace.kernels.gpu.gemm import fp8

    torch.manual_seed(5)
    x, (weight, scale) = some_tokens(tokens, 5120, "cuda"), some_weight(248320, 5120, "cuda")
    for product in (fp8.fp8_matmul, fp8.triton_matmul):
        got = product(x, weight, scale, torch.bfloat16)
        assert got.shape == (tokens, 248320)
        for block in (0, 970, 1939):
            rows = slice(128 * block, 128 * block + 128)
            want = exact(x, weight[rows], scale[block : block + 1])
            assert relative(got[:, rows], want) < 3e-3, (product.__name__, block)
