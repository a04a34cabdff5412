"""Children that compile DeepGEMM's kernels: all of them once, and none left whatever happens.

DeepGEMM itself is a stand-in that notes which products its caller asked for, and that fails, hangs
or has a compiler hang where FAKE_WAY says so. The children are real, on the CPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from millrace.common.optional import probe
from tests.kernels.gpu.gpu_support import HAS_TRITON, INTERPRETED, StandIn, pretend
from tests.support.child_environment import python_path

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="children import kernels in Triton"),
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
]

from millrace.kernels.gpu.gemm import prebuild  # noqa: E402
from millrace.kernels.gpu.gemm.tiling import kernel_of  # noqa: E402

LIMIT = 60.0  # seconds for what takes some of them on a quiet machine
PRODUCTS = [prebuild.Product(128, 256, n, 120 + n % 3) for n in range(9, 200)]
GROUPED = [
    (256, 128, 640, 3, 128),
    (128, 256, 384, 3, 128),
    (256, 128, 256, 3, 128),
    (256, 128, 64, 3, 64),
]
FAKE = '''
import os, subprocess, time

def set_num_sms(count):
    global multiprocessors
    multiprocessors = count

def fp8_gemm_nt(x, weight, out):
    """Note the sizes and this process; x's scales must lie as a product's on a GPU do."""
    (tokens, inputs), outputs = x[0].shape, len(weight[0])
    assert x[1].stride() == (1, -(-tokens // 4) * 4) and out.shape == (tokens, outputs)
    note = open(os.environ["FAKE_NOTES"], "a")
    way = os.environ["FAKE_WAY"]
    if way == "fail" and tokens == 100:
        raise RuntimeError("no compiler today")
    if way == "hang":
        compiler = subprocess.Popen(["sleep", "600"])
        note.write(f"{os.getpid()} {compiler.pid}\\n")
        note.close()
        time.sleep(600)
    note.write(f"{outputs} {inputs} {tokens} {multiprocessors} 0 0\\n")
    note.close()

def set_mk_alignment_for_contiguous_layout(rows):
    global tile
    tile = rows

def m_grouped_fp8_gemm_nt_contiguous(x, weight, out, groups):
    """The same; the scales lie row by row of experts, and no row has one."""
    (rows, inputs), (experts, outputs, _) = x[0].shape, weight[0].shape
    assert weight[1].shape == (experts, outputs // 128, inputs // 128) and groups.max() < 0
    assert x[1].stride() == (1, rows) and out.shape == (rows, outputs) and len(groups) == rows
    with open(os.environ["FAKE_NOTES"], "a") as note:
        note.write(f"{outputs} {inputs} {rows} {multiprocessors} {experts} {tile}\\n")
'''


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in writes; children find it as the module deep_gemm."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/deep_gemm.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path / "fake"))
    monkeypatch.setenv("FAKE_NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("FAKE_WAY", "well")
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "notes"


@contextlib.contextmanager
def started(count: int, products: list[prebuild.Product] = PRODUCTS) -> Iterator[prebuild.Children]:
    children = prebuild.start(products, "cpu", count, prebuild.marker_of(products, None))
    assert children is not None
    try:
        yield children
    finally:
        children.close()


def numbers(notes: Path) -> list[tuple[int, ...]]:
    lines = notes.read_text().splitlines() if notes.exists() else []
    return [tuple(map(int, line.split())) for line in lines]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_every_product_once_and_never_again(notes: Path) -> None:
    with started(2) as children:
        children.finish(LIMIT)
        assert [process.returncode for process in children.processes] == [0, 0]
    assert sorted(numbers(notes)) == PRODUCTS
    marker = prebuild.marker_of(PRODUCTS, None)
    assert marker.is_relative_to(os.environ["DG_JIT_CACHE_DIR"])
    assert marker.read_text()
    assert prebuild.start(PRODUCTS, "cpu", 2, marker) is None
    assert prebuild.marker_of(PRODUCTS, None) == prebuild.marker_of(PRODUCTS[::-1], None)
    assert prebuild.marker_of(PRODUCTS, None) != prebuild.marker_of(PRODUCTS, "another GPU")
    assert prebuild.marker_of(PRODUCTS, None) != prebuild.marker_of(PRODUCTS[1:], None)


def test_products_of_experts_come_first(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each shape the one with the most rows; children compile them like the others."""
    pretend(monkeypatch)
    found = prebuild.grouped_products(GROUPED)
    sizes = [(one.outputs, one.tokens, one.tile) for one in found]
    assert sizes == [(256, 640, 128), (256, 64, 64), (128, 384, 128), (256, 256, 128)]
    both = prebuild.one_of_each_kernel_first([*PRODUCTS, *found])
    assert both[:4] == found
    assert sorted(both[4:]) == PRODUCTS
    assert prebuild.tensor_bytes(found) > prebuild.tensor_bytes([found[1]])
    with started(1, found) as children:
        children.finish(LIMIT)
    assert numbers(notes) == [tuple(one) for one in found]


