"""Ways to add up over the ranks: what a process may do once. The rest is in test_collectives.py."""

import pytest

from millrace.runtime.ranks import allreduce_algorithms
from millrace.runtime.ranks.ranks import Ranks


def test_memory_is_shared_with_one_group_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allreduce_algorithms, "_claimed", None)
    first = Ranks()
    allreduce_algorithms._claim(first)
    allreduce_algorithms._claim(first)
    with pytest.raises(RuntimeError, match="earlier engine"):
        allreduce_algorithms._claim(Ranks())
    del first
    with pytest.raises(RuntimeError, match="earlier engine"):
        allreduce_algorithms._claim(Ranks())
