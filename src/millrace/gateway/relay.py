"""What the connections of one process share: replicas, picker, limits, keys, idle connections.

The three parties of a relayed request are in modules of their own: `client_side` is a client's
connection, `replica_side` one to a replica, and an `exchange` joins the two for one request.
"""

from __future__ import annotations

import asyncio
import hmac
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from millrace.gateway.admission import Admission
from millrace.gateway.message import Answer, Request, header
from millrace.gateway.picker import Picker
from millrace.gateway.replicas import Replica, ReplicaSet

if TYPE_CHECKING:
    from millrace.gateway.client_side import ClientSide
    from millrace.gateway.exchange import Exchange
    from millrace.gateway.replica_side import ReplicaSide


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """max_in_flight, max_batch: requests of each service class at once, over all processes.
    queue, batch_queue: requests of each class that may wait for that, in each process;
    queue_timeout: for how long. per_replica: requests at once at one replica, 0 for any number.
    timeout: seconds in which a replica must bring its first byte, and each next one.
    client_timeout: seconds for a client to complete a request, and to begin the next.
    max_kept: bytes kept of a running stream, all_kept: of all of a process; above them a stream
    cannot be resumed. resume_wait: seconds to wait for a replica that could go on with a stream.
    retries: replicas tried in a row without a byte. moves: replicas one stream may outlive.
    Sizes in bytes."""

    max_in_flight: int = 16384
    max_batch: int = 8192
    queue: int = 1024
    batch_queue: int = 4096
    queue_timeout: float = 30.0
    per_replica: int = 0
    max_body: int = 64 << 20
    max_head: int = 64 << 10
    max_pipelined: int = 16
    max_idle: int = 1024
    connect_timeout: float = 5.0
    timeout: float = 600.0
    client_timeout: float = 120.0
    max_kept: int = 4 << 20
    all_kept: int = 1 << 30
    resume_wait: float = 30.0
    retries: int = 3
    moves: int = 8


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """api_keys: what clients must bring one of, none for an open gateway. admin_key: for changes
    to the gateway itself; without one they are taken from this host alone. worker_key: what
    replicas ask for."""

    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    worker_key: str | None = None

    def admits(self, request: Request) -> bool:
        """Whether the client may use the API."""
        return not self.api_keys or _bears(request, self.api_keys)

    def administers(self, request: Request) -> bool:
        """Whether the client may change the gateway."""
        if self.admin_key is not None:
            return _bears(request, (self.admin_key,))
        return request.peer in ("127.0.0.1", "::1", "::ffff:127.0.0.1")

    @property
    def upstream(self) -> bytes | None:
        """The Authorization that replicas get; None: the client's own."""
        if self.worker_key is not None:
            return b"Bearer " + self.worker_key.encode()
        return b"" if self.api_keys else None


def _bears(request: Request, keys: tuple[str, ...]) -> bool:
    scheme, _, given = header(request.headers, b"authorization").partition(b" ")
    held = given.strip() if scheme.lower() == b"bearer" else header(request.headers, b"x-api-key")
    # Every key is compared, so that the time says nothing about which one was near.
    return sum(hmac.compare_digest(held, key.encode()) for key in keys) > 0


class Desk(Protocol):
    """Answers the gateway's own paths."""

    def owns(self, request: Request) -> bool:
        """Whether this request is for the gateway itself."""
        ...

    async def answer(self, request: Request) -> Answer:
        """Its answer."""
        ...


class Relay:
    """One process's share of the gateway. log: takes a line for each request, None for no log."""

    def __init__(
        self,
        replicas: ReplicaSet,
        picker: Picker,
        limits: Limits,
        desk: Desk,
        *,
        admission: Admission,
        access: Access | None = None,
        log: Callable[[Exchange, int], None] | None = None,
    ) -> None:
        self.replicas = replicas
        self.part = replicas.part
        self.picker = picker
        self.limits = limits
        self.desk = desk
        self.admission = admission
        self.access = access or Access()
        self.log = log
        self.in_flight = 0
        self.kept = 0
        self.clients: set[ClientSide] = set()
        self.closing = False
        self._idle: dict[Replica, list[ReplicaSide]] = {}
        self._tls: ssl.SSLContext | None = None
        replicas.on_lost = self._lost
        replicas.on_removed = self._removed

    def tls(self) -> ssl.SSLContext:
        """For replicas behind https."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    # --- connections to replicas ---------------------------------------------------------------

    def take_idle(self, replica: Replica) -> ReplicaSide | None:
        """An open connection to the replica, the most recently used first."""
        idle = self._idle.get(replica, [])
        while idle:
            side = idle.pop()
            if side.open:
                return side
        return None

    def keep_idle(self, side: ReplicaSide) -> None:
        """Keep a connection for the next request to its replica."""
        idle = self._idle.setdefault(side.replica, [])
        if len(idle) < self.limits.max_idle and not side.replica.removed:
            idle.append(side)
        else:
            side.close()

    def drop_idle(self, side: ReplicaSide) -> None:
        """Forget a connection that has closed."""
        idle = self._idle.get(side.replica, [])
        if side in idle:
            idle.remove(side)

    def _removed(self, replica: Replica) -> None:
        for side in self._idle.pop(replica, []):
            side.close()
        self._lost(replica)

    def _lost(self, replica: Replica) -> None:
        """Nothing more will come from it: what it carries goes elsewhere."""
        for exchange in list(replica.exchanges):
            exchange.failed(f"lost ({replica.member.reason or 'removed'})", lost=True)

    # --- the whole -------------------------------------------------------------------------------

    def publish(self) -> None:
        """Bring this process's part of the board up to date; to be called every now and then."""
        for replica in self.replicas.all:
            for exchange in replica.exchanges:
                exchange.carried.publish(replica)
            replica.publish(self.part)
        self.part.set_event("cpu_ns", time.process_time_ns())

    def sweep(self) -> None:
        """Close clients that have been silent for too long."""
        oldest = asyncio.get_running_loop().time() - self.limits.client_timeout
        for client in list(self.clients):
            client.close_if_silent_since(oldest)

    async def drain(self, seconds: float) -> None:
        """Let requests under way end, for so long; connections close behind them."""
        self.closing = True
        for client in list(self.clients):
            client.close_when_done()
        end = asyncio.get_running_loop().time() + seconds
        while self.in_flight and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Drop every connection, those with a request under way too."""
        for client in list(self.clients):
            client.close()
        for idle in self._idle.values():
            for side in list(idle):
                side.close()
