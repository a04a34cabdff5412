"""Tells when a replica has brought nothing for too long. When a byte came is not noted, for that
would cost each byte: looks at what came are far apart, and a silence counts from such a look."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from millrace.gateway.routing.load_account import LoadAccount

_GLANCE = 1.0  # seconds between looks while the client takes no bytes


class IdleTimeout:
    """After `limit` seconds without a chunk `broken` is called, and again after as many, until
    `stop`. Time in which the client is `paused` does not count."""

    def __init__(
        self,
        account: LoadAccount,
        limit: float,
        paused: Callable[[], bool],
        broken: Callable[[], None],
    ) -> None:
        self._account = account
        self._limit = limit
        self._paused = paused
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self._seen = 0
        self._since = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Look out from now on."""
        self.restart()
        self._timer = self._loop.call_later(self._limit, self._look)

    def restart(self) -> None:
        """A new wait begins now."""
        self._since = self._loop.time()

    def stop(self) -> None:
        """Look out no more, and forget who was to be told: requests leave no circles behind, which
        only a garbage collection would free."""
        if self._timer is not None:
            self._timer.cancel()
        self._broken = _nobody

    def _look(self) -> None:
        if self._account.chunks != self._seen:
            self._seen = self._account.chunks
            self.restart()
        left = self._since + self._limit - self._loop.time()
        if left > 0 or self._paused():
            self._timer = self._loop.call_later(left if left > 0 else _GLANCE, self._look)
        else:
            self._timer = self._loop.call_later(self._limit, self._look)
            self._broken()


def _nobody() -> None:
    """Nobody is told."""
