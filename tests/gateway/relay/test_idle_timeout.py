"""A silence is noticed once it has lasted, and not while somebody else is to blame for it."""

from __future__ import annotations

import asyncio

from millrace.gateway.relay.idle_timeout import IdleTimeout
from millrace.gateway.routing.load_account import LoadAccount
from tests.support.gateways import replica_set
from tests.support.running import eventually, run


class Watched:
    """A silence and how often it was timeouts."""

    def __init__(self, limit: float) -> None:
        self.account = LoadAccount(replica_set())
        self.paused = False
        self.timeouts = 0
        self.idle_timeout = IdleTimeout(self.account, limit, lambda: self.paused, self._count)

    def _count(self) -> None:
        self.timeouts += 1


def test_the_callback_is_called_repeatedly_until_stop() -> None:
    async def scenario() -> None:
        one = Watched(limit=0.02)
        one.idle_timeout.start()
        await eventually(lambda: one.timeouts >= 3)
        one.idle_timeout.stop()
        told = one.timeouts
        await asyncio.sleep(0.06)
        assert one.timeouts == told

    run(scenario())


def test_chunks_and_a_paused_client_delay_the_timeout() -> None:
    async def scenario() -> None:
        coming, paused, left = (Watched(limit=0.05) for _ in range(3))
        paused.paused = True
        for one in (coming, paused, left):
            one.idle_timeout.start()
        while not left.timeouts:  # so at least the limit has gone by
            coming.account.chunks += 1
            await asyncio.sleep(0)
        assert (coming.timeouts, paused.timeouts) == (0, 0)
        await eventually(lambda: coming.timeouts == 1)
        paused.idle_timeout.stop()

    run(scenario())
