"""A process with a low soft limit takes what the hard limit allows, and leaves that as it is."""

from __future__ import annotations

import resource

import pytest

from millrace.common.open_files import WANTED, raise_file_limit


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (64, 1000, (1000, 1000)),
        (64, 2 * WANTED, (WANTED, 2 * WANTED)),
        (64, resource.RLIM_INFINITY, (WANTED, resource.RLIM_INFINITY)),
        (WANTED, 2 * WANTED, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_the_soft_limit_is_raised(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: tuple[int, int] | None
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    raise_file_limit()
    assert asked == ([raised] if raised else [])


def test_a_limit_that_cannot_be_raised_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not here")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 1000))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_file_limit()
    assert "at most 64 open files: not here" in caplog.text
