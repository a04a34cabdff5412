"""The load of one request at its replica, and the bytes and chunks of its response."""

from __future__ import annotations

from millrace.gateway.http.request_info import RequestInfo
from millrace.gateway.routing.replicas import InFlight, Replica, ReplicaSet


class LoadAccount:
    """A request's share of the load counters. bytes, chunks: of its response, over all replicas.

    Its load is its prompt and the expected output; an output that grows beyond that counts as it
    is. Chunks stand for tokens; load reports correct the difference.
    """

    __slots__ = (
        "_bytes_published",
        "_chunks_published",
        "_replica_set",
        "_resident",
        "_size",
        "_streams",
        "bytes",
        "chunks",
    )  # fmt: skip

    def __init__(self, replica_set: ReplicaSet) -> None:
        self._replica_set = replica_set
        self.bytes = self.chunks = 0
        self._bytes_published = self._chunks_published = 0
        self._size = self._resident = 0
        self._streams = False

    def begin(self, replica: Replica, info: RequestInfo, made: int, exchange: InFlight) -> None:
        """The request runs at this replica now. made: output tokens that it resumes from."""
        replica.exchanges.add(exchange)
        self._streams = info.stream
        self._resident = info.prompt_tokens + made
        self._size = info.prompt_tokens + max(made, self._replica_set.expected_output_tokens(info))
        self._bytes_published, self._chunks_published = self.bytes, self.chunks
        self._replica_set.request_started(replica, self._size, self._resident)

    def publish(self, replica: Replica) -> None:
        """Bring the replica's counters up to date."""
        new = self.chunks - self._chunks_published
        if not new:
            return
        replica.chunks += new
        replica.bytes += self.bytes - self._bytes_published
        self._bytes_published, self._chunks_published = self.bytes, self.chunks
        if self._streams:
            self._resident += new
            replica.resident_growth += new
            if self._resident > self._size:
                replica.load_growth += self._resident - self._size
                self._size = self._resident

    def end(self, replica: Replica, exchange: InFlight) -> None:
        """The request has left the replica."""
        self.publish(replica)
        replica.exchanges.discard(exchange)
        self._replica_set.request_ended(replica, self._size, self._resident)
