"""DeepGEMM's kernel in tilings of our own: what is compiled, kept, launched; and without it."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from millrace.common.optional import probe
from millrace.kernels import dispatch
from millrace.kernels.gpu import cuda_source
from millrace.kernels.gpu.gemm import clusters, fp8, prebuild
from millrace.kernels.gpu.gemm.choice import GemmBackend, choose
from millrace.kernels.gpu.gemm.clusters import Tiling
from tests.kernels.gpu.gemm.test_few import exact, some_tokens, some_weight
from tests.kernels.gpu.gpu_support import INTERPRETED, pretend, relative

USED = Tiling(128, 160, "weight")
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo release 13; exit; fi
echo x >> {folder}/calls
while [ "$1" != -o ]; do shift; done
printf '.text._Z6kernelv\\0' > $2
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a compiler, a library's headers and a cache, on what passes for an H200."""
    pretend(monkeypatch)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(NVCC.format(folder=tmp_path))
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "cache"))
    library = SimpleNamespace(module=SimpleNamespace(__file__=str(tmp_path / "x.py")), version="1")
    for user in (clusters, fp8):
        monkeypatch.setattr(user, "probe", lambda name: library)
    dispatch.forget()
    yield tmp_path
    dispatch.forget()


def test_a_tiling_from_text() -> None:
    assert Tiling.parse("128x160/weight") == USED
    assert str(USED) == "128x160/weight"
    assert (USED.swizzle, USED.stages, USED.multiplying) == (64, 5, 256)
    assert USED.shared_bytes(17408) == 40960 + 5 * (36864 + 512 + 16) + 1088
    with pytest.raises(ValueError, match="128x160/weight"):
        Tiling.parse("128x160")


def test_what_was_measured_is_taken() -> None:
    for inputs in (17408, 6144):
        way = choose(512, 5120, inputs, "NVIDIA H200")
        assert way == GemmBackend("deep_gemm", 0, "128x160/weight")
        assert str(way) == "deep_gemm@128x160/weight"
        assert GemmBackend.parse(str(way)) == way


def test_a_kernel_is_compiled_once(machine: Path) -> None:
    """By whoever is first; later processes find it."""
    clusters.prepare([USED, USED])
    first = clusters.cubin_of(USED)
    dispatch.forget()
    assert first is not None
    assert clusters.cubin_of(USED) == first
    assert (machine / "calls").read_text() == "x\n"
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_the_start_waits_for_it(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And DeepGEMM is not asked to compile what it will not multiply."""
    asked: list[Any] = []
    monkeypatch.setattr(prebuild, "on_this_gpu", asked.extend)
    with prebuild.compiling([(5120, 17408, 512), (5120, 17408, 256)]):
        pass
    assert [product[:3] for product in asked] == [(5120, 17408, 256)]
    assert (machine / "calls").read_text() == "x\n"
    assert len(list((machine / "cache" / "millrace-kernels").glob("*.cubin"))) == 1


@pytest.mark.parametrize("broken", ["no compiler", "compiler fails", "driver refuses"])
def test_without_a_kernel_the_library_decides(
    machine: Path, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if broken == "no compiler":
        monkeypatch.setattr(clusters, "compiler_path", lambda: None)
    elif broken == "compiler fails":
        script = machine / "bin" / "nvcc"
        script.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no such flag" >&2; exit 3; }')
    else:
        driver = SimpleNamespace(cuModuleLoadData=lambda *_: 209)
        monkeypatch.setattr(cuda_source, "cuda_driver", lambda: driver)
    taken: list[int] = []
    monkeypatch.setattr(fp8, "deep_gemm_matmul", lambda *given: taken.append(given[3]))
    way = GemmBackend("deep_gemm", 0, str(USED))
    monkeypatch.setattr(fp8, "choose", lambda *_: way)
    x, (weight, scale) = some_tokens(512, 256), some_weight(128, 256)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            fp8.fp8_matmul(x, weight, scale, torch.bfloat16)
    assert taken == [0, 0]
    (record,) = caplog.records
    assert "128x160/weight" in record.message


def test_a_launch(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of the operands, a cluster of two blocks, and all multiprocessors."""
    maps: list[Any] = []
    launches: list[Any] = []

    def encode(at: Any, kind: int, rank: int, base: Any, sizes: Any, strides: Any, box: Any,
               steps: Any, *options: int) -> int:  # fmt: skip
        assert at.value % 64 == 0
        maps.append((kind, base.value, list(sizes), list(strides), list(box), options[1]))
        return 0

    def launch(config: Any, function: Any, pointers: Any, extra: None) -> int:
        found = config._obj
        attributes = {one.id: list(one.value[:3]) for one in found.attributes[:1]}
        numbers = [ctypes.c_int64.from_address(pointers[i]).value for i in range(5)]
        launches.append((list(found.grid), list(found.block), found.shared_bytes, attributes,
                         found.num_attributes, numbers))  # fmt: skip
        return 0

    driver = SimpleNamespace(
        cuTensorMapEncodeTiled=encode, cuLaunchKernelEx=launch, cuModuleLoadData=lambda *_: 0,
        cuModuleGetFunction=lambda *_: 0, cuFuncSetAttribute=lambda *_: 0,
    )  # fmt: skip
    monkeypatch.setattr(cuda_source, "cuda_driver", lambda: driver)
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    x, (weight, scale) = some_tokens(509, 384), some_weight(256, 384)
    out = clusters.cluster_matmul(x, weight, scale, USED)
    assert out is not None
    assert out.shape == (509, 256)
    assert maps == [
        (0, x.values.data_ptr(), [384, 509], [384], [128, 128], 3),
        (7, x.scales.data_ptr(), [512, 3], [2048], [128, 1], 0),
        (9, out.data_ptr(), [256, 509], [512], [32, 128], 2),
        (0, weight.data_ptr(), [384, 256], [384], [128, 160], 3),
    ]
    assert launches == [
        ([132, 1, 1], [384, 1, 1], USED.shared_bytes(384), {4: [2, 1, 1]}, 1,
         [scale.data_ptr(), 0, 509, 256, 384])
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("tiling", [USED, Tiling(128, 160, "tokens")], ids=str)
@pytest.mark.parametrize("tokens", [449, 512, 700])
def test_on_a_gpu(tiling: Tiling, tokens: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0) or probe("deep_gemm").module is None:
        pytest.skip("needs Hopper and DeepGEMM")
    torch.manual_seed(tokens)
    x, (weight, scale) = some_tokens(tokens, 6144, "cuda"), some_weight(5120, 6144, "cuda")
    got = clusters.cluster_matmul(x, weight, scale, tiling)
    assert got is not None
    assert relative(got, exact(x, weight, scale)) < 3e-3
    assert torch.equal(got, clusters.cluster_matmul(x, weight, scale, tiling))
