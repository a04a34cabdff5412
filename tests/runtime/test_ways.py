"""Ways to add up over the ranks: what a process may do once. The rest is in test_collectives.py."""

from typing import Any

import pytest

from millrace.runtime import ways


class Group:
    """In place of ranks, of which nothing is asked."""


def test_memory_is_shared_with_one_group_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_claimed", None)
    first: Any = Group()
    ways._claim(first)
    ways._claim(first)
    with pytest.raises(RuntimeError, match="earlier engine"):
        ways._claim(Group())  # type: ignore[arg-type]
    del first
    with pytest.raises(RuntimeError, match="earlier engine"):
        ways._claim(Group())  # type: ignore[arg-type]
