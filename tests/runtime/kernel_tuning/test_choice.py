"""How ways are chosen by what they cost: wrong ones never, dearer ones never, close ones not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from millrace.errors import ConfigError
from millrace.kernels.gpu.tables import ANY_SIZE, Shape, Way
from millrace.runtime.kernel_tuning.choice import (
    GAIN,
    Costs,
    Problem,
    Run,
    cheapest,
    lines_of,
    merged,
)

SIZES = (16, 64, 256, 1024)
REFERENCE = torch.arange(1.0, 9.0).view(4, 2)


def _raises() -> Tensor:
    raise RuntimeError("no such tiles\non this device")


CALLS: dict[Way, Run] = {
    "rule": lambda: REFERENCE,
    "fast": lambda: REFERENCE * 1.001,
    "wrong": lambda: REFERENCE * 1.5,
    "nan": lambda: REFERENCE * float("nan"),
    "raises": _raises,
}


class _Section:
    name = "some"

    def __init__(self, ways: Sequence[Way]) -> None:
        self._ways = list(ways)

    def shapes(self) -> Sequence[Shape]:
        return [(4, 2)]

    def sizes(self, shape: Shape) -> Sequence[int]:
        return SIZES

    def ways(self, shape: Shape, size: int) -> list[Way]:
        return self._ways

    def prepare(self, shape: Shape) -> Callable[[int], Problem]:
        return lambda size: Problem(lambda way: [CALLS[way]], REFERENCE, 1e-2)


def meter(runs: Mapping[Way, Sequence[Run]]) -> Costs:
    """All that is wrong would be free."""
    return {way: {"rule": 1.0, "fast": 0.5}.get(str(way), 0.0) for way in runs}


def test_what_is_wrong_is_never_taken(caplog: pytest.LogCaptureFixture) -> None:
    assert lines_of(_Section(list(CALLS)), (4, 2), meter) == ((1024, "fast"),)
    left_out = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(left_out) == 3 * len(SIZES)
    assert any("RuntimeError: no such tiles" in line for line in left_out)


@pytest.mark.parametrize("default", ["wrong", "nan", "raises"])
def test_a_rule_that_fails_is_an_error(default: Way) -> None:
    with pytest.raises(ConfigError, match="taken by default, and fails"):
        lines_of(_Section([default, "fast"]), (4, 2), meter)


@given(st.dictionaries(st.integers(0, 5), st.floats(0.5, 1.0), min_size=1))
def test_the_rule_stays_unless_another_is_clearly_cheaper(costs: dict[int, float]) -> None:
    by_way: Costs = {(number,): cost for number, cost in costs.items()}
    default = next(iter(by_way))
    taken = cheapest(by_way, default)
    assert by_way[taken] <= by_way[default]
    if taken != default:
        assert by_way[taken] == min(by_way.values()) < GAIN * by_way[default]
    else:
        assert min(by_way.values()) >= GAIN * by_way[default]


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=12))
def test_merged_lines_say_the_same(ways: list[str]) -> None:
    whole = [(10 * number, way) for number, way in enumerate(ways, start=1)]
    short = merged(whole)
    for size, way in whole:
        assert next(w for most, w in short if most >= size) == way
    assert all(a[1] != b[1] for a, b in itertools.pairwise(short))


def test_a_single_size_stands_for_all() -> None:
    assert merged([(1, "a")]) == ((ANY_SIZE, "a"),)
