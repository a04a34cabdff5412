"""The replicas behind the gateway: which are there, how they are, what they carry.

Health comes from two sides: checks in the background (GET /health), and failures that requests
meet. A failed replica stays out for a time that doubles with each failure in a row, and comes back
with the first good check after it. Nothing here knows how bytes are relayed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from millrace.http1 import Target, error_text, fetch


class HealthPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, all but `misses`: the checks in a row that may go unanswered before a replica
    counts as down."""

    interval: float = 1.0
    timeout: float = 5.0
    misses: int = 2
    backoff: float = 1.0
    backoff_limit: float = 30.0


@dataclass(eq=False, slots=True)
class Replica:
    """One replica and what the gateway knows of it. Totals only ever grow.

    in_flight: requests picked for it and not yet ended. ejected_until: `time.monotonic()`.
    """

    index: int
    target: Target
    healthy: bool = False
    reason: str = "not checked yet"
    in_flight: int = 0
    failures_in_row: int = 0
    missed_checks: int = 0
    ejected_until: float = 0.0
    picks: int = 0
    failures: int = 0
    relayed_bytes: int = 0
    relayed_chunks: int = 0

    def status(self) -> dict[str, Any]:
        """What /gateway/replicas says of it."""
        return {
            "url": str(self.target),
            "healthy": self.healthy,
            "reason": None if self.healthy else self.reason,
            "in_flight": self.in_flight,
            "picks": self.picks,
            "failures": self.failures,
            "relayed_bytes": self.relayed_bytes,
        }


class ReplicaSet:
    """The replicas in a fixed order, and the tasks that watch them."""

    def __init__(self, targets: Sequence[Target], policy: HealthPolicy) -> None:
        self.all = [Replica(index, target) for index, target in enumerate(targets)]
        self._policy = policy
        self._watchers: list[asyncio.Task[None]] = []

    def available(self, tried: Collection[Replica] = ()) -> list[Replica]:
        """Healthy replicas, in order, without those already tried."""
        return [r for r in self.all if r.healthy and r not in tried]

    def describe_outage(self) -> str:
        """Why no replica is available, for an error message."""
        if not self.all:
            return "no replica is configured"
        return "; ".join(f"{r.target}: {r.reason}" for r in self.all if not r.healthy)

    def failed(self, replica: Replica, reason: str) -> None:
        """A request met a failure: take the replica out for a while."""
        policy = self._policy
        delay = min(policy.backoff * 2.0**replica.failures_in_row, policy.backoff_limit)
        replica.failures += 1
        replica.failures_in_row += 1
        replica.healthy, replica.reason = False, reason
        replica.ejected_until = time.monotonic() + delay

    def succeeded(self, replica: Replica) -> None:
        """A request was answered in full."""
        replica.failures_in_row = 0

    def start(self) -> None:
        """Watch every replica until `stop`; needs a running loop."""
        self._watchers = [asyncio.create_task(self._watch(r)) for r in self.all]

    async def stop(self) -> None:
        """End the watching."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    async def _watch(self, replica: Replica) -> None:
        while True:
            await asyncio.sleep(self._policy.interval)
            await self.check(replica)

    async def check(self, replica: Replica) -> None:
        """One health check; it changes health, never the load counters."""
        try:
            response = await fetch(replica.target, "/health", timeout=self._policy.timeout)
        except TimeoutError:
            replica.missed_checks += 1
            if replica.missed_checks >= self._policy.misses:
                self._down(replica, f"no answer to {replica.missed_checks} health checks in a row")
            return
        except OSError as error:
            self._down(replica, f"health check failed ({error})")
            return
        replica.missed_checks = 0
        if response.status != 200:
            self._down(replica, f"/health says {response.status} ({error_text(response.body)})")
        elif time.monotonic() >= replica.ejected_until:
            replica.healthy, replica.reason = True, ""

    def _down(self, replica: Replica, reason: str) -> None:
        replica.healthy, replica.reason = False, reason
