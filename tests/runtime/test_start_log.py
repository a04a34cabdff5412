"""The log of a start about the ops that its model runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from millrace.config import EngineConfig
from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import ModelConfig, read_config
from millrace.model.tiny import TinyShape, write_checkpoint
from millrace.runtime.worker import log_backends
from tests.kernels.gpu.gpu_support import HAS_TRITON, pretend
from tests.support.engines import build

Started = tuple[EngineConfig, ModelConfig, CausalLM]


def fp8_model(tmp_path: Path, device: str, kept: bool) -> Started:
    """As a start on this device has them, the model on the CPU."""
    directory = write_checkpoint(tmp_path / "fp8", TinyShape(fp8=True))
    config = build(directory, dtype="float32").worker.config  # type: ignore[attr-defined]
    config = msgspec.structs.replace(config, device=device, dtype="bfloat16")
    model_config = read_config(directory)
    return (
        config,
        model_config,
        build_model(model_config, dtype=torch.bfloat16, keep_quantized=kept),
    )


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("source", ["raise ImportError('no tvm_ffi')", None])
def test_a_gpu_without_deep_gemm(
    tmp_path: Path,
    source: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    replace_package: Callable[[str, str | None], None],
) -> None:
    from millrace.kernels.gpu import cuda_source
    from millrace.kernels.gpu.gemm import fp8

    replace_package("deep_gemm", source)
    pretend(monkeypatch)
    monkeypatch.setattr(fp8.gemm_few, "is_compiled", lambda: True)
    monkeypatch.setattr(cuda_source, "compiled", lambda *_: None)
    with caplog.at_level(logging.INFO):
        log_backends(*fp8_model(tmp_path, "cuda", kept=True))
    lines = [record.message for record in caplog.records if record.name == "millrace.kernels"]
    assert [line.partition(":")[0] for line in lines] == [
        "FP8 GEMM, 8 tokens or less", "FP8 GEMM", "GDN decode", "other ops"
    ]  # fmt: skip
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("FP8 GEMM: cuBLAS; DeepGEMM is ")
    assert ("no tvm_ffi" in warning) == (source is not None)


def test_weights_that_a_cpu_widens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_backends(*fp8_model(tmp_path, "cpu", kept=False))
    assert "FP8 weights become bfloat16: a CPU has no FP8 GEMM" in caplog.text
