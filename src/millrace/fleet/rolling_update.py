"""Replicas replaced one after the other while the others serve: a new command, or a fresh start.

Each one is drained, stopped, started with the new command, and given requests again once it is
healthy. Only then the next one follows, so that memory for two replicas on one device is never
needed. One that does not become healthy is started with its old command again, and the update
ends. How replicas are run and watched is known elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from millrace.common.tasks import restarted
from millrace.errors import UserError

_STEP = 0.1  # seconds between two looks


class Replicas(Protocol):
    """The replicas of one host (supervisor.py), by number."""

    @property
    def count(self) -> int:
        """How many there are."""

    def command_of(self, index: int) -> Sequence[str]:
        """What it was started with."""

    def drain(self, index: int) -> None:
        """Send it no new requests."""

    def undrain(self, index: int) -> None:
        """Send it requests again once it is healthy."""

    def in_flight(self, index: int) -> int:
        """Its running requests."""

    def is_up(self, index: int) -> bool:
        """Whether it takes requests."""

    def others_serve(self, index: int) -> bool:
        """Whether requests find another replica, or wait for one."""

    async def replace(self, index: int, command: Sequence[str]) -> None:
        """Stop it and start it with a command. Raises UserError if it does not become healthy."""


class RollingUpdate:
    """At most one update at a time; `document` says how far the latest one is.

    command: gives the new command; raises UserError if there is none that works. drain_timeout:
    seconds that a replica's running requests get; then they go on elsewhere. start_timeout: seconds
    for a replica to take requests.
    """

    def __init__(
        self,
        replicas: Replicas,
        command: Callable[[], Awaitable[Sequence[str]]],
        log: Callable[[str], None],
        drain_timeout: float,
        start_timeout: float,
    ) -> None:
        self._replicas = replicas
        self._command = command
        self._log = log
        self._drain_timeout = drain_timeout
        self._start_timeout = start_timeout
        self._task: asyncio.Task[None] | None = None
        self._state = "none"
        self._done: list[int] = []
        self._reason = ""

    def document(self) -> dict[str, Any]:
        """state: none, running, done or failed. replicas: the numbers of those replaced."""
        return {
            "state": self._state,
            "replicas": self._done,
            "count": self._replicas.count,
            "reason": self._reason or None,
        }

    async def begin(self) -> None:
        """Start an update. Raises UserError if one runs, or it cannot work."""
        if self._state == "running":
            raise UserError("an update is running already; GET /gateway/fleet says how far it is")
        command = await self._command()
        down = [i for i in range(self._replicas.count) if not self._replicas.is_up(i)]
        if not self._replicas.others_serve(0):
            raise UserError(
                "no other replica serves while this one restarts; give the gateway a hold_timeout, "
                "so that requests wait, or more replicas"
            )
        self._state, self._done, self._reason = "running", [], ""
        order = down + [i for i in range(self._replicas.count) if i not in down]
        self._task = restarted("the rolling update", lambda: self._run(order, command), self._log)

    async def cancel(self) -> None:
        """End with the supervisor."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, order: Sequence[int], command: Sequence[str]) -> None:
        for index in order:
            if index in self._done:
                continue
            self._log(f"replica {index} is replaced; its requests go to others")
            try:
                await self._update(index, command)
            except UserError as error:
                self._state, self._reason = "failed", str(error)
                self._log(f"the rolling update ends: {error}")
                return
            self._done = [*self._done, index]
        self._state = "done"
        self._log(f"{len(self._done)} replicas are replaced")

    async def _update(self, index: int, command: Sequence[str]) -> None:
        replicas, before = self._replicas, self._replicas.command_of(index)
        replicas.drain(index)
        try:
            await self._until(lambda: not replicas.in_flight(index), self._drain_timeout)
            try:
                await replicas.replace(index, command)
            except UserError as error:
                await replicas.replace(index, before)
                raise UserError(f"{error}; it runs its old command again") from error
        finally:
            replicas.undrain(index)
        if not await self._until(lambda: replicas.is_up(index), self._start_timeout):
            raise UserError(f"replica {index} is healthy, but the gateway gives it no requests")

    async def _until(self, ready: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                return False
            await asyncio.sleep(_STEP)
        return True
