"""Long records are cut, so that they fit where the host's memory is in pieces."""

from __future__ import annotations

import pytest

from millrace.engine.cache import cold_store
from millrace.engine.cache.cold_store import NOWHERE, ColdRecord, ColdSizes, ColdStore, page_hashes
from millrace.engine.cache.policy import Kind

PAGE, STATE, TOKENS = 256, 1024, 4


@pytest.fixture(autouse=True)
def two_pages_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_store, "PART_BYTES", 2 * PAGE)


def store_of(host: int) -> ColdStore:
    return ColdStore(ColdSizes(TOKENS, PAGE, STATE, host, 0))


def add(store: ColdStore, tokens: list[int]) -> list[ColdRecord]:
    return store.add_long(tokens, page_hashes(tokens, TOKENS, ""), "", Kind.ANSWER)


def test_a_long_record_is_cut_from_its_beginning_on() -> None:
    store = store_of(1 << 20)
    tokens = list(range(30))  # seven pages and two tokens
    *parts, record = add(store, tokens)
    assert [(one.first, one.whole) for one in parts] == [(0, 2), (2, 4), (4, 6)]
    assert (record.first, record.whole, record.tail) == (6, 7, (28, 29))
    assert record.chain() == [*parts, record]
    assert not any(part.has_state for part in parts)
    store.check()
    assert store.match([*tokens, 1], page_hashes([*tokens, 1], TOKENS, "")) is record
    other = [*tokens[:20], *range(100, 120)]  # five pages are the same: four of them in parts
    *_, beside = add(store, other)
    assert beside.chain()[:2] == parts[:2]
    store.check()


def test_memory_in_pieces_is_enough() -> None:
    """Every other record may go, and leaves three pages; five are wanted."""
    store = store_of(18 * PAGE + 6 * STATE)
    for number in range(6):
        tokens = [number] * 12
        one = store.add(tokens, page_hashes(tokens, TOKENS, ""), "", Kind.ANSWER)
        assert one is not None
        one.busy += number % 2
    tokens = list(range(50, 68))  # four pages and two tokens
    assert store.add(tokens, page_hashes(tokens, TOKENS, ""), "", Kind.ANSWER) is None
    found = add(store, tokens)
    assert [one.own_pages for one in found] == [2, 3]
    assert all(one.pages_at != NOWHERE for one in found)
    store.check()


def test_without_room_nothing_is_left() -> None:
    store = store_of(8 * PAGE + STATE)
    assert add(store, list(range(60))) == []
    assert len(store) == 0
    assert store.host_used == 0
    assert [one.whole for one in add(store, list(range(20)))] == [2, 4, 5]
    store.check()


def test_parts_go_with_the_record_that_needs_them() -> None:
    store = store_of(8 * PAGE + STATE)
    [*_, old] = add(store, list(range(20)))
    [*_, new] = add(store, list(range(100, 120)))
    assert new.key in store
    assert old.key not in store
    assert len(store) == 3
    store.check()
