"""Connections to replicas: idle ones are kept, others are opened.

It knows no request; an exchange takes a connection, sends on it, and releases it.
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
            connection = idle.pop()
            if connection.open:
                return connection
        return None

    async def open(self, replica: Replica) -> ReplicaConnection:
        """A new connection to the replica. Raises OSError; TimeoutError if connecting takes too
        long."""
        target = replica.target
        async with asyncio.timeout(self._limits.connect_timeout):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: ReplicaConnection(self, self._limits, replica),
                target.host,
                target.port,
                ssl=self._context() if target.tls else None,
            )
        return connection

    def idle(self, replica: Replica) -> list[ReplicaConnection]:
        """The idle connections to a replica."""
        return list(self._idle.get(replica, ()))

    def keep(self, connection: ReplicaConnection) -> None:
        """Keep a connection for the next request to its replica."""
        idle = self._idle.setdefault(connection.replica, [])
        if len(idle) < self._limits.max_idle_connections and not connection.replica.removed:
            idle.append(connection)
        else:
            connection.close()

    def drop(self, connection: ReplicaConnection) -> None:
        """Remove a connection that has closed."""
        idle = self._idle.get(connection.replica, [])
        if connection in idle:
            idle.remove(connection)

    def removed(self, replica: Replica) -> None:
        """Close the idle connections of a replica that was removed."""
        for connection in self._idle.pop(replica, []):
            connection.close()

    def close(self) -> None:
        """Close every idle connection."""
        for idle in self._idle.values():
            for connection in list(idle):
                connection.close()

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls
