"""Connections to replicas: those that are idle are kept, others are opened.

It knows no request; an exchange takes a connection, sends on it, and lets go of it.
"""

from __future__ import annotations

import asyncio
import ssl

from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.relay.replica_connection import ReplicaConnection
from millrace.gateway.routing.replicas import Replica


class Pool:
    """One process's connections to all replicas."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._idle: dict[Replica, list[ReplicaConnection]] = {}
        self._tls: ssl.SSLContext | None = None

    def take(self, replica: Replica) -> ReplicaConnection | None:
        """An open connection to the replica, the most recently used first."""
        idle = self._idle.get(replica, [])
        while idle:
            side = idle.pop()
            if side.open:
                return side
        return None

    async def open(self, replica: Replica) -> ReplicaConnection:
        """A new connection to the replica. Raises OSError; TimeoutError where nobody answers."""
        target = replica.target
        async with asyncio.timeout(self._limits.connect_timeout):
            _, side = await asyncio.get_running_loop().create_connection(
                lambda: ReplicaConnection(self, self._limits, replica),
                target.host,
                target.port,
                ssl=self._context() if target.tls else None,
            )
        return side

    def keep(self, side: ReplicaConnection) -> None:
        """Keep a connection for the next request to its replica."""
        idle = self._idle.setdefault(side.replica, [])
        if len(idle) < self._limits.max_idle and not side.replica.removed:
            idle.append(side)
        else:
            side.close()

    def drop(self, side: ReplicaConnection) -> None:
        """Forget a connection that has closed."""
        idle = self._idle.get(side.replica, [])
        if side in idle:
            idle.remove(side)

    def removed(self, replica: Replica) -> None:
        """The replica is gone for good."""
        for side in self._idle.pop(replica, []):
            side.close()

    def close(self) -> None:
        """Close every idle connection."""
        for idle in self._idle.values():
            for side in list(idle):
                side.close()

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls
