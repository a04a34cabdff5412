"""A gateway in the test's own event loop, in front of mock replicas."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from millrace.common.http_client import Target, parse_url
from millrace.common.sockets import free_port
from millrace.gateway.app import Gateway
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.health.health_monitor import HealthPolicy, ReplicaSpec
from millrace.gateway.processes.options import GatewayOptions
from millrace.gateway.routing.replicas import ReplicaSet

FAST = HealthPolicy(
    health_check_interval=0.05, health_check_timeout=1.0, backoff=0.2, slow_start=0.0
)


@contextlib.asynccontextmanager
async def gateway(*urls: str, **options: Any) -> AsyncIterator[tuple[Gateway, Target]]:
    """A started gateway, checking health quickly, and where it listens. It spreads requests evenly
    unless told otherwise, though tests send the same prompt again and again."""
    options.setdefault("policy", "least_loaded")
    options.setdefault("health", FAST)
    options.setdefault("replicas", [ReplicaSpec(target=parse_url(u)) for u in urls])
    several = options.get("processes", 1) > 1
    options.setdefault("admin_port", free_port("127.0.0.1") if several else 0)
    log = options.pop("log", lambda line: None)
    made = Gateway(GatewayOptions(port=0, **options), log=log)
    await made.start()
    try:
        yield made, Target("127.0.0.1", made.port)
    finally:
        await made.stop()


def replica_set() -> ReplicaSet:
    """A set of no replicas, with counters of its own."""
    counters = SharedCounters(1)
    return ReplicaSet(counters, counters.process_counters(0), lambda id, outcome: None)


def streamed(made: Gateway, replica: int = 0) -> int:
    """Pieces that have come of the responses which a replica has under way."""
    return sum(e.account.chunks for e in made.replicas.all[replica].exchanges)
