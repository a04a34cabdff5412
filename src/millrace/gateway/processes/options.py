"""The options of a gateway, their help texts, and the check of which cannot work together.

It knows no command line and starts nothing; command.py makes flags from these structs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import msgspec

from millrace.batch.jobs.settings import BatchSettings, read_settings
from millrace.errors import UserError
from millrace.gateway.common.limits import GatewayLimits, ScalePolicy
from millrace.gateway.common.replica_spec import (
    DEFAULT_POLICY,
    HealthPolicy,
    PolicyName,
    ReplicaSpec,
)
from millrace.gateway.relay.access import Access, is_loopback
from millrace.logs.otlp import HELP as OTLP_HELP
from millrace.logs.otlp import check_endpoint


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a user sets of a gateway, by flags or in a file. Help texts are in `GATEWAY_HELP`."""

    worker_file: str | None = None
    worker_dns: list[str] = []
    host: str = "127.0.0.1"
    port: int = 8000
    processes: int = 1
    policy: PolicyName = DEFAULT_POLICY
    affinity_gap: int = 4096
    limits: GatewayLimits = GatewayLimits()
    scale: ScalePolicy = ScalePolicy()
    health: HealthPolicy = HealthPolicy()
    access: Access = Access()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None
    admin_uds: str | None = None
    access_log: str | None = None
    merge_metrics: bool = False
    otlp_traces_endpoint: str | None = None
    batch_dir: str | None = None
    batch_dir_gb: float = 50.0
    batch_max_in_flight: int = 64


class GatewayOptions(GatewaySettings, frozen=True, kw_only=True):
    """Options of one gateway: its settings and what its caller knows.

    replicas: those that are there from the start. labels: names of replicas in merged metrics, by
    URL.
    """

    replicas: Sequence[ReplicaSpec] = ()
    labels: dict[str, str] = {}
    disable_log_stats: bool = False


GATEWAY_HELP: Mapping[str, str] = {
    "worker_file": "File with one replica per line; changes to it are followed.",
    "worker_dns": "name:port; every address of the name is a replica.",
    "host": "Address to listen on.",
    "port": "Port to listen on; 0 takes a free one.",
    "processes": "Gateway processes that share the port.",
    "policy": "How a replica is picked for a request.",
    "affinity_gap": "prefix_aware: tokens by which a replica's load may exceed the lowest load.",
    "ssl_certfile": "File with the certificate (PEM) for HTTPS.",
    "ssl_keyfile": "File with the certificate's private key.",
    "admin_host": "Address of --admin-port; other than loopback it needs --admin-key.",
    "admin_port": "Port for changes to the gateway, apart from the public one.",
    "admin_uds": "Unix socket for changes to the gateway; only this user can connect.",
    "access_log": "File that gets one line of JSON per request; - for stderr.",
    "merge_metrics": "Add the metrics of the replicas to /metrics.",
    "otlp_traces_endpoint": OTLP_HELP,
    "batch_dir": "Directory for /v1/files and /v1/batches; what is in it outlives the gateway.",
    "batch_dir_gb": "Most gigabytes of all files there.",
    "batch_max_in_flight": "Requests that one batch has in flight.",
    "disable_log_stats": "Write no line of figures every 10 seconds under load.",
}

LIMITS_HELP: Mapping[str, str] = {
    "max_concurrent_requests": "Interactive requests that run at the same time.",
    "max_concurrent_batch": "Batch requests that run at the same time.",
    "max_requests_per_replica": "Requests that one replica gets at the same time; 0: any number.",
    "queue_size": "Interactive requests that may wait, per gateway process.",
    "batch_queue_size": "Batch requests that may wait, per gateway process.",
    "queue_timeout": "Seconds that a request may wait in the queue.",
    "request_timeout": "Seconds that a replica may send no byte of a response.",
    "max_body_bytes": "Largest request body.",
    "max_bodies_bytes": "Bytes of all request bodies that one gateway process holds, those of "
    "running requests included.",
    "hold_timeout": "Seconds that a request waits while no replica is up; 0: none waits.",
    "hold_size": "Requests that may wait so, per gateway process.",
    "hold_per_replica": "How many of these a new replica gets at a time.",
    "hand_over_prompt": "Least prompt tokens, as estimated, of a request whose prompt one replica "
    "computes (role prefill) and another answers (role decode).",
    "hand_over_ratio": "Least prompt tokens of such a request for each token of its answer, where "
    "it bounds that.",
    "hand_over_timeout": "Seconds that such a prompt may take.",
    "rebalance_gap": "Requests by which two replicas (role decode or both) must differ so that "
    "running streams go from one to the other; 0: none does.",
    "move_record_tokens": "Tokens of such a stream so far, below which the other replica computes "
    "them instead of taking a record.",
    "max_kept_bytes": "Bytes of a stream that are kept to resume it on another replica; a longer "
    "stream cannot be resumed. 0: no stream is.",
}

