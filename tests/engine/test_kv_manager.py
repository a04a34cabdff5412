"""KVManager: resources are allocated completely or not at all, and freed completely."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engine.cache.policy import Kind
from millrace.engine.kv_manager import KVManager
from millrace.engine.request import Request
from millrace.engine.validation import make_request
from millrace.protocol import AddRequest, Limits, SamplingParams

PAGE = 4


def kv_manager(pages: int = 9, snapshots: int = 2, **more: int) -> tuple[KVManager, Limits]:
    limits = Limits(
        max_num_seqs=2,
        max_num_batched_tokens=64,
        max_model_len=64,
        page_size=PAGE,
        num_pages=pages + 1,
        num_snapshots=snapshots,
        drafts=0,
        **more,
    )
    return KVManager(limits), limits


def request(limits: Limits, prompt: list[int], **params: int) -> Request:
    source = AddRequest("a", prompt, SamplingParams(max_tokens=8, **params))
    return make_request(source, limits, ordinal=1)


def admitted(held: KVManager, asking: Request) -> None:
    match = held.match(asking)
    assert held.admit(asking, match, len(asking.tokens), spare=0) is not None
    asking.computed = len(asking.tokens)


def test_a_request_that_does_not_fit_gets_no_resources() -> None:
    held, limits = kv_manager(pages=3)
    first, second = (request(limits, list(range(8))) for _ in range(2))
    admitted(held, first)
    assert held.admit(second, held.match(second), 8, spare=0) is None
    held.check([first], saving=0)
    assert held.admit(second, held.match(second), 4, spare=1) is None  # there, but not to spare
    held.check([first], saving=0)
    held.release(first)
    held.check([], saving=0)
    assert held.pages.free == 3
    assert held.slots.free == 2


def test_no_snapshot_is_evicted_in_vain() -> None:
    held, limits = kv_manager(pages=5)
    first = request(limits, list(range(12)))
    admitted(held, first)
    snapshot = held.take_snapshot(first, 4)
    assert snapshot is not None
    held.publish(first, 4, snapshot)
    assert not held.ensure_free_pages(3)
    assert held.policy.snapshots == (1, 2)
    held.release(first)
    assert (held.pages.free, held.pages.evictable) == (4, 1)
    assert not held.ensure_free_pages(6)
    assert held.ensure_free_pages(5)
    assert held.policy.snapshots == (0, 2)


def test_a_prefix_is_shared_and_its_pages_outlive_their_request() -> None:
    held, limits = kv_manager()
    first = request(limits, list(range(12)))
    admitted(held, first)
    snapshot = held.take_snapshot(first, 8)
    assert snapshot is not None
    held.check([first], saving=1)
    held.publish(first, 8, snapshot)
    assert held.take_snapshot(first, 8) is None  # there is one
    kept = first.pages[:2]
    held.release(first)
    second = request(limits, [*range(8), 50, 51])
    match = held.match(second)
    granted = held.admit(second, match, 10, spare=0)
    assert granted is not None
    grants = granted.grants
    assert granted.copies == []
    assert [(g.first, len(g.pages)) for g in grants] == [(0, 2), (2, 1)]
    assert (match.tokens, match.snapshot, grants[0].pages) == (8, snapshot, kept)
    held.check([second], saving=0)


def test_the_unfinished_page_of_an_answer_is_copied() -> None:
    held, limits = kv_manager()
    first = request(limits, [*range(10), 99])  # the last token is not computed
    admitted(held, first)
    slot, pages = first.slot, first.pages
    held.save_end(first)
    held.release(first)
    [end] = held.take_ends()
    assert (end.slot, held.has_ends) == (slot, False)
    second = request(limits, [*range(10), 99, 98, 97])
    match = held.match(second)
    assert (match.tokens, match.snapshot, len(match.pages)) == (10, end.snapshot, 3)
    granted = held.admit(second, match, 14, spare=0)
    assert granted is not None
    [copy] = granted.copies
    assert copy.source == pages[2]
    assert second.pages[:2] == pages[:2]
    assert second.pages[2] == copy.target != copy.source
    held.check([second], saving=0)
    while held.policy.evict():
        pass
    held.check([second], saving=0)  # what the first step reads is still there
    assert held.pages.ref_count(copy.source) == 1
    held.admitted(second)
    held.check([second], saving=0)
    assert held.pages.ref_count(copy.source) == 0
    held.release(second)
    assert held.pages.free == held.pages.size


def test_snapshots_are_evicted_for_pages() -> None:
    held, limits = kv_manager(pages=3)
    first = request(limits, list(range(8)))
    admitted(held, first)
    snapshot = held.take_snapshot(first, 4)
    assert snapshot is not None
    held.publish(first, 4, snapshot)
    held.release(first)
    assert held.pages.free == 2
    assert not held.ensure_free_pages(4)  # more than there are: nothing is given up for it
    assert held.pages.free == 2
    assert held.ensure_free_pages(3)
    assert held.pages.free == 3
    held.check([], saving=0)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_prompt_with_prompt_logprobs_is_computed_in_full(logprobs: int | None) -> None:
    held, limits = kv_manager()
    first = request(limits, list(range(8)))
    admitted(held, first)
    snapshot = held.take_snapshot(first, 4)
    assert snapshot is not None
    held.publish(first, 4, snapshot)
    second = request(limits, list(range(8)), **({"prompt_logprobs": 1} if logprobs else {}))
    assert held.match(second).tokens == (0 if logprobs else 4)


def test_prefill_stops_at_full_pages_within_the_prompt() -> None:
    held, limits = kv_manager(snapshot_interval=8)
    asking = request(limits, list(range(22)))
    asking.source = msgspec.structs.replace(asking.source, boundaries=[13, 40])
    assert held.boundaries(asking, shared=4) == [20, 16, 12, 8, 4]
    asking.computed = 12
    assert held.boundaries(asking, shared=4) == [20, 16]
    without, few = kv_manager(snapshots=0)
    assert without.boundaries(request(few, list(range(22))), shared=4) == []


def test_of_snapshots_close_to_each_other_the_first_is_taken() -> None:
    held, limits = kv_manager(snapshot_distance=8)
    asking = request(limits, list(range(40)))
    asking.source = msgspec.structs.replace(asking.source, boundaries=[5, 10, 17, 20, 34])
    assert held.boundaries(asking, shared=0) == [32, 16, 8]  # not 4, 20 and 36
    asking.computed = 28
    assert held.boundaries(asking, shared=0) == [36]


def test_a_short_turn_behind_an_answer_stops_at_junctions_only() -> None:
    held, limits = kv_manager(snapshot_distance=4)
    asking = request(limits, list(range(200)))
    asking.source = msgspec.structs.replace(asking.source, boundaries=[150, 190])
    asking.computed = 140
    assert held.boundaries(asking, 0, Kind.ANSWER) == []
    assert held.boundaries(asking, 160, Kind.ANSWER) == [160]
    assert held.boundaries(asking, 0, Kind.TURNS) == [196, 188, 148]
    asking.computed = 100  # a long turn
    assert held.boundaries(asking, 0, Kind.ANSWER) == [196, 188, 148]


def test_what_a_prompt_writes_is_told_with_its_first_token() -> None:
    held, limits = kv_manager(pages=450, snapshots=2)
    asking = request(limits, list(range(30)))
    admitted(held, asking)
    asking.boundaries = [28, 12]
    assert held.report(asking).written == 30  # its answer will be kept
    asking.cached_tokens = 12
    assert held.report(asking).written == 18
    for first in (1000, 2000):  # both snapshots are worth more than a short answer
        tokens = list(range(first, first + 800))
        snapshot = held.policy.begin_save(tokens)
        assert snapshot is not None
        held.policy.publish(tokens, held.pages.allocate(200), snapshot, kind=Kind.TURNS)
    short = request(limits, [1, 2, 3])
    short.boundaries = []
    assert held.report(short).written == 0
    none, few = kv_manager(snapshots=0)
    assert none.report(request(few, list(range(22)))).written == 0


@given(
    turns=st.lists(st.integers(1, 60), max_size=12),
    shared=st.integers(0, 14),
    distance=st.integers(0, 24),
    cached=st.integers(0, 10),
)
def test_a_resumed_prompt_computes_less_than_the_distance_again(
    turns: list[int], shared: int, distance: int, cached: int
) -> None:
    held, limits = kv_manager(pages=20, snapshot_distance=distance)
    asking = request(limits, list(range(60)))
    asking.source = msgspec.structs.replace(asking.source, boundaries=turns)
    asking.computed = cached * PAGE
    kept = held.boundaries(asking, shared * PAGE)
    for wanted in (*(min(turn // PAGE * PAGE, 56) for turn in turns), shared * PAGE, 56):
        resumed = max(b for b in (0, asking.computed, *kept) if b <= max(wanted, asking.computed))
        assert wanted - resumed < max(1, distance)
    stops = [asking.computed, *kept[::-1]]
    assert all(later - sooner >= max(1, distance) for sooner, later in pairwise(stops))
