"""Which requests may overtake an earlier one, and how often."""

from __future__ import annotations

from millrace.engine.request import Phase, Request
from millrace.engine.validation import make_request
from millrace.engine.waiting_queue import MAX_FAILURES, MAX_OVERTAKES, WINDOW, WaitingQueue
from millrace.protocol import AddRequest, Limits, SamplingParams

LIMITS = Limits(
    max_num_seqs=4, max_num_batched_tokens=32, max_model_len=48, page_size=4, num_pages=9,
    num_snapshots=0, drafts=0, priorities=True,
)  # fmt: skip


def request(ordinal: int, priority: int = 0) -> Request:
    source = AddRequest(f"r{ordinal}", [1, 2], SamplingParams(), priority=priority)
    return make_request(source, LIMITS, ordinal)


def queue_of(*requests: Request) -> WaitingQueue:
    queue = WaitingQueue()
    for one in requests:
        queue.add(one)
    return queue


def admit(queue: WaitingQueue, one: Request) -> None:
    queue.admitted(one)
    one.phase = Phase.PREFILL


def test_requests_are_sorted_by_priority_then_age() -> None:
    first, second, urgent = request(1), request(2), request(3, priority=-1)
    queue = queue_of(second, first, urgent)
    assert list(queue) == [urgent, first, second]
    assert queue.candidates(lambda one: one is first) == [urgent, second]


def test_a_step_considers_a_window() -> None:
    queue = queue_of(*(request(n) for n in range(WINDOW + 5)))
    assert len(queue.candidates(lambda _: False)) == WINDOW


def test_the_last_free_slot_is_for_the_first_in_the_queue() -> None:
    first, second = request(1), request(2)
    queue = queue_of(first, second)
    queue.candidates(lambda _: False)
    assert [queue.may_admit(second, free) for free in (0, 1, 2)] == [False, False, True]
    assert [queue.may_admit(first, free) for free in (0, 1)] == [False, True]
    admit(queue, first)
    assert queue.may_admit(second, 1)


def test_overtaking_is_limited() -> None:
    big, later = request(1), [request(2 + n) for n in range(MAX_OVERTAKES + 1)]
    urgent = request(100, priority=-1)
    queue = queue_of(big, *later, urgent)
    queue.candidates(lambda _: False)
    queue.lacks_pages(later[0])
    queue.lacks_pages(big)  # the earlier of the two
    for one in later[:MAX_OVERTAKES]:
        assert queue.may_admit(one, 4)
        admit(queue, one)
    assert not queue.may_admit(later[-1], 4)
    assert queue.may_admit(urgent, 4)
    assert queue.may_admit(big, 4)
    admit(queue, urgent)
    assert big.overtaken == MAX_OVERTAKES
    admit(queue, big)
    assert queue.may_admit(later[-1], 4)


def test_after_the_blocked_request_others_may_be_admitted() -> None:
    big, later = request(1), [request(2 + n) for n in range(MAX_OVERTAKES + 1)]
    queue = queue_of(big, *later)
    queue.candidates(lambda _: False)
    queue.lacks_pages(big)
    for one in later[:MAX_OVERTAKES]:
        admit(queue, one)
    queue.remove(big)
    assert queue.may_admit(later[-1], 4)


def test_failed_admissions_per_step_are_limited() -> None:
    waiting = [request(n) for n in range(MAX_FAILURES + 1)]
    queue = queue_of(*waiting)
    queue.candidates(lambda _: False)
    for one in waiting[:MAX_FAILURES]:
        assert queue.may_admit(one, 4)
        queue.lacks_pages(one)
    assert not queue.may_admit(waiting[-1], 4)
    assert queue.may_admit(waiting[0], 4)  # the first is tried in every step
    queue.candidates(lambda _: False)
    assert queue.may_admit(waiting[-1], 4)
