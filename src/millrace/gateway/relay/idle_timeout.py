"""Notices that a replica has sent nothing for too long.

The time of each chunk is not recorded, because that would cost every chunk: a timer compares the
number of chunks from time to time, and a silence counts from the last such check.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from millrace.gateway.routing.load_account import LoadAccount

_PAUSED_CHECK_SECONDS = 1.0  # seconds between checks while the client reads nothing


class IdleTimeout:
    """Calls `on_timeout` after `limit` seconds without a chunk, and again after as many, until
    `stop`. Time in which the client is `paused` does not count."""

    def __init__(
        self,
        account: LoadAccount,
        limit: float,
        paused: Callable[[], bool],
        on_timeout: Callable[[], None],
    ) -> None:
        self._account = account
        self._limit = limit
        self._paused = paused
        self._on_timeout = on_timeout
        self._loop = asyncio.get_running_loop()
        self._seen = 0
        self._since = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch."""
        self.restart()
        self._timer = self._loop.call_later(self._limit, self._check)

    def restart(self) -> None:
        """The time without a chunk begins now."""
        self._since = self._loop.time()

    def stop(self) -> None:
        """End watching and drop the callback, so that a finished request leaves no reference cycle
        for the garbage collector."""
        if self._timer is not None:
            self._timer.cancel()
        self._on_timeout = _do_nothing

    def _check(self) -> None:
        if self._account.chunks != self._seen:
            self._seen = self._account.chunks
            self.restart()
        left = self._since + self._limit - self._loop.time()
        if left > 0 or self._paused():
            self._timer = self._loop.call_later(
                left if left > 0 else _PAUSED_CHECK_SECONDS, self._check
            )
        else:
            self._timer = self._loop.call_later(self._limit, self._check)
            self._on_timeout()


def _do_nothing() -> None:
    """Replaces the callback after `stop`."""
