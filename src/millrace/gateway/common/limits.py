"""The bounds of a gateway, as numbers. Nothing here enforces them."""

from __future__ import annotations

import msgspec


class GatewayLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of a gateway. Times are seconds, sizes bytes.

    max_concurrent_requests, max_concurrent_batch: admitted requests of each service class, over
    all gateway processes. queue_size, batch_queue_size: requests of each class that may wait for
    admission, in each process; queue_timeout: for how long. max_requests_per_replica: 0 for any
    number. request_timeout: for a replica's first byte, and for each next one. client_timeout:
    for a client to complete a request (more for a large one) and to begin the next. max_body_bytes:
    of one request's body; max_bodies_bytes: of all bodies that one process holds, those of running
    requests among them. max_kept_bytes: of a running stream, kept to resume it;
    max_kept_bytes_all: of all streams of a process; a stream above either cannot be resumed.
    resume_timeout: how long a broken stream waits for a replica. max_retries: failures in a row
    before the first byte. max_resumptions: replicas that one stream may outlive. hold_timeout: how
    long a request waits while no replica is up; 0: it is refused at once. hold_size: requests that
    may wait so, in each process. hold_per_replica: how many of them a new replica gets at a time.
    hand_over_prompt: prompt tokens, as estimated, from which a prompt is computed by one replica
    and answered by another, where they have such roles. hand_over_ratio: prompt tokens for each
    token of the answer, where the client bounds it, below which one replica does both.
    hand_over_timeout: for the prompt. rebalance_gap: requests by which two replicas that answer
    must differ so that streams go from one to the other; 0: none does. move_record_tokens: of a
    stream so far, below which the other one computes them instead of taking a record.
    """

    max_concurrent_requests: int = 16384
    max_concurrent_batch: int = 8192
    max_requests_per_replica: int = 0
    queue_size: int = 1024
    batch_queue_size: int = 4096
    queue_timeout: float = 30.0
    request_timeout: float = 600.0
    max_body_bytes: int = 64 << 20
    max_bodies_bytes: int = 2 << 30
    max_kept_bytes: int = 4 << 20
    max_kept_bytes_all: int = 1 << 30
    max_head_bytes: int = 64 << 10
    max_pipelined: int = 16
    max_idle_connections: int = 1024
    connect_timeout: float = 5.0
    client_timeout: float = 120.0
    resume_timeout: float = 30.0
    max_retries: int = 3
    max_resumptions: int = 8
    hold_timeout: float = 0.0
    hold_size: int = 1024
    hold_per_replica: int = 64
    hand_over_prompt: int = 2048
    hand_over_ratio: float = 4.0
    hand_over_timeout: float = 120.0
    rebalance_gap: int = 0
    move_record_tokens: int = 512


class ScalePolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When more or fewer replicas are wanted (admin/scale.py).

    scale_requests: that one replica is meant to have at a time. scale_min, scale_max: replicas; 0
    for any number. scale_down_after, scale_zero_after: seconds of lower load, or of none, before
    fewer are wanted. scale_first_byte: seconds in which 95% of responses are to begin; 0 for any
    time.
    """

    scale_requests: int = 64
    scale_min: int = 0
    scale_max: int = 0
    scale_down_after: float = 300.0
    scale_zero_after: float = 300.0
    scale_first_byte: float = 0.0
