"""The pause between attempts doubles with each failure in a row, up to a limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millrace.common.backoff import Backoff, BackoffPolicy

POLICY = BackoffPolicy(first=0.5, longest=3.0, settled=60.0)


def test_the_pause_doubles_up_to_its_limit() -> None:
    backoff = Backoff(POLICY)
    assert [backoff.failed() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff.failures == 5


def test_a_failure_after_long_service_begins_a_new_row() -> None:
    backoff = Backoff(POLICY)
    assert [backoff.failed(60.0), backoff.failed(60.0)] == [0.5, 1.0]
    assert (backoff.failed(60.1), backoff.failures) == (0.5, 1)
    backoff.reset()
    assert (backoff.failures, backoff.failed(), backoff.failures) == (0, 0.5, 1)


@given(failures=st.integers(1, 1 << 40))
def test_any_number_of_failures_has_a_pause(failures: int) -> None:
    assert POLICY.first <= POLICY.pause(failures) <= POLICY.longest
    assert POLICY.pause(failures) <= POLICY.pause(failures + 1)
