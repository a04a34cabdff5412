"""The real kernels' ways: each is right, and what was measured is what runs from then on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from millrace.kernels import dispatch
from tests.kernels.gpu.gpu_support import HAS_TRITON, INTERPRETED

if not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or Triton and TRITON_INTERPRET=1", allow_module_level=True)

from millrace.kernels.gpu import tables
from millrace.kernels.gpu.attention import decode
from millrace.kernels.gpu.device import Gpu, device_name
from millrace.kernels.gpu.gemm import fp8, w4
from millrace.model.formats.fp8_block import Fp8Block
from millrace.runtime.kernel_tuning import products
from millrace.runtime.kernel_tuning.attention import DecodeAttention, Load
from millrace.runtime.kernel_tuning.choice import Meter, Section, lines_of, relative
from millrace.runtime.kernel_tuning.meters import by_clock, by_time
from millrace.runtime.kernel_tuning.model import Request, random_w4, sections_of
from millrace.runtime.kernel_tuning.products import Fp8Tiles, W4Products

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else []
TOKENS = (16, 40)
MODELS = Path(__file__).parents[3] / "models"
NO_HOPPER = Gpu("some GPU", (8, 9), 80)


def sections() -> list[Section]:
    def make(shape: tables.Shape) -> w4.W4:
        return random_w4(shape, zeros=True, floats=False)

    loads = Load(1, 64), Load(1, 200)
    return [
        Fp8Tiles([(128, 256)], TOKENS),
        W4Products([(128, 256, 64)], make, TOKENS),
        DecodeAttention([(2, 16, 1, 2), (2, 16, 2, 1)], 2, 16, loads),
    ]


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(tables.DIRECTORY, str(tmp_path))
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.mark.parametrize("number", range(3))
def test_every_way_is_right(number: int) -> None:
    section = sections()[number]
    for shape in section.shapes():
        problem_of = section.prepare(shape)
        for size in section.sizes(shape):
            problem = problem_of(size)
            for way in section.ways(shape, size):
                out = problem.runs(way)[0]()
                assert relative(out, problem.reference) <= problem.tolerance, (shape, size, way)


def test_what_was_measured_is_what_runs() -> None:
    """The meter prefers the last way; afterwards the ops take that one, and no other."""
    meter: Meter = lambda runs: {way: 1.0 / n for n, way in enumerate(runs, start=1)}  # noqa: E731
    last = {}
    for section in sections():
        for shape in section.shapes():
            lines = lines_of(section, shape, meter)
            last[section.name, shape] = section.ways(shape, section.sizes(shape)[0])[-1]
            tables.write(tables.own_path(device_name()), {}, {section.name: {shape: lines}})
    dispatch.forget()
    assert fp8.tiles_for(16, 128, 256) == last["fp8_tiles", (128, 256)]
    assert w4.way_for(16, 128, 256, 64) is None
    assert last["w4_products", (128, 256, 64)] == w4.TORCH
    taken = decode.blocks_for((2, 16, 1, 2), split=True, pairs=False)
    assert taken == last["decode_attention", (2, 16, 1, 2, 1)]
    assert fp8.tiles_for(16, 128, 512) == fp8.tile_rule(16)


def test_costs_come_from_the_device_that_runs_the_kernels() -> None:
    meter = by_time() if torch.cuda.is_available() else by_clock
    section = sections()[2]
    shape = section.shapes()[0]
    costs = meter({way: section.prepare(shape)(1).runs(way) for way in section.ways(shape, 1)[:2]})
    assert len(costs) == 2
    assert all(0 < cost < 10 for cost in costs.values())


@pytest.mark.parametrize(
    ("model", "name", "count"), [("mini-fp8", "fp8_tiles", 4), ("mini-int4", "w4_products", 4)]
)
def test_a_model_says_its_shapes(
    model: str, name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights are read. Shapes that are no whole groups of 128 are our own kernel's."""
    monkeypatch.setattr(Fp8Block, "is_fast_on", lambda *_: True)
    monkeypatch.setattr("millrace.runtime.kernel_tuning.model.gpu", lambda: NO_HOPPER)
    request = Request(1, (1, 3), 1, 16)
    found = {one.name: one for one in sections_of(MODELS / f"millrace-{model}", request)}
    assert len(found[name].shapes()) >= count
    assert len(found["decode_attention"].shapes()) == 4


def test_copies_of_a_weight_do_not_fit_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert products._copies(4 << 20) * (4 << 20) >= products.CACHE
    assert products._copies(1 << 30) == 1
