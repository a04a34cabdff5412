"""A collector that is gone, or hangs, keeps no process from its end and fills no log."""

from __future__ import annotations

import logging
import socket
import time

import pytest

from millrace.logs import otlp
from millrace.logs.otlp import Seldom, close_provider, open_provider


@pytest.mark.parametrize("hangs", [True, False])
def test_a_collector_that_is_gone_delays_no_end(
    hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    monkeypatch.setattr(otlp, "FLUSH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) if hangs else socket.socket() as taken:
        if not hangs:
            taken.bind(("127.0.0.1", 0))
        provider = open_provider(f"http://127.0.0.1:{taken.getsockname()[1]}/v1/traces", "test")
        assert provider is not None
        provider.get_tracer("test").start_span("one").end()
        began = time.monotonic()
        close_provider(provider)
        assert time.monotonic() - began < 2.0


def test_complaints_come_once_a_minute() -> None:
    now = [0.0]
    seldom = Seldom(lambda: now[0])
    record = logging.makeLogRecord({})
    passed = []
    for second in range(130):
        now[0] = float(second)
        passed += [second] * bool(seldom.filter(record))
    assert passed == [0, 60, 120]


def test_without_an_endpoint_nothing_is_opened() -> None:
    assert open_provider(None, "test") is None
    close_provider(None)
