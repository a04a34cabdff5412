"""What is simulated: a load, replicas of one kind, a gateway, and what happens to them."""

from __future__ import annotations

from typing import Protocol

import msgspec

from millrace.bench.load.options import BenchOptions
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.replica_spec import HealthPolicy
from millrace.model.work import StepShape
from millrace.plan.model.step_model import StepTimes
from millrace.protocol import Limits
from millrace.simulate.common.lifecycle import LifeOptions

PUBLISH_SECONDS = 0.5  # between two looks of a gateway process at its streams' chunks


class StepTime(Protocol):
    """What is needed of a step model."""

    def times(self, shape: StepShape) -> StepTimes:
        """Seconds of a step: what the device waits for on the host, and what it computes."""
        ...


class Speeds(msgspec.Struct, frozen=True):
    """What a step model does not say. acceptance: of each draft, given that all before it were
    accepted. jitter: relative spread of the time of single steps. host_copy, disk_copy: bytes a
    second between device, host memory and files; link: of each replica to the others."""

    acceptance: tuple[float, ...] = ()
    jitter: float = 0.0
    host_copy: float = 25e9
    disk_copy: float = 2e9
    link: float = 25e9


class ApiServerCost(msgspec.Struct, frozen=True):
    """Seconds of the API server's thread for a request, and for a chunk of a stream."""

    request: float = 0.0
    chunk: float = 0.0


class ReplicaKind(msgspec.Struct, frozen=True, kw_only=True):
    """What replicas of one kind have in common. depth: steps launched ahead of the last result."""

    limits: Limits
    model: StepTime
    speeds: Speeds = Speeds()
    api_server: ApiServerCost = ApiServerCost()
    depth: int = 1


class GatewayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """policy: its name. gap: of prefix_aware. processes: they share the chunks; 0: as many as are
    needed. chunk_seconds: of one of them for a chunk. network_seconds: each way between client and
    gateway. max_tokens: what requests ask for, where their text ends before; 0: they ask for what
    they get."""

    policy: str = "least_loaded"
    gap: int = 4096
    processes: int = 0
    chunk_seconds: float = 0.0
    network_seconds: float = 1e-4
    max_tokens: int = 0
    limits: GatewayLimits = GatewayLimits()
    health: HealthPolicy = HealthPolicy()
    seed: int = 0


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated. load: as of `millrace bench serve`; its target is not used. check: test
    the engines' invariants after every step."""

    load: BenchOptions
    kind: ReplicaKind
    gateway: GatewayOptions
    life: LifeOptions
    seed: int = 0
    check: bool = False
