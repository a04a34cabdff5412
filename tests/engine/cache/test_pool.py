"""Pool: reference counts, and how many numbers eviction would free."""

from __future__ import annotations

import pytest

from millrace.engine.cache.pool import Pool


def test_pool_counts_references() -> None:
    pool = Pool(3, first=1)
    assert pool.allocate(2) == [1, 2]
    pool.retain(1)
    pool.release(1)
    assert pool.free == 1
    pool.release(1)
    assert pool.free == 2
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.release(1)
    with pytest.raises(RuntimeError, match="is free"):
        pool.retain(1)
    with pytest.raises(RuntimeError, match="3 requested"):
        pool.allocate(3)


def test_pool_counts_what_eviction_would_free() -> None:
    pool = Pool(3)
    pool.allocate(2)
    pool.retain_cached(0)
    pool.retain_cached(1)
    assert pool.evictable == 0  # both have another reference
    pool.release(0)
    assert pool.evictable == 1
    pool.retain(0)
    assert pool.evictable == 0
    pool.release(0)
    pool.release_cached(1)
    pool.release(1)
    assert (pool.evictable, pool.free) == (1, 2)
    pool.release_cached(0)
    assert (pool.evictable, pool.free) == (0, 3)


def test_many_references_at_once_are_as_one_by_one() -> None:
    alone, together = Pool(4, first=1), Pool(4, first=1)
    for pool in (alone, together):
        pool.allocate(4)
        pool.retain_cached(2)
        pool.retain_cached(3)
        pool.release(2)
    for number in (2, 3, 4):
        alone.retain(number)
    together.retain_all([2, 3, 4])
    assert alone.evictable == together.evictable == 0
    for number in (4, 3, 2, 4, 3):
        alone.release(number)
    together.release_all([4, 3, 2, 4, 3])
    assert (alone.free, alone.evictable) == (together.free, together.evictable) == (1, 2)
    assert [together.ref_count(n) for n in (1, 2, 3, 4)] == [1, 1, 1, 0]
    with pytest.raises(RuntimeError, match="4 freed twice"):
        together.release_all([4])
    with pytest.raises(RuntimeError, match="4 is free"):
        together.retain_all([4])
