"""The report of backends: which run, and why faster ones do not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from millrace.kernels import dispatch
from tests.kernels.gpu.gpu_support import HAS_TRITON, pretend

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

Replace = Callable[[str, str | None], None]
BROKEN = "raise ImportError('libtvm_ffi.so: undefined symbol')"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as an H200 that compiles what it is asked to."""
    from millrace.kernels.gpu import cuda_source

    pretend(monkeypatch)
    monkeypatch.setattr(cuda_source, "compiled", lambda text, name: print)
    yield
    dispatch.forget()


def shape(tokens: int = 2, dim: int = 128) -> object:
    from millrace.kernels.gpu.gdn.decode import Shape

    return Shape(tokens, 16, dim, dim, 3, *(True,) * 6)


def logged(
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    gdn: object = None,
    fp8: Sequence[tuple[int, int]] = ((5120, 6144),),
) -> list[tuple[int, str]]:
    from millrace.runtime import kernel_report

    caplog.clear()
    with caplog.at_level(logging.INFO, "millrace.kernels"):
        kernel_report.log_backends(kernel_report.backends(dtype, fp8, gdn))  # type: ignore[arg-type]
    return [(record.levelno, record.message) for record in caplog.records]


def test_deep_gemm_that_can_be_imported(
    hopper: None, replace_package: Replace, caplog: pytest.LogCaptureFixture
) -> None:
    replace_package("deep_gemm", "__version__ = '0.1.3'")
    few, many, gdn, others = logged(caplog, torch.bfloat16, shape())
    assert few == (logging.INFO, "FP8 GEMM, 8 tokens or less: CUDA kernel")
    said = "FP8 GEMM: DeepGEMM 0.1.3 or cuBLAS, by what was measured on NVIDIA H200"
    assert many == (logging.INFO, said)
    assert gdn == (logging.INFO, "GDN decode: CUDA kernels")
    assert others[1].startswith("other ops: Triton 3.")
    assert "PyTorch for gemm.linear" in others[1]


@pytest.mark.parametrize(("source", "reason", "remedy"), [
    (None, "DeepGEMM is not installed", "pip install 'millrace[gpu]'"),
    (BROKEN, "cannot be imported (ImportError: libtvm_ffi.so: undefined symbol)", "tvm-ffi==0.1.9"),
])  # fmt: skip
def test_deep_gemm_that_cannot(
    hopper: None, replace_package: Replace, caplog: pytest.LogCaptureFixture,
    source: str | None, reason: str, remedy: str,
) -> None:  # fmt: skip
    from millrace.kernels.gpu.gemm.fp8 import deep_gemm_way

    replace_package("deep_gemm", source)
    level, line = logged(caplog, torch.bfloat16)[1]
    assert level == logging.WARNING
    assert line.startswith("FP8 GEMM: cuBLAS; ")
    assert reason in line
    assert remedy in line
    assert "\n" not in line
    assert deep_gemm_way(512, 5120, 5120) is None


