"""When a request is sent to no other replica."""

from __future__ import annotations

import pytest

from millrace.gateway.relay.suspicion import Suspicion
from millrace.gateway.routing.suspects import Failure, FailureBurst


def last(*failures: tuple[int, bool], before: int = 0) -> list[bool]:
    """For each failure (tokens so far, whether others shared it), whether it was the last."""
    suspicion = Suspicion()
    suspicion.has_failed_before(before)
    made = []
    for tokens, shared in failures:
        burst = FailureBurst(0.0).after(0.0, Failure("died", b"this"))
        if shared:
            burst = burst.after(0.1, Failure("died", b"another"))
        made.append(suspicion.add(burst, tokens))
    return made


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([(0, False), (0, False)], [False, True]),
        ([(0, True), (0, True)], [False, True]),  # without a token it may be the killer
        ([(5, False), (5, False)], [False, True]),  # it kills at its fifth token
        ([(5, False), (6, False), (7, False)], [False, False, False]),  # it makes progress
        ([(5, True), (5, True), (5, True)], [False, False, True]),  # perhaps a victim
        ([(0, True), (5, False), (5, False)], [False, False, True]),
        ([(5, True), (6, False), (6, False)], [False, False, True]),
    ],
)
def test_failures_without_progress_add_up(
    failures: list[tuple[int, bool]], expected: list[bool]
) -> None:
    assert last(*failures) == expected


def test_a_copy_of_a_request_that_failed_gets_one_replica() -> None:
    assert last((0, False), before=1) == [True]
    assert last((0, False), before=5) == [True]
