"""Launches of CUDA kernels: what the driver is given. The driver is a stand-in."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.gpu.gpu_support import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="the package imports Triton")

from millrace.kernels.gpu import cuda_source  # noqa: E402


def test_structures_lie_as_the_driver_reads_them() -> None:
    config, attribute = cuda_source._Config, cuda_source._Attribute
    assert (ctypes.sizeof(config), ctypes.sizeof(attribute)) == (56, 72)
    places = (config.block, config.shared_bytes, config.stream, config.attributes)
    assert [place.offset for place in places] == [12, 24, 32, 40]
    assert (config.num_attributes.offset, attribute.value.offset) == (48, 8)


@pytest.mark.parametrize("early", [False, True])
def test_a_launch(monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    """Grid, block, stream, pointers and numbers, negative ones too; a refusal is an error."""
    seen: list[Any] = []
    answer = 0

    def launch(config: Any, function: ctypes.c_void_p, pointers: Any, extra: None) -> int:
        found = config._obj
        attributes = [
            (one.id, one.value[0]) for one in found.attributes[: found.num_attributes]
        ] if found.num_attributes else []  # fmt: skip
        tensor = ctypes.c_uint64.from_address(pointers[0]).value
        numbers = [ctypes.c_int.from_address(at).value for at in list(pointers)[1:]]
        seen.append((list(found.grid), list(found.block), found.shared_bytes, found.stream,
                     function.value, tensor, numbers, attributes))  # fmt: skip
        return answer

    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(
        cuda_source, "cuda_driver", lambda: SimpleNamespace(cuLaunchKernelEx=launch)
    )
    x = torch.zeros(4)
    monkeypatch.setattr(cuda_source, "DIRECT_LAUNCHES", True)
    kernel = cuda_source.CudaKernel(SimpleNamespace(func=ctypes.c_void_p(123)))
    kernel(grid=(5, 6, 1), block=(64, 1, 1), args=[x, 9, -3], early=early)
    attributes = [(6, 1)] if early else []
    assert seen == [([5, 6, 1], [64, 1, 1], 0, 77, 123, x.data_ptr(), [9, -3], attributes)]
    answer = 1
    with pytest.raises(RuntimeError, match="CUDA driver error 1"):
        kernel(grid=(1, 1, 1), block=(32, 1, 1), args=[x])


def test_pytorch_may_launch_what_is_not_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_source, "DIRECT_LAUNCHES", False)
    seen: list[dict[str, Any]] = []
    kernel = cuda_source.CudaKernel(lambda **given: seen.append(given))
    kernel(grid=(5, 6, 1), block=(64, 1, 1), args=[9])
    assert seen == [{"grid": (5, 6, 1), "block": (64, 1, 1), "args": [9]}]
