"""What the connections of one process share: replicas, picker, limits, keys, room for bodies.

The three parties of a relayed request are in modules of their own: `client_side` is a client's
connection, `replica_side` one to a replica, and an `exchange` joins the two for one request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.http.bodies import BodyBudget
from millrace.gateway.http.message import Answer, Request
from millrace.gateway.relay.access import Access
from millrace.gateway.relay.access_log import Relayed
from millrace.gateway.relay.connection_pool import Pool
from millrace.gateway.resume.stream_buffer import BufferBudget
from millrace.gateway.routing.admission import AdmissionControl
from millrace.gateway.routing.policies import Policy
from millrace.gateway.routing.replicas import Replica, ReplicaSet


class AdminHandler(Protocol):
    """Answers the gateway's own paths."""

    def owns(self, request: Request) -> bool:
        """Whether this request is for the gateway itself."""
        ...

    async def answer(self, request: Request) -> Answer:
        """Its answer."""
        ...


class Client(Protocol):
    """A client's connection (client_connection.py). paused: it takes no bytes for now. writer:
    takes bytes straight to it; None while some are held, or once it has gone."""

    paused: bool

    @property
    def writer(self) -> Callable[[bytes], None] | None: ...

    def write(self, data: bytes) -> None:
        """Send bytes, or drop them when it has gone."""
        ...

    def hold(self, data: bytes) -> None:
        """Send these bytes together with the next ones."""
        ...

    def answer(self, own: Answer, request: Request) -> None:
        """Send a whole answer of the gateway's own and go on."""
        ...

    def finished(self, keep_alive: bool) -> None:
        """The request under way has been answered: take the next, or close."""
        ...

    def close_if_silent_since(self, moment: float) -> None:
        """Close if the client owes us a request and has sent nothing since then."""
        ...

    def close_when_done(self) -> None:
        """Close once the request under way has been answered; now if there is none."""
        ...

    def close(self) -> None:
        """Drop the connection at once."""
        ...


class Relay:
    """One process's share of the gateway. log: takes a line for each request, None for no log."""

    def __init__(
        self,
        replicas: ReplicaSet,
        policy: Policy,
        limits: GatewayLimits,
        admin: AdminHandler,
        *,
        admission: AdmissionControl,
        access: Access | None = None,
        log: Callable[[Relayed, int], None] | None = None,
    ) -> None:
        self.replicas = replicas
        self.part = replicas.part
        self.policy = policy
        self.limits = limits
        self.admin = admin
        self.admission = admission
        self.access = access or Access()
        self.log = log
        self.in_flight = 0
        self.buffer = BufferBudget(limits, self.part)
        self.bodies = BodyBudget(limits, self.part)
        self.pool = Pool(limits)
        self.clients: set[Client] = set()
        self.closing = False
        replicas.on_lost = self._lost
        replicas.on_removed = self._removed

    def _removed(self, replica: Replica) -> None:
        self.pool.removed(replica)
        self._lost(replica)

    def _lost(self, replica: Replica) -> None:
        """Nothing more will come from it: what it carries goes elsewhere."""
        for exchange in list(replica.exchanges):
            exchange.failed(f"lost ({replica.member.reason or 'removed'})", lost=True)

    def publish(self) -> None:
        """Bring this process's part of the board up to date; to be called every now and then."""
        for replica in self.replicas.all:
            for exchange in replica.exchanges:
                exchange.publish(replica)
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
        self.pool.close()
