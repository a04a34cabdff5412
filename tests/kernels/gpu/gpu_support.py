"""What the tests of the GPU ops share: where they run, and how results are compared.

On a GPU they run compiled (marker `gpu`). Elsewhere the same kernels run in Triton's interpreter
when Triton is installed and TRITON_INTERPRET=1 is set; otherwise they are skipped.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

on_each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device"
                ),
            ],
        ),
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(
                not (HAS_TRITON and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1"
            ),
        ),
    ],
)


SMS = 132  # multiprocessors of an H200


class StandIn(NamedTuple):
    """What `probe` says of DeepGEMM: the library, or None."""

    module: object


def pretend(monkeypatch: pytest.MonkeyPatch, name: str = "NVIDIA H200", **changes: Any) -> None:
    """Let the choice of kernels see a Hopper GPU. changes: of `Gpu`'s fields."""
    from millrace.kernels import dispatch
    from millrace.kernels.gpu import device, moe
    from millrace.kernels.gpu.gemm import clusters, few, fp8, grouped
    from millrace.kernels.gpu.moe import few as few_experts

    fields = {"capability": (9, 0), "multiprocessors": SMS, **changes}
    found = device.Gpu(name, **fields)
    for module in (clusters, few, fp8, grouped, moe, few_experts):
        monkeypatch.setattr(module, "gpu", lambda: found)
    dispatch.forget()


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; infinite where one holds a NaN and the other does not."""
    got, want = got.double(), want.double()
    if got.shape != want.shape or bool((got.isnan() != want.isnan()).any()):
        return float("inf")
    got, want = got.nan_to_num(), want.nan_to_num()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()
