"""All-reduce algorithms: what a process may set up once. The rest is in test_allreduce.py."""

import pytest

from millrace.runtime.ranks import allreduce_algorithms
from millrace.runtime.ranks.ranks import Ranks


def test_memory_is_shared_with_one_group_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allreduce_algorithms, "claimed_by", None)
    first = Ranks()
    allreduce_algorithms.claim_process(first)
    allreduce_algorithms.claim_process(first)
    with pytest.raises(RuntimeError, match="earlier engine"):
        allreduce_algorithms.claim_process(Ranks())
    del first
    with pytest.raises(RuntimeError, match="earlier engine"):
        allreduce_algorithms.claim_process(Ranks())
