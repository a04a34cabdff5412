"""Why a prompt was not found in the prefix cache, told to its sender alone."""

from __future__ import annotations

from millrace.protocol import CacheReport
from millrace.server.api.cache_explain import reason
from millrace.server.telemetry.cache_reports import CacheReports


def test_reports_are_bounded_and_told_to_their_owner() -> None:
    reports = CacheReports(most=2)
    for number in range(3):
        reports.add(f"r{number}", "a", 10 + number, CacheReport(number, 5))
    assert reports.find("r0", "a") is None
    assert reports.find("r2", "b") is None
    assert reports.find("r2", "a") == (12, CacheReport(2, 5))


def test_the_latest_requests_of_a_key_are_listed_once_each() -> None:
    reports = CacheReports()
    for number, owner in enumerate("abaa"):
        report = CacheReport(number, 9)
        for name in (f"other-{number}", f"r{number}"):
            reports.add(name, owner, 10 * number, report, f"c{number % 2}")
    assert [(tokens, one.cached, talk) for _, tokens, one, talk in reports.latest("a")] == [
        (30, 3, "c1"), (20, 2, "c0"), (0, 0, "c0"),
    ]  # fmt: skip
    assert reports.latest("x") == []


def test_reasons() -> None:
    for report, words in (
        (CacheReport(9, 9), "all of the prompt"),
        (CacheReport(3, 8, evicted=6), "token 6 was evicted"),
        (CacheReport(3, 8), "known up to token 8"),
        (CacheReport(3, 3), "from token 3 on"),
    ):
        assert words in reason(report, 10)
