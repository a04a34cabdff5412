"""Replicas replaced one after the other while the others serve: a new command, or a fresh start.

Each one is drained, replaced, and given requests again once it is healthy. Only then the next one
follows, so that memory for two replicas on one device is never needed. One that does not become
healthy goes back to what it ran before, and the update ends. How replicas are run is known
elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from millrace.common.http_client import Target
from millrace.common.tasks import restarted
from millrace.errors import UserError
from millrace.gateway.app import Gateway
from millrace.gateway.routing.replicas import Member

logger = logging.getLogger("millrace.fleet")

_STEP = 0.1  # seconds between two looks


class Replaceable(Protocol):
    """A replica that can be replaced."""

    @property
    def url(self) -> str:
        """Where it listens."""

    @property
    def is_up(self) -> bool:
        """Whether it takes requests."""

    @property
    def in_flight(self) -> int:
        """Its running requests."""

    @property
    def others_serve(self) -> bool:
        """Whether requests find another replica, or wait for one."""

    def drain(self) -> None:
        """Send it no new requests."""

    def undrain(self) -> None:
        """Send it requests again once it is healthy."""

    async def replace(self) -> None:
        """Stop it and start it anew. One that does not become healthy is started as it was before;
        UserError says so."""


class GatewayReplica:
    """A Replaceable behind a gateway.

    start: replaces it. holds: whether requests wait in the gateway while no replica is up.
    """

    def __init__(
        self, gateway: Gateway, target: Target, start: Callable[[], Awaitable[None]], holds: bool
    ) -> None:
        self._gateway = gateway
        self._target = target
        self._start = start
        self._holds = holds

    @property
    def _member(self) -> Member:
        for member in self._gateway.monitor.members:
            if member.target == self._target:
                return member
        raise UserError(f"{self._target} is no replica of this gateway any more")

    @property
    def url(self) -> str:
        return str(self._target)

    @property
    def is_up(self) -> bool:
        return self._member.state == "up"

    @property
    def in_flight(self) -> int:
        return self._gateway.counters.load_and_in_flight(self._member.slot)[1]

    @property
    def others_serve(self) -> bool:
        members = self._gateway.monitor.members
        return self._holds or any(m.state == "up" and m.target != self._target for m in members)

    def drain(self) -> None:
        self._gateway.monitor.drain(self._member.id, then_remove=False)

    def undrain(self) -> None:
        self._gateway.monitor.undrain(self._member.id)

    async def replace(self) -> None:
        await self._start()


class RollingUpdate:
    """At most one update at a time; `document` says how far the latest one is.

    drain_timeout: seconds that a replica's running requests get; then they go on elsewhere.
    start_timeout: seconds for a healthy replica to take requests.
    """

    def __init__(
        self, log: Callable[[str], None], drain_timeout: float, start_timeout: float
    ) -> None:
        self._log = log
        self._drain_timeout = drain_timeout
        self._start_timeout = start_timeout
        self._task: asyncio.Task[None] | None = None
        self._state = "none"
        self._count = 0
        self._done: list[str] = []
        self._reason = ""

    def document(self) -> dict[str, Any]:
        """state: none, running, done or failed. replaced: URLs of the replicas that are. count:
        how many are to be."""
        return {
            "state": self._state,
            "replaced": self._done,
            "count": self._count,
            "reason": self._reason or None,
        }

    async def begin(self, prepare: Callable[[], Awaitable[Sequence[Replaceable]]]) -> None:
        """Start an update of the replicas that `prepare` gives. Raises UserError if one runs, or it
        cannot work."""
        if self._state == "running":
            raise UserError("an update is running already; GET /gateway/fleet says how far it is")
        before, self._state = self._state, "running"
        try:
            # Those that are down come first.
            order = sorted(await prepare(), key=lambda replica: replica.is_up)
            if order and not order[0].others_serve:
                raise UserError(
                    "no other replica serves while this one restarts; give the gateway a "
                    "hold_timeout, so that requests wait, or more replicas"
                )
        except BaseException:
            self._state = before
            raise
        self._count, self._done, self._reason = len(order), [], ""
        self._task = restarted("the rolling update", lambda: self._run(order), self._log)

    async def cancel(self) -> None:
        """End with the supervisor."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, order: Sequence[Replaceable]) -> None:
        for replica in order:
            if replica.url in self._done:
                continue
            logger.info("%s is replaced; its requests go to others", replica.url)
            try:
                await self._update(replica)
            except UserError as error:
                self._state, self._reason = "failed", str(error)
                self._log(f"the rolling update ends: {error}")
                return
            self._done = [*self._done, replica.url]
        self._state = "done"
        logger.info("%d replicas are replaced", len(self._done))

    async def _update(self, replica: Replaceable) -> None:
        replica.drain()
        try:
            await self._until(lambda: not replica.in_flight, self._drain_timeout)
            await replica.replace()
        finally:
            replica.undrain()
        if not await self._until(lambda: replica.is_up, self._start_timeout):
            raise UserError(f"{replica.url} is healthy, but the gateway gives it no requests")

    async def _until(self, ready: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                return False
            await asyncio.sleep(_STEP)
        return True
