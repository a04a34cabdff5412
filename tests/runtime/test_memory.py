"""Memory arithmetic: what fits is used, what does not is refused with the value that would."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import ConfigError
from millrace.runtime.memory import Costs, MemoryPlan, enough_memory, plan_memory

COSTS = Costs(page=1 << 20, slot=150 << 20, snapshot=154 << 20)


def plan(budget: int, **changes: Any) -> MemoryPlan:
    values: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_model_len": 2560,
        "page_size": 16,
        "pages_per_request": 161,
        "num_snapshots": None,
        "prefix_caching": True,
    }
    return plan_memory(budget, COSTS, **{**values, **changes})


@given(st.integers(2 << 30, 200 << 30), st.integers(1, 64), st.booleans())
def test_never_more_than_the_budget(budget: int, seqs: int, caching: bool) -> None:
    try:
        found = plan(budget, max_num_seqs=seqs, prefix_caching=caching)
    except ConfigError:
        assert (seqs + 1) * COSTS.slot + 162 * COSTS.page > budget
        return
    assert found.bytes <= budget
    assert found.num_pages > 161
    assert caching or found.num_snapshots == 0


def test_too_many_sequences_are_refused_with_the_number_that_fits() -> None:
    budget = 4 << 30
    with pytest.raises(ConfigError, match="max_num_seqs 64") as caught:
        plan(budget, max_num_seqs=64)
    fitting = int(re.findall(r"at most (\d+) fit", str(caught.value))[0])
    plan(budget, max_num_seqs=fitting)
    with pytest.raises(ConfigError):
        plan(budget, max_num_seqs=fitting + 1)


def test_too_long_a_sequence_is_refused_with_the_length_that_fits() -> None:
    def pages(length: int) -> dict[str, int]:
        return {"max_model_len": length, "pages_per_request": -(-(length + 2) // 16)}

    budget = 400 << 20
    with pytest.raises(ConfigError, match="max_model_len 2560") as caught:
        plan(budget, max_num_seqs=1, **pages(2560))
    fitting = int(re.findall(r"at most (\d+) fit", str(caught.value))[0])
    plan(budget, max_num_seqs=1, **pages(fitting))
    with pytest.raises(ConfigError):
        plan(budget, max_num_seqs=1, **pages(fitting + 32))


def test_too_little_for_anything_says_so() -> None:
    with pytest.raises(ConfigError, match="too little for a single sequence"):
        plan(10 << 20)


def test_snapshots_beyond_what_is_left_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_snapshots 100 .* at most \d+ fit"):
        plan(4 << 30, num_snapshots=100)


@given(st.integers(1, 64), st.integers(0, 64))
def test_enough_is_every_sequence_at_full_length(seqs: int, snapshots: int) -> None:
    enough = enough_memory(COSTS, max_num_seqs=seqs, pages_per_request=161, num_snapshots=snapshots)
    found = plan(enough, max_num_seqs=seqs, num_snapshots=snapshots)
    assert found == MemoryPlan(161 * seqs + 1, snapshots, enough)
    settled = enough_memory(COSTS, max_num_seqs=seqs, pages_per_request=161, num_snapshots=None)
    assert plan(settled, max_num_seqs=seqs).bytes <= settled


@given(st.integers(1, 64), st.booleans())
def test_without_snapshots_pages_get_the_rest(seqs: int, caching: bool) -> None:
    costs = Costs(page=1 << 20, slot=1 << 12, snapshot=0)
    sizes: dict[str, Any] = {"max_num_seqs": seqs, "pages_per_request": 161, "num_snapshots": None}
    enough = enough_memory(costs, **sizes)
    more: dict[str, Any] = {"max_model_len": 2560, "page_size": 16, "prefix_caching": caching}
    found = plan_memory(enough, costs, **sizes, **more)
    assert found.num_snapshots == 0
    assert found.num_pages == 161 * seqs * (2 if caching else 1) + 1
