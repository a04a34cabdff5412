"""Ways to add up over the ranks: what a process may do once. The rest is in test_collectives.py."""

import pytest

from millrace.runtime import ways
from millrace.runtime.ranks import Ranks


def test_memory_is_shared_with_one_group_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_claimed", None)
    first = Ranks()
    ways._claim(first)
    ways._claim(first)
    with pytest.raises(RuntimeError, match="earlier engine"):
        ways._claim(Ranks())
    del first
    with pytest.raises(RuntimeError, match="earlier engine"):
        ways._claim(Ranks())
