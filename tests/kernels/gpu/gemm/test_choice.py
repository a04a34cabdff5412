"""Which library multiplies FP8: the tables that ship, and the rule beside them."""

import json
from importlib import resources

import pytest

from millrace.kernels.gpu.gemm.choice import CUBLAS, DEEP_GEMM, GemmBackend, choose
from tests.kernels.gpu.gpu_support import HAS_TRITON, StandIn, pretend

MEASURED = resources.files("millrace.kernels.gpu").joinpath("measured")
TABLES = sorted(file.name for file in MEASURED.iterdir() if file.name.endswith(".json"))


def test_a_way_from_text() -> None:
    assert GemmBackend.parse("cublas") == CUBLAS
    assert GemmBackend.parse("deep_gemm") == DEEP_GEMM
    assert GemmBackend.parse("deep_gemm:124") == GemmBackend("deep_gemm", 124)
    with pytest.raises(ValueError, match="cutlass"):
        GemmBackend.parse("cutlass:3")


@pytest.mark.parametrize(
    ("tokens", "outputs", "way"),
    [
        (64, 16384, DEEP_GEMM),
        (256, 16384, CUBLAS),
        (256, 5120, DEEP_GEMM),
        (512, 34816, CUBLAS),
        (512, 16384, DEEP_GEMM),
        (8192, 34816, DEEP_GEMM),
    ],
)
def test_the_rule_where_nothing_was_measured(tokens: int, outputs: int, way: GemmBackend) -> None:
    assert choose(tokens, outputs, 5120, "some other GPU") == way


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_whole(name: str) -> None:
    """Bounds ascend, ways can be read, and each holds for counts up to its own bound alone."""
    table = json.loads(MEASURED.joinpath(name).read_text())
    device = name.removesuffix(".json").replace("_", " ")
    assert table["device"] == device
    for shape, lines in table["fp8_products"].items():
        outputs, width = map(int, shape.split("x"))
        bounds = [bound for bound, _ in lines]
        assert bounds == sorted(set(bounds))
        for low, (bound, way) in zip([8, *bounds], lines, strict=False):
            for tokens in (low + 1, bound):
                assert choose(tokens, outputs, width, device) == GemmBackend.parse(way)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(("there", "taken"), [(132, 124), (124, 124), (66, 0)])
def test_a_part_of_a_gpu_gives_no_more_multiprocessors_than_it_has(
    monkeypatch: pytest.MonkeyPatch, there: int, taken: int
) -> None:
    from millrace.kernels.gpu.gemm import fp8

    pretend(monkeypatch, "a GPU", multiprocessors=there)
    monkeypatch.setattr(fp8, "probe", lambda _: StandIn(fp8))
    monkeypatch.setattr(fp8, "choose", lambda *_: GemmBackend("deep_gemm", 124))
    assert fp8.deep_gemm_way(512, 5120, 5120) == GemmBackend("deep_gemm", taken)


def test_the_h200_has_a_table() -> None:
    assert "NVIDIA_H200.json" in TABLES
