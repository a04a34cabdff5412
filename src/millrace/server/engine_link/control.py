"""Pausing an engine and putting it to sleep, for whoever manages the server.

A paused engine serves nothing, but keeps its memory. An engine that sleeps has none: its process
has ended, with all of its weights, caches and GPU memory, and waking it starts another one.
Which of this a client may ask for, and how, is not known here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Literal

from millrace.server.engine_link.client import EngineClient

logger = logging.getLogger(__name__)

PauseMode = Literal["abort", "wait", "keep"]
WAKE_TAGS = ("weights", "kv_cache")

WAIT_SECONDS = 600.0  # for running requests to end, in the mode `wait`
END_SECONDS = 30.0  # for aborted requests to leave, and for an engine to heed a message
POLL_SECONDS = 0.005


class StillBusyError(Exception):
    """Requests did not end within the limit; the engine stays paused."""


class EngineControl:
    """Pause and resume, sleep and wake, one call after the other.

    sleep_level: 1 or 2 while the engine sleeps, 0 where only its scheduling does, None while it is
    awake.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._lock = asyncio.Lock()
        self._to_wake: set[str] = set()
        self.sleep_level: int | None = None
        self.paused = False

    async def pause(self, mode: PauseMode, *, clear_cache: bool = True) -> None:
        """Serve nothing until `resume`. Pausing again does nothing.

        mode: abort ends open requests, wait lets them end, keep freezes them where they are; new
        requests are refused, in keep they wait. Raises StillBusyError.
        """
        async with self._lock:
            await self._pause(mode, clear_cache)

    async def _pause(self, mode: PauseMode, clear_cache: bool) -> None:
        client = self._client
        if not self.paused:
            self.paused = True
            if mode == "keep":
                await self._freeze(True)
            else:
                client.refusal = "paused"
                if mode == "abort":
                    client.abort_all()
                limit = WAIT_SECONDS if mode == "wait" else END_SECONDS
                await self._wait_until(lambda: not client.open_requests, limit)
        if clear_cache:
            client.reset_prefix_cache()

    async def resume(self) -> None:
        """Serve again. Does nothing to an engine that is not paused, or sleeps."""
        async with self._lock:
            if self.sleep_level in (None, 0):
                await self._resume()

    async def _resume(self) -> None:
        self.sleep_level = None
        self.paused = False
        self._client.refusal = None
        await self._freeze(False)

    async def sleep(self, level: int, mode: PauseMode) -> None:
        """Pause; at levels 1 and 2 also end the engine, which frees all that it holds.

        A sleeping engine that is told to sleep again stays as it is.
        """
        async with self._lock:
            if self.sleep_level:
                return
            await self._pause(mode, clear_cache=level > 0)
            self.sleep_level = level
            if level:
                self._client.refusal = "asleep"
                self._to_wake = set(WAKE_TAGS)
                await self._client.end_engine()
                logger.info("the engine sleeps")

    async def wake(self, tags: Collection[str] | None) -> bool:
        """Start the engine again and serve, once all tags have been named (None: all of them).

        Returns whether it is awake. Raises what keeps the engine from starting.
        """
        async with self._lock:
            if self.sleep_level is None:
                return True
            self._to_wake -= set(WAKE_TAGS if tags is None else tags)
            if self._to_wake:
                return False
            if self.sleep_level:
                await self._client.start_engine()
                await self._client.wait_ready()
            await self._resume()
            return True

    async def _freeze(self, frozen: bool) -> None:
        """Have the engine stop, or go on, after the step that runs."""
        client = self._client
        if client.stats.paused == frozen:
            return
        client.set_engine_paused(frozen)
        await self._wait_until(
            lambda: client.died is not None or client.stats.paused == frozen, END_SECONDS
        )

    async def _wait_until(self, condition: Callable[[], bool], limit: float) -> None:
        try:
            async with asyncio.timeout(limit):
                while not condition():
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise StillBusyError(
                f"requests are still running after {limit:g} s; the engine stays paused"
            ) from None
