"""Keeps an engine running: one that dies is started again after a pause, within limits.

It decides how often and how soon. How an engine is started, and what happens to its requests, is
the client's business.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from millrace.common.backoff import Backoff, BackoffPolicy
from millrace.server.engine_link.client import EngineClient

logger = logging.getLogger(__name__)

POLICY = BackoffPolicy(first=1.0, longest=30.0, settled=60.0)


class Restarter:
    """max_restarts: in a row; 0 never restarts. An engine that never was ready is not restarted."""

    def __init__(self, client: EngineClient, max_restarts: int) -> None:
        self._client = client
        self._max_restarts = max_restarts

    async def run(self) -> Exception:
        """Restart whatever dies; returns the last death, when no restart is left."""
        client, backoff = self._client, Backoff(POLICY)
        served = False
        while True:
            began = await self._ready_since()
            served = served or began is not None
            death = await client.wait_died()
            pause = backoff.failed(0.0 if began is None else monotonic() - began)
            row = backoff.failures
            if not served or client.draining or row > self._max_restarts:
                return death
            logger.warning("%s; starting it again in %g s (death %d in a row)", death, pause, row)
            await asyncio.sleep(pause)
            if client.draining:
                return death
            await client.restart()

    async def _ready_since(self) -> float | None:
        """When the engine was ready; None if it died before."""
        try:
            await self._client.wait_ready()
        except Exception as error:
            if error is not self._client.died:
                raise
            return None
        logger.info("the engine is ready")
        return monotonic()
