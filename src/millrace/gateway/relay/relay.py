"""What the connections of one process share: replicas, policy, limits, keys, body budget.

A relayed request has three parties: a client_connection, a replica_connection, and an exchange that
joins the two for one request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from millrace.common.safe_log import dropped_lines
from millrace.common.tasks import task_failures
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.http.bodies import BodyBudget
from millrace.gateway.http.message import LocalReply, Request, Upstream
from millrace.gateway.relay.access import Access
from millrace.gateway.relay.access_log import LoggedRequest
from millrace.gateway.relay.connection_pool import Pool
from millrace.gateway.relay.pair_checks import PairChecks
from millrace.gateway.relay.rebalance import Rebalancer
from millrace.gateway.relay.spans import RequestTracer
from millrace.gateway.resume.stream_buffer import BufferBudget
from millrace.gateway.routing.admission import AdmissionControl
from millrace.gateway.routing.first_copies import FirstCopies
from millrace.gateway.routing.held import HeldRequests
from millrace.gateway.routing.policies import Policy
from millrace.gateway.routing.replicas import Replica, ReplicaSet
from millrace.gateway.routing.suspects import SuspectRequests


class AdminHandler(Protocol):
    """Answers local requests: those for the gateway itself."""

    def handles(self, request: Request) -> bool:
        """Whether this request is a local one."""
        ...

    async def answer(self, request: Request) -> LocalReply:
        """The reply to it."""
        ...


class Client(Protocol):
    """A client's connection (client_connection.py). paused: the client reads too slowly. writer:
    the transport's write; None while a head is buffered, or once the client has gone."""

    paused: bool

    @property
    def writer(self) -> Callable[[bytes], None] | None: ...

    def write(self, data: bytes) -> None:
        """Send bytes; they are dropped if it has gone."""
        ...

    def buffer_head(self, data: bytes) -> None:
        """Send this head together with the next bytes."""
        ...

    def drop_head(self) -> None:
        """Forget the head that `buffer_head` was given."""
        ...

    def answer(self, own: LocalReply, request: Request) -> None:
        """Send a local reply and go on to the next request."""
        ...

    def finished(self, keep_alive: bool) -> None:
        """The current request has been answered: take the next one, or close."""
        ...

    def close_if_idle_since(self, moment: float) -> None:
        """Close if a request is awaited and nothing has come since then."""
        ...

    def close_when_done(self) -> None:
        """Close after the current request has been answered; now if there is none."""
        ...

    def close(self) -> None:
        """Drop the connection at once."""
        ...


class Relay:
    """The relay of one gateway process. log: called for each finished request; None for no log."""

    def __init__(
        self,
        replicas: ReplicaSet,
        policy: Policy,
        limits: GatewayLimits,
        admin: AdminHandler,
        *,
        admission: AdmissionControl,
        access: Access | None = None,
        log: Callable[[LoggedRequest, int], None] | None = None,
        tracer: RequestTracer | None = None,
    ) -> None:
        self.replicas = replicas
        self.process_counters = replicas.process_counters
        self.policy = policy
        self.limits = limits
        self.admin = admin
        self.admission = admission
        self.access = access or Access()
        self.log = log
        self.tracer = tracer or RequestTracer()
        self._upstreams: dict[Replica, Upstream] = {}
        self.in_flight = 0
        self.suspects = SuspectRequests()
        self.first_copies = FirstCopies()
        self.held = HeldRequests(self.process_counters, limits)
        self.buffer = BufferBudget(limits, self.process_counters)
        self.bodies = BodyBudget(limits, self.process_counters)
        self.pool = Pool(limits)
        self.clients: set[Client] = set()
        key = self.access.worker_api_key
        headers = (("Authorization", f"Bearer {key}"),) if key else ()
        self.pair_checks = PairChecks(self.process_counters, headers)
        self.rebalancer = Rebalancer(replicas, limits.rebalance_gap)
        self.viewers = 0  # clients that follow a stream of the gateway's own
        self.closing = False
        self._published = _process_totals()
        replicas.on_lost = self._lost
        replicas.on_removed = self._removed
        replicas.on_draining = self._draining

    def upstream(self, replica: Replica) -> Upstream:
        """What this replica is told instead of what clients send."""
        upstream = self._upstreams.get(replica)
        if upstream is None:
            access, host = self.access, replica.target.authority.encode()
            upstream = Upstream(host, access.upstream_authorization, access.secrets)
            self._upstreams[replica] = upstream
        return upstream

    def _removed(self, replica: Replica) -> None:
        self.pool.removed(replica)
        self._upstreams.pop(replica, None)
        self._lost(replica)

    def _lost(self, replica: Replica) -> None:
        """Nothing more will come from it: its requests go to other replicas."""
        for exchange in list(replica.exchanges):
            reason = f"lost ({replica.member.reason or 'removed'})"
            exchange.lost(reason, removed=replica.removed)

    def _draining(self, replica: Replica) -> None:
        """It is to become empty: where it hands records over, its streams go on elsewhere."""
        if replica.member.role:
            for exchange in list(replica.exchanges):
                exchange.move()

    def publish(self) -> None:
        """Bring this process's counters up to date; called periodically."""
        for replica in self.replicas.all:
            for exchange in replica.exchanges:
                exchange.publish(replica)
            replica.publish(self.process_counters)
        self.process_counters.set_event("cpu_ns", time.process_time_ns())
        for name, total in _process_totals().items():
            # An earlier process with the same counters may have counted before this one.
            self.process_counters.count_event(name, total - self._published[name])
            self._published[name] = total

    def sweep(self) -> None:
        """Close clients that have been silent for longer than client_timeout."""
        oldest = asyncio.get_running_loop().time() - self.limits.client_timeout
        for client in list(self.clients):
            client.close_if_idle_since(oldest)

    async def drain(self, seconds: float) -> None:
        """Give running requests so many seconds to end; connections close after them."""
        self.closing = True
        for client in list(self.clients):
            client.close_when_done()
        end = asyncio.get_running_loop().time() + seconds
        while self.in_flight and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Close every connection at once, also those with a running request."""
        for client in list(self.clients):
            client.close()
        self.pair_checks.close()
        self.pool.close()


def _process_totals() -> dict[str, int]:
    """Totals that all of this process counts, by the names of their events."""
    return {"log_lines_dropped": dropped_lines(), "task_failures": task_failures()}
