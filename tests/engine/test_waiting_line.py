"""Who may be admitted before a request that came earlier, and how often."""

from __future__ import annotations

from millrace.engine.intake import Limits, make_request
from millrace.engine.request import Phase, Request
from millrace.engine.waiting_line import OVERTAKES, REFUSALS, WINDOW, WaitingLine
from millrace.protocol import AddRequest, SamplingParams

LIMITS = Limits(
    max_num_seqs=4, max_num_batched_tokens=32, max_model_len=48, page_size=4, num_pages=9,
    num_snapshots=0, drafts=0, priorities=True,
)  # fmt: skip


def request(ordinal: int, priority: int = 0) -> Request:
    source = AddRequest(f"r{ordinal}", [1, 2], SamplingParams(), priority=priority)
    return make_request(source, LIMITS, ordinal)


def line_of(*requests: Request) -> WaitingLine:
    line = WaitingLine()
    for one in requests:
        line.add(one)
    return line


def enter(line: WaitingLine, one: Request) -> None:
    line.admitted(one)
    one.phase = Phase.PREFILL


def test_requests_stand_by_priority_then_age() -> None:
    first, second, urgent = request(1), request(2), request(3, priority=-1)
    line = line_of(second, first, urgent)
    assert list(line) == [urgent, first, second]
    assert line.candidates(lambda one: one is first) == [urgent, second]


def test_a_step_considers_a_window() -> None:
    line = line_of(*(request(n) for n in range(WINDOW + 5)))
    assert len(line.candidates(lambda _: False)) == WINDOW


def test_the_last_free_slot_is_for_the_first_in_line() -> None:
    first, second = request(1), request(2)
    line = line_of(first, second)
    line.candidates(lambda _: False)
    assert [line.may_enter(second, free) for free in (0, 1, 2)] == [False, False, True]
    assert [line.may_enter(first, free) for free in (0, 1)] == [False, True]
    enter(line, first)
    assert line.may_enter(second, 1)


def test_one_that_lacks_pages_is_passed_a_bounded_number_of_times() -> None:
    big, later = request(1), [request(2 + n) for n in range(OVERTAKES + 1)]
    urgent = request(100, priority=-1)
    line = line_of(big, *later, urgent)
    line.candidates(lambda _: False)
    line.refused(later[0])
    line.refused(big)  # the earlier of the two
    for one in later[:OVERTAKES]:
        assert line.may_enter(one, 4)
        enter(line, one)
    assert not line.may_enter(later[-1], 4)
    assert line.may_enter(urgent, 4)
    assert line.may_enter(big, 4)
    enter(line, urgent)
    assert big.overtaken == OVERTAKES
    enter(line, big)
    assert line.may_enter(later[-1], 4)


def test_when_it_leaves_the_others_may_pass() -> None:
    big, later = request(1), [request(2 + n) for n in range(OVERTAKES + 1)]
    line = line_of(big, *later)
    line.candidates(lambda _: False)
    line.refused(big)
    for one in later[:OVERTAKES]:
        enter(line, one)
    line.remove(big)
    assert line.may_enter(later[-1], 4)


def test_a_step_tries_few_that_lack_pages() -> None:
    waiting = [request(n) for n in range(REFUSALS + 1)]
    line = line_of(*waiting)
    line.candidates(lambda _: False)
    for one in waiting[:REFUSALS]:
        assert line.may_enter(one, 4)
        line.refused(one)
    assert not line.may_enter(waiting[-1], 4)
    line.candidates(lambda _: False)
    assert line.may_enter(waiting[-1], 4)