def test_a_gpu_on_which_nothing_was_measured(
    hopper: None,
    replace_package: Replace,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace_package("deep_gemm", "__version__ = '0.1.3'")
    pretend(monkeypatch, "NVIDIA GH200")
    assert (
        "by a rule, until `millrace tune kernels MODEL` has measured this GPU"
        in logged(caplog, torch.bfloat16)[1][1]
    )


def test_other_gpus_and_dtypes_use_triton(
    hopper: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not on NVIDIA H200 in torch.float32" in logged(caplog, torch.float32)[0][1]
    pretend(monkeypatch, capability=(8, 9))
    level, line = logged(caplog, torch.bfloat16)[0]
    assert line.startswith("FP8 GEMM: Triton kernel; DeepGEMM and cuBLAS do it on Hopper")
    assert level == logging.INFO


def test_no_compiler_for_cuda(
    hopper: None,
    replace_package: Replace,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from millrace.kernels.gpu import cuda_source
    from millrace.kernels.gpu.gemm import fp8 as gemm

    replace_package("deep_gemm", "__version__ = '0.1.3'")
    monkeypatch.setattr(gemm.gemm_few, "is_compiled", lambda: False)
    monkeypatch.setattr(cuda_source, "compiled", lambda text, name: None)
    few, _, gdn, _ = logged(caplog, torch.bfloat16, shape(3))
    assert few[1].endswith("cuBLAS, by what was measured on NVIDIA H200; the CUDA kernel cannot "
                           "be compiled here")  # fmt: skip
    assert gdn[1] == "GDN decode: Triton kernels; no CUDA kernels: they cannot be compiled here"


@pytest.mark.parametrize(("gdn", "reason"), [
    ((9, 128), "a row has 9 tokens, more than 8"),
    ((2, 100), "heads of 100 and 100 channels are no multiples of 32"),
    ((2, 1024), "a key head and its value heads need 1280 threads, more than a block has"),
])  # fmt: skip
def test_a_shape_without_cuda_kernels(
    hopper: None, caplog: pytest.LogCaptureFixture, gdn: tuple[int, int], reason: str
) -> None:
    line = logged(caplog, torch.bfloat16, shape(*gdn), ())[0][1]
    assert line == f"GDN decode: Triton kernels; no CUDA kernels: {reason}"


def test_a_pytorch_without_a_compiler_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from millrace.kernels.gpu import cuda_source

    monkeypatch.delattr(torch.cuda, "_compile_kernel", raising=False)
    assert cuda_source.compiled("", "gdn_answer") is None
    assert "gdn_answer cannot be compiled" in caplog.text


def test_weights_of_odd_shapes_use_triton(hopper: None, caplog: pytest.LogCaptureFixture) -> None:
    lines = logged(caplog, torch.bfloat16, fp8=[(5120, 6144), (200, 128), (128, 300)])
    assert lines[2][1] == (
        "FP8 GEMM, 128x300, 200x128: Triton kernel; other backends need multiples of 128"
    )


def test_tensors_that_the_cuda_kernels_do_not_take(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from millrace.kernels.batch import GDNState
    from millrace.kernels.gpu.gdn import decode

    dispatch.forget()
    empty = torch.empty
    cache = GDNState(empty(1, 1, 32, 32), empty(1, 1, 4, 32), empty(0), empty(0), empty(0))
    for _ in range(2):
        assert decode.native(empty(2, 99), empty(2, 1), True, cache, 1, None) is None
    half = empty(2, 96, dtype=torch.float16)
    assert decode.native(half, empty(2, 1), True, cache, 1, None) is None
    rows, kinds = caplog.records
    assert "rows of 99 channels are not aligned to 16 bytes" in rows.message
    assert "not torch.float16, torch.float32" in kinds.message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    """Every line is there, and says what this machine has."""
    from millrace.common.optional import probe

    lines = [line for _, line in logged(caplog, torch.bfloat16, shape())]
    assert [line.partition(":")[0] for line in lines][-2:] == ["GDN decode", "other ops"]
    if torch.cuda.get_device_capability()[0] == 9:
        assert lines[1].startswith("FP8 GEMM: ")
        assert ("DeepGEMM" in lines[1].partition(";")[0]) == (probe("deep_gemm").state == "there")


def test_experts_are_reported_by_the_number_of_tokens(
    hopper: None, replace_package: Replace
) -> None:
    from millrace.kernels.gpu import moe

    source = "__version__ = '0.1.3'\nm_grouped_fp8_gemm_nt_contiguous = print"
    replace_package("deep_gemm", source)
    said = [str(one) for one in moe.backends(torch.bfloat16, [(256, 2048, 512)])]
    assert said == [
        "experts, 64 tokens or less: CUDA kernel",
        "experts: Triton kernels; DeepGEMM 0.1.3 for 48 tokens of an expert or more",
    ]
    replace_package("deep_gemm", None)
    last = moe.backends(torch.bfloat16, [(256, 2048, 512)])[-1]
    assert str(last).startswith("experts: Triton kernels; DeepGEMM is not installed")
    assert last.remedy
    assert [str(one) for one in moe.backends(torch.float32, [])] == ["experts: Triton kernels"]
