"""A silence is noticed once it has lasted, and not while somebody else is to blame for it."""

from __future__ import annotations

import asyncio

from millrace.gateway.carried import Carried
from millrace.gateway.replicas import ReplicaSet
from millrace.gateway.silence import Silence
from tests.support.running import eventually, run


class Watched:
    """A silence and how often it was broken."""

    def __init__(self, limit: float) -> None:
        self.carried = Carried(ReplicaSet.__new__(ReplicaSet))
        self.paused = False
        self.broken = 0
        self.silence = Silence(self.carried, limit, lambda: self.paused, self._count)

    def _count(self) -> None:
        self.broken += 1


def test_it_is_told_again_and_again_until_it_stops() -> None:
    async def scenario() -> None:
        one = Watched(limit=0.02)
        one.silence.watch()
        await eventually(lambda: one.broken >= 3)
        one.silence.stop()
        told = one.broken
        await asyncio.sleep(0.06)
        assert one.broken == told

    run(scenario())


def test_what_comes_or_a_paused_client_puts_it_off() -> None:
    async def scenario() -> None:
        coming, paused, left = (Watched(limit=0.05) for _ in range(3))
        paused.paused = True
        for one in (coming, paused, left):
            one.silence.watch()
        while not left.broken:  # so at least the limit has gone by
            coming.carried.chunks += 1
            await asyncio.sleep(0)
        assert (coming.broken, paused.broken) == (0, 0)
        await eventually(lambda: coming.broken == 1)
        paused.silence.stop()

    run(scenario())
