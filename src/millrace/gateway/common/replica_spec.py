"""What is configured of replicas and of their health checks, and the names of routing policies."""

from __future__ import annotations

from typing import Literal

import msgspec

from millrace.errors import UserError
from millrace.target import Target

PolicyName = Literal[
    "least_loaded", "round_robin", "random", "power_of_two", "prefix_aware", "consistent_hash"
]
Role = Literal["", "prefill", "decode", "both"]


class Records(msgspec.Struct, frozen=True):
    """Where a replica hands over the records of its prompts. engine: its id."""

    engine: str
    host: str
    port: int


DEFAULT_POLICY: PolicyName = "prefix_aware"
_MAX_MODELS, _MAX_NAME = 1000, 500


class HealthPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When replicas are checked and how long a failed one stays out. Times are seconds.

    max_missed_checks: health checks in a row without an answer after which a replica counts as
    lost. backoff: how long a replica stays out after its first failure; it doubles with each
    failure in a row, up to backoff_limit. idle_probe: a replica that has completed no request for
    this long must complete one token; 0 for never. load_interval: between two load reports; 0 for
    none.
    """

    health_check_interval: float = 1.0
    health_check_timeout: float = 5.0
    max_missed_checks: int = 2
    backoff: float = 1.0
    backoff_limit: float = 30.0
    idle_probe: float = 30.0
    probe_timeout: float = 60.0
    slow_start: float = 10.0
    load_interval: float = 0.2
    consecutive_failures: int = 5
    suspect_timeout: float = 300.0


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A configured replica. source: where it comes from; a source removes only its own replicas.
    models: empty to read them from the replica. role: in serving prompts and answers apart; empty
    to read it from the replica."""

    target: Target
    weight: float = 1.0
    limit: int = 0
    models: tuple[str, ...] = ()
    role: Role = ""
    source: str = "flags"


def check_spec(spec: ReplicaSpec) -> None:
    """Raise UserError for values that are out of range."""
    if not 0.0 < spec.weight <= 1000.0:
        raise UserError(f"{spec.target}: weight {spec.weight}: use a number above 0, to 1000")
    if not 0 <= spec.limit <= 1_000_000:
        raise UserError(f"{spec.target}: limit {spec.limit}: use 0, for any number, to 1000000")
    if len(spec.models) > _MAX_MODELS or not all(0 < len(m) <= _MAX_NAME for m in spec.models):
        raise UserError(
            f"{spec.target}: models: use up to {_MAX_MODELS} names of 1 to {_MAX_NAME} characters"
        )
