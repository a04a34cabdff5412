"""Configurations of other proxies for the same replicas, for those who only need load balancing.

What all of them lack: a stream that breaks with its replica stays broken; load is counted in
connections, not tokens; no routing by prefix; a health check is a GET.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from millrace.errors import UserError
from millrace.gateway.common.replica_spec import ReplicaSpec


def nginx(specs: Sequence[ReplicaSpec], host: str, port: int) -> str:
    """nginx.conf. Without proxy_buffering off, tokens wait until a buffer is full."""
    servers = "".join(
        f"    server {s.target.authority} weight={_weight(s)} max_conns={s.limit} max_fails=1 "
        f"fail_timeout=10s;\n"
        for s in specs
    )
    return f"""# Made by `millrace gateway render nginx`.
worker_processes auto;
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
  upstream replicas {{
    zone replicas 256k;  # one count for all worker processes
    least_conn;
{servers}    keepalive 1024;
  }}
  server {{
    listen {host}:{port} backlog=4096;
    client_max_body_size 64m;
    client_body_buffer_size 1m;
    location / {{
      proxy_pass {_scheme(specs)}://replicas;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_set_header X-Request-Id $request_id;
      proxy_buffering off;  # pass each token on at once
      proxy_read_timeout 600s;
      proxy_next_upstream error timeout http_503 http_429 non_idempotent;
      proxy_next_upstream_tries 3;
    }}
  }}
}}
"""


def haproxy(specs: Sequence[ReplicaSpec], host: str, port: int) -> str:
    """haproxy.cfg. Without http-no-delay, tokens are sent together, up to 200 ms late."""
    tls = " ssl verify required ca-file @system-ca" if _scheme(specs) == "https" else ""
    servers = "".join(
        f"  server replica{i} {s.target.authority} weight {min(256, _weight(s))} "
        f"{f'maxconn {s.limit} ' if s.limit else ''}check{tls}\n"
        for i, s in enumerate(specs)
    )
    return f"""# Made by `millrace gateway render haproxy`.
defaults
  mode http
  option http-no-delay
  option redispatch
  retries 3
  retry-on conn-failure empty-response 503
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout queue 30s
frontend clients
  bind {host}:{port}
  unique-id-format %[uuid()]
  http-request set-header X-Request-Id %[unique-id] unless {{ req.hdr(X-Request-Id) -m found }}
  default_backend replicas
backend replicas
  balance leastconn
  option httpchk GET /health
  http-reuse always
  default-server inter 1s fall 2 rise 1 slowstart 10s
{servers}"""


def envoy(specs: Sequence[ReplicaSpec], host: str, port: int) -> str:
    """envoy.yaml, as JSON, which is YAML too. Its default circuit breaker, 1,024 requests active
    and 1,024 waiting, is raised: it would refuse the rest."""
    config = {
        "static_resources": {
            "listeners": [_envoy_listener(host, port)],
            "clusters": [_envoy_cluster(specs)],
        }
    }
    return msgspec.json.format(msgspec.json.encode(config), indent=2).decode() + "\n"


def _envoy_listener(host: str, port: int) -> dict[str, object]:
    manager = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    retries = {
        "retry_on": "connect-failure,refused-stream,reset-before-request,retriable-status-codes",
        "retriable_status_codes": [429, 503],
        "num_retries": 3,
    }
    route = {
        "cluster": "replicas",
        "timeout": "0s",
        "idle_timeout": "600s",
        "retry_policy": retries,
    }
    hosts = [
        {
            "name": "all",
            "domains": ["*"],
            "routes": [{"match": {"prefix": "/"}, "route": route}],
        }
    ]
    router = "envoy.extensions.filters.http.router.v3.Router"
    config = {
        "@type": f"type.googleapis.com/{manager}",
        "stat_prefix": "clients",
        "stream_idle_timeout": "600s",
        "route_config": {"virtual_hosts": hosts},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"type.googleapis.com/{router}"},
            }
        ],
    }
    chain = {
        "filters": [
            {"name": "envoy.filters.network.http_connection_manager", "typed_config": config}
        ]
    }
    address = {"socket_address": {"address": host, "port_value": port}}
    return {"name": "clients", "address": address, "filter_chains": [chain]}


def _envoy_cluster(specs: Sequence[ReplicaSpec]) -> dict[str, object]:
    endpoints = [
        {
            "endpoint": {
                "address": {
                    "socket_address": {"address": s.target.host, "port_value": s.target.port}
                }
            },
            "load_balancing_weight": _weight(s),
        }
        for s in specs
    ]
    bound = 1_000_000
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), bound)
    cluster: dict[str, object] = {
        "name": "replicas",
        "type": "STRICT_DNS",
        "connect_timeout": "5s",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {"cluster_name": "replicas", "endpoints": [{"lb_endpoints": endpoints}]},
        "circuit_breakers": {"thresholds": [{**limits, "max_retries": 1000}]},
        "health_checks": [
            {
                "timeout": "5s",
                "interval": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "http_health_check": {"path": "/health"},
            }
        ],
    }
    if _scheme(specs) == "https":
        context = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {"@type": f"type.googleapis.com/{context}"},
        }
    return cluster


def _scheme(specs: Sequence[ReplicaSpec]) -> str:
    schemes = {"https" if spec.target.tls else "http" for spec in specs}
    if len(schemes) > 1:
        raise UserError("--worker-urls: use http for all replicas or https for all")
    return schemes.pop()


def _weight(spec: ReplicaSpec) -> int:
    return max(1, round(spec.weight))


RENDERERS: Mapping[str, Callable[[Sequence[ReplicaSpec], str, int], str]] = {
    "nginx": nginx,
    "haproxy": haproxy,
    "envoy": envoy,
}


def render(kind: str, specs: Sequence[ReplicaSpec], host: str, port: int) -> str:
    """The configuration of this kind of proxy. Raises UserError for what it cannot do."""
    if any(spec.models for spec in specs):
        raise UserError(
            "--worker-urls: models= needs `millrace gateway`; others cannot read bodies"
        )
    return RENDERERS[kind](specs, host, port)
