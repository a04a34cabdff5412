"""How much a gateway takes on and how long it waits: numbers; nothing here acts on them."""

from __future__ import annotations

import msgspec


class GatewayLimits(msgspec.Struct, frozen=True, kw_only=True):
    """max_in_flight, max_batch: requests of each service class at once, over all processes.
    queue, batch_queue: requests of each class that may wait for that, in each process;
    queue_timeout: for how long. per_replica: requests at once at one replica, 0 for any number.
    timeout: seconds in which a replica must bring its first byte, and each next one.
    client_timeout: seconds for a client to complete a request, more for a large one, and to begin
    the next. max_body: bytes of a request's body, all_bodies: of all of a process that are held,
    those of requests under way among them.
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
    all_bodies: int = 2 << 30
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
