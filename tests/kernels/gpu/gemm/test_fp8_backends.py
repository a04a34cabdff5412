"""FP8 products of every shape by every backend, with DeepGEMM and without it.

On a GPU the libraries themselves multiply. Elsewhere stand-ins do, which take only what the
libraries take: cuBLAS's layout is judged by PyTorch's own rules, on tensors without memory, and the
Triton kernel runs in the interpreter, on e4m3 numbers held in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.kernels.gemm import dequantize
from millrace.kernels.quantize import Quantized
from tests.kernels.gpu.gemm.test_few import exact, some_tokens, some_weight
from tests.kernels.gpu.gpu_support import (
    HAS_TRITON,
    INTERPRETED,
    SMS,
    StandIn,
    on_each_device,
    pretend,
    relative,
)

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device"
)

BF16 = torch.bfloat16
CLOSE = 4e-3  # of a result in bfloat16
TOKENS = [1, 3, 8, 9, 12, 65, 130]
SHAPES = list(product([128, 256, 384, 640, 1536, 200], [128, 256, 384, 512, 640, 1152, 300]))
# Of models on one to eight GPUs; and widths that are no multiple of 512, outputs of none of 256.
LARGE = [(5120, 4352), (5120, 2176), (1536, 256), (1280, 5120), (2560, 640), (34816, 1408)]
COMPILED = [(128, 128), (640, 384), (200, 300), *LARGE[:3]]  # DeepGEMM takes seconds for each
INSTALLED = ["all", "no DeepGEMM", "no DeepGEMM, no compiler"]


class CuBLAS:
    """`torch.nn.functional.scaled_mm`; of block scales it reads as many as the width has."""

    def __init__(self) -> None:
        self._real = torch.nn.functional.scaled_mm

    def __call__(self, *given: Any, output_dtype: torch.dtype) -> Tensor:
        self._real(*map(without_memory, given), output_dtype=output_dtype)
        a, b, a_scale, _, b_scale, *_ = given
        assert len(a) % 4 == 0
        assert bool(b_scale.isfinite().all())
        weight = dequantize(b.t(), b_scale.t()[:, : len(b) // 128])
        return (Quantized(a, a_scale).dequantize() @ weight.t()).to(output_dtype)


def without_memory(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class DeepGEMM:
    """It takes of scales on Hopper what the checks in its binary name."""

    def set_num_sms(self, count: int) -> None:
        assert 0 < count <= SMS

    def fp8_gemm_nt(
        self, x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], out: Tensor
    ) -> None:
        assert x[1].stride(0) == 1
        assert x[1].stride(1) % 4 == 0
        assert weight[1].is_contiguous()
        assert weight[1].dtype == torch.float32
        out.copy_(exact(Quantized(*x), *weight))


def few(x: Quantized, weight: Tensor, scale: Tensor) -> Tensor | None:
    from millrace.kernels.gpu.gemm import few as gemm_few

    return exact(x, weight, scale).to(BF16) if gemm_few.takes(x, weight, scale) else None


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU as a Hopper GPU whose libraries are stand-ins; the names of those that multiplied."""
    from millrace.kernels.gpu.gemm import fp8

    names: list[str] = []

    def noted(name: str, run: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def call(*given: Any) -> Tensor | None:
            out = run(*given)
            names.extend([] if out is None else [name])
            return out

        return call

    def triton(x: Quantized, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        if INTERPRETED:
            return kernel(Quantized(x.values.float(), x.scales), weight.float(), scale, dtype)
        return exact(x, weight, scale).to(dtype)

    kernel = fp8.triton_matmul
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", CuBLAS())
    pretend(monkeypatch)
    monkeypatch.setattr(fp8, "probe", lambda _: StandIn(DeepGEMM()))
    for name, run in (
        ("few_matmul", few),
        ("triton_matmul", triton),
        ("cublas_matmul", fp8.cublas_matmul),
        ("deep_gemm_matmul", fp8.deep_gemm_matmul),
    ):
        monkeypatch.setattr(fp8, name, noted(name, run))
    return names


def leave_out(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from millrace.kernels.gpu.gemm import fp8

    if installed != "all":
        monkeypatch.setattr(fp8, "probe", lambda _: StandIn(None))
    if installed.endswith("no compiler"):
        monkeypatch.setattr(fp8, "few_matmul", lambda *_: None)


def check(tokens: int, outputs: int, width: int, device: str = "cpu") -> None:
    """`fp8_matmul` against the product in float64."""
    from millrace.kernels.gpu.gemm import fp8

    x, (weight, scale) = some_tokens(tokens, width, device), some_weight(outputs, width, device)
    got = fp8.fp8_matmul(x, weight, scale, BF16)
    assert got.shape == (tokens, outputs)
    assert relative(got, exact(x, weight, scale)) < CLOSE, (tokens, outputs, width)


@pytest.mark.parametrize("installed", INSTALLED)
def test_every_shape(hopper: list[str], monkeypatch: pytest.MonkeyPatch, installed: str):
    """And only those multiply that are there."""
    leave_out(installed, monkeypatch)
    torch.manual_seed(1)
    for (outputs, width), tokens in product(SHAPES, TOKENS):
        ragged = bool(outputs % 128 or width % 128)
        if INTERPRETED and not (ragged and tokens == 9):
            continue  # the interpreter is slow, and what is not ragged needs none
        check(tokens, outputs, width)
        assert len(hopper) == 1
        assert (hopper.pop() == "triton_matmul") == ragged


@pytest.mark.parametrize(("installed", "names"), [
    ("all", ["few_matmul", "deep_gemm_matmul", "cublas_matmul"]),
    ("no DeepGEMM", ["few_matmul", "cublas_matmul", "cublas_matmul"]),
    ("no DeepGEMM, no compiler", ["cublas_matmul"] * 3),
])  # fmt: skip
def test_who_multiplies(
    hopper: list[str], monkeypatch: pytest.MonkeyPatch, installed: str, names: list[str]
):
    """Of few tokens, of some, and of as many as cuBLAS is faster with."""
    leave_out(installed, monkeypatch)
    for tokens, outputs in ((8, 640), (9, 640), (256, 12288)):
        check(tokens, outputs, 256)
    assert hopper == names


def test_float32_results_are_triton_s(hopper: list[str]):
    from millrace.kernels.gpu.gemm import fp8

    x, (weight, scale) = some_tokens(5, 384), some_weight(256, 384)
    got = fp8.fp8_matmul(x, weight, scale, torch.float32)
    assert relative(got, exact(x, weight, scale)) < 1e-5
    assert hopper == ["triton_matmul"]


@pytest.mark.parametrize("width", [128, 256, 384, 512, 640, 4352])
@pytest.mark.parametrize("outputs", [128, 640])
def test_cublas_takes_scales_of_every_width(outputs: int, width: int):
    """By PyTorch's own rules; also of scales that are a part of others."""
    from millrace.kernels.gpu.gemm.fp8 import cublas_matmul

    def empty(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    blocks = empty(outputs // 128, 2 * width // 128, dtype=torch.float32)
    for tokens in (1, 4, 9):
        scales = empty(width // 128, -(-tokens // 4) * 4, dtype=torch.float32).t()[:tokens]
        x = Quantized(empty(tokens, width), scales)
        for part in (blocks[:, : width // 128].contiguous(), blocks[:, width // 128 :]):
            out = cublas_matmul(x, empty(outputs, width), part)
            assert (out.shape, out.dtype) == ((tokens, outputs), BF16)


@on_each_device
@pytest.mark.parametrize("shape", [(128, 128), (640, 384), (200, 300), (128, 100), (100, 128)])
@pytest.mark.parametrize("tokens", [1, 9, 17, 65])
def test_triton(device: str, tokens: int, shape: tuple[int, int]):
    from millrace.kernels.gpu.gemm.fp8 import triton_matmul

    torch.manual_seed(tokens)
    x, (weight, scale) = some_tokens(tokens, shape[1], device), some_weight(*shape, device)
    want = exact(x, weight, scale)
    if device == "cpu":
        x, weight = Quantized(x.values.float(), x.scales), weight.float()
    assert relative(triton_matmul(x, weight, scale, torch.float32), want) < 1e-3


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("installed", INSTALLED)
def test_every_shape_on_a_gpu(monkeypatch: pytest.MonkeyPatch, installed: str):
    """`all` is what is installed there; twin of `test_every_shape`."""
    leave_out(installed, monkeypatch)
    torch.manual_seed(2)
    for shape in COMPILED if installed == "all" else SHAPES + LARGE:
        for tokens in (3, 9, 130, 1030) if installed == "all" else (*TOKENS, 256, 513, 1030):
            check(tokens, *shape, "cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", ["cublas_matmul", "deep_gemm_matmul"])
def test_a_library_on_a_gpu(name: str):
    """Whatever the choice between them is: any number of tokens, any multiple of 128."""
    from millrace.common.optional import probe
    from millrace.kernels.gpu.device import gpu
    from millrace.kernels.gpu.gemm import fp8

    cublas = name == "cublas_matmul"
    if not gpu().is_hopper or not (cublas or probe("deep_gemm").module):
        pytest.skip(f"{name} needs Hopper and its library")
    torch.manual_seed(3)
    for shape in SHAPES + LARGE if cublas else COMPILED:
        if shape[0] % 128 or shape[1] % 128:
            continue
        weight, scale = some_weight(*shape, "cuda")
        for tokens in TOKENS if cublas else (1, 9, 130):
            x = some_tokens(tokens, shape[1], "cuda")
            got = getattr(fp8, name)(x, weight, scale)
            assert relative(got, exact(x, weight, scale)) < CLOSE, (shape, tokens)