SCALE_HELP: Mapping[str, str] = {
    "scale_requests": "/gateway/scale: requests that one replica is meant to have at a time.",
    "scale_min": "/gateway/scale: fewest replicas.",
    "scale_max": "/gateway/scale: most replicas; 0: any number.",
    "scale_down_after": "/gateway/scale: seconds of lower load before fewer replicas are wanted.",
    "scale_zero_after": "/gateway/scale: seconds without a request before none is wanted.",
    "scale_first_byte": "/gateway/scale: seconds in which 95% of responses are to begin; one more "
    "replica is wanted while they do not. 0: any time.",
}

HEALTH_HELP: Mapping[str, str] = {
    "health_check_interval": "Seconds between two health checks of a replica.",
    "health_check_timeout": "Seconds that a health check may take.",
    "idle_probe": "Seconds after which an idle replica must complete one token; 0: never.",
    "slow_start": "Seconds in which a new replica's share of requests grows to its full weight.",
    "consecutive_failures": "Different requests that must fail in a row at a replica to eject it.",
    "suspect_timeout": "Seconds for which a request is refused on which two replicas failed; "
    "0: it is not.",
    "load_interval": "Seconds between two load reports of a replica; 0: none are read.",
}

ACCESS_HELP: Mapping[str, str] = {
    "api_key": "Key that clients must send to use the API.",
    "admin_key": "Key for changes to the gateway. Without one they must be sent to --admin-port or "
    "--admin-uds.",
    "worker_api_key": "Key that the replicas ask for: their --gateway-api-key if they have one.",
    "allowed_origins": "Page whose scripts may read the gateway's own replies; * is every page; "
    "replicas answer for theirs.",
    "cache_salt_by_api_key": "Share cached prefixes only among requests of the same API key.",
}


def batch_settings(options: GatewaySettings) -> BatchSettings | None:
    """Where and how batches run; None where they do not. Raises ConfigError."""
    if options.batch_dir is None:
        return None
    return read_settings(options.batch_dir, options.batch_dir_gb, options.batch_max_in_flight)


def check_options(options: GatewayOptions) -> None:
    """Raise UserError for options that cannot work."""
    policies = get_args(PolicyName)
    if options.policy not in policies:
        raise UserError(f"--policy {options.policy!r}: use one of {', '.join(policies)}")
    if not 1 <= options.processes <= 128:
        raise UserError(f"--processes {options.processes}: use 1 to 128")
    limits = options.limits
    for name in ("max_concurrent_requests", "max_concurrent_batch", "max_body_bytes"):
        if getattr(limits, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(limits, name)}: use 1 or more")
    for name in ("hold_size", "hold_per_replica"):
        if getattr(limits, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(limits, name)}: use 1 or more")
    _check_scale(options.scale)
    check_endpoint(options.otlp_traces_endpoint)
    if limits.max_bodies_bytes < limits.max_body_bytes:
        raise UserError(
            f"--max-bodies-bytes {limits.max_bodies_bytes}: use at least --max-body-bytes, "
            f"{limits.max_body_bytes}, or a body of that size is never accepted"
        )
    options.access.check()
    _check_admin(options)
    batch_settings(options)

    from millrace.common.sockets import tls_context

    tls_context(options.ssl_certfile, options.ssl_keyfile)


def _check_scale(policy: ScalePolicy) -> None:
    if policy.scale_requests < 1:
        raise UserError(f"--scale-requests {policy.scale_requests}: use 1 or more")
    if policy.scale_min < 0 or 0 < policy.scale_max < policy.scale_min:
        raise UserError(
            f"--scale-min {policy.scale_min}, --scale-max {policy.scale_max}: use 0 or more, and "
            f"0 or no less than the first"
        )


def _check_admin(options: GatewayOptions) -> None:
    if options.admin_port is None:
        return
    if not 0 <= options.admin_port <= 65535 or (options.admin_port == 0 and options.processes > 1):
        raise UserError(f"--admin-port {options.admin_port}: use 1 to 65535")
    if options.admin_port == options.port != 0:
        raise UserError(f"--admin-port {options.admin_port}: use another port than --port")
    if options.access.admin_key is None and not is_loopback(options.admin_host):
        raise UserError(
            f"--admin-host {options.admin_host}: give it --admin-key, or whoever reaches it may "
            "change the gateway; without a key use 127.0.0.1"
        )