def test_a_failure_is_a_warning_and_the_next_start_tries_again(
    notes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_WAY", "fail")
    with started(1) as children:
        children.finish(LIMIT)
    assert "1 failed, 0 took too long" in caplog.text
    assert "no compiler today" in caplog.text
    assert not prebuild.marker_of(PRODUCTS, None).read_text()
    with started(1) as children:  # nobody holds the lock any more
        children.processes[0].kill()
        children.finish(LIMIT)
    assert "1 failed" in caplog.records[-1].message


def test_what_hangs_is_ended_with_its_compiler(
    notes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_WAY", "hang")
    with started(1) as children:
        assert prebuild.start(PRODUCTS, "cpu", 1, prebuild.marker_of(PRODUCTS, None)) is None
        wait_until(lambda: len(numbers(notes)) == 1)
        children.finish(0.05)
        assert "0 failed, 1 took too long" in caplog.text
        wait_until(lambda: all(is_gone(pid) for pid in numbers(notes)[0]))


def test_children_die_with_their_parent(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WAY", "hang")
    program = (
        "import time; from pathlib import Path; from millrace.kernels.gpu.gemm import prebuild\n"
        "one = prebuild.Product(128, 128, 9, 132)\n"
        f"a = prebuild.start([one], 'cpu', 1, Path({str(notes)!r} + '.marker'))\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until(lambda: len(numbers(notes)) == 1)
    finally:
        parent.kill()
        parent.wait()
    child, compiler = numbers(notes)[0]
    try:
        wait_until(lambda: is_gone(child))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(compiler, signal.SIGKILL)  # a real one ends by itself


def test_a_start_goes_on_without_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where they cannot be started or are not needed, and when it fails itself beside them."""

    def broken(sizes: object) -> list[prebuild.Product]:
        raise AssertionError("no compiler was found")  # what importing the library may do

    done = []
    monkeypatch.setattr(prebuild, "deep_gemm_products", broken)
    with prebuild.compiling([(128, 128, 64)]):
        done.append(1)
    monkeypatch.setattr(prebuild, "deep_gemm_products", lambda sizes: [])
    with caplog.at_level(logging.WARNING), prebuild.compiling([]):
        done.append(2)
    assert done == [1, 2]
    assert "not all compiled ahead" in caplog.text
    calls: list[str] = []
    children = SimpleNamespace(
        finish=lambda limit: calls.append("finish"), close=lambda: calls.append("close")
    )
    one = prebuild.Product(1, 1, 1, 0)
    monkeypatch.setattr(prebuild, "deep_gemm_products", lambda sizes: [one])
    monkeypatch.setattr(prebuild, "on_this_gpu", lambda products: children)
    with prebuild.compiling([]):
        pass
    with contextlib.suppress(KeyError), prebuild.compiling([]):
        raise KeyError
    assert calls == ["finish", "close", "close"]


def test_no_more_children_than_memory_and_cores_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    large = [prebuild.Product(34816, 5120, 16384, 0), *PRODUCTS]
    assert 1 << 30 < prebuild.tensor_bytes(large) < 2 << 30
    assert prebuild.how_many(large, 140 << 30) == prebuild.MOST
    assert prebuild.how_many(large, 30 << 30) == 4
    assert prebuild.how_many(large, 4 << 30) == 0
    assert prebuild.how_many(PRODUCTS[:2], 140 << 30) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert prebuild.how_many(large, 140 << 30) == 0
    assert prebuild.start(large, "cpu", 0, tmp_path / "marker") is None
    assert "no core" in caplog.text
    caplog.clear()
    (tmp_path / "marker").write_text("complete")
    assert prebuild.start(large, "cpu", 0, tmp_path / "marker") is None
    assert not caplog.text


def test_what_is_asked_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its free memory, its number and what kernels on it depend on."""
    asked: list[Any] = []
    free = [140 << 30]
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(__version__="1"))
    probe.cache_clear()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 141 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(prebuild, "start", lambda *given: asked.append(given))
    prebuild.on_this_gpu(PRODUCTS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    prebuild.on_this_gpu(PRODUCTS)
    monkeypatch.setenv("DG_JIT_USE_NVRTC", "1")
    prebuild.on_this_gpu(PRODUCTS)
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(__version__="2"))
    probe.cache_clear()
    prebuild.on_this_gpu(PRODUCTS)
    assert [given[:3] for given in asked] == 4 * [(PRODUCTS, "cuda:3", prebuild.MOST)]
    markers = [given[3] for given in asked]
    assert markers[0] == markers[1]
    assert len(set(markers)) == 3
    free[0] = prebuild.LEAST_FREE - 1
    prebuild.on_this_gpu(PRODUCTS)
    assert asked[4][2] == 0
    probe.cache_clear()


@pytest.mark.gpu
def test_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kernels are in the cache, GPU memory is as free as before, and a second start has no work."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("DeepGEMM is used on Hopper alone")
    if problem := probe("deep_gemm").problem:
        pytest.skip(problem)
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path))
    sizes = list(product([2048, 5120], [5120, 6144], [16, 64, 4096]))
    free, _ = torch.cuda.mem_get_info()
    with prebuild.compiling(sizes):
        (marker,) = (tmp_path / "millrace").iterdir()
    assert not caplog.records
    assert marker.read_text()
    kernels = set((tmp_path / "cache").glob("kernel.*"))
    cores = torch.cuda.get_device_properties().multi_processor_count
    foretold = {
        kernel_of(tokens, outputs, inputs, some or cores)
        for outputs, inputs, tokens, some, *_ in prebuild.deep_gemm_products(sizes)
    }
    assert len(kernels) == len(foretold)
    assert torch.cuda.mem_get_info()[0] > free - (256 << 20)
    monkeypatch.setattr(prebuild, "Children", None)  # nobody may ask for them
    with prebuild.compiling(sizes):
        pass
    assert not caplog.records
    for one in prebuild.deep_gemm_products(sizes):
        prebuild.multiply_nothing(one, torch.device("cuda"))
    assert set((tmp_path / "cache").glob("kernel.*")) == kernels


@pytest.mark.parametrize("installed", [True, False])
def test_products_are_those_that_go_to_deep_gemm(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """`deep_gemm_way` says what `fp8_matmul` does, and each product is there once."""
    from millrace.kernels.gpu.gemm import fp8

    taken: list[tuple[str, Any]] = []

    def way(name: str) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            taken.append((name, given[-1]))
            return name

        return run

    pretend(monkeypatch)
    library = SimpleNamespace() if installed else None
    monkeypatch.setattr(fp8, "probe", lambda _: StandIn(library))
    for name in ("triton_matmul", "few_matmul", "cublas_matmul", "deep_gemm_matmul"):
        monkeypatch.setattr(fp8, name, way(name))
    shapes = [(5120, 6144), (14336, 5120), (34816, 5120), (100, 128), (128, 100)]
    counts = [1, 8, 9, 64, 128, 129, 384, 385, 640, 641, 16384, 64]
    wanted = set()
    for shape in shapes:
        weight = torch.empty(shape, device="meta")
        scale = torch.empty(1, device="meta")
        for tokens in counts:
            x: Any = SimpleNamespace(values=range(tokens))
            fp8.fp8_matmul(x, weight, scale, torch.bfloat16)
            name, last = taken.pop()
            if name == "deep_gemm_matmul":
                wanted.add(prebuild.Product(*shape, tokens, last))
    found = prebuild.deep_gemm_products([(*shape, n) for shape in shapes for n in counts])
    assert len(found) == len(set(found))
    assert set(found) == wanted
    ordered = prebuild.one_of_each_kernel_first(found)
    assert sorted(ordered) == sorted(found)
    kernels = [kernel_of(n, o, i, some or 132) for o, i, n, some, *_ in ordered]
    distinct = len(set(kernels))
    assert len(set(kernels[:distinct])) == distinct  # one of each comes first
    if installed:
        assert kernels.count(kernels[0]) == max(map(kernels.count, kernels)) > 2
    assert bool(wanted) == installed
