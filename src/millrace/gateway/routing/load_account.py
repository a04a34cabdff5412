"""What one request weighs at the replica that carries it, and what it has brought so far."""

from __future__ import annotations

from millrace.gateway.http.request_info import RequestInfo
from millrace.gateway.routing.replicas import InFlight, Replica, ReplicaSet


class LoadAccount:
    """A request's share of the load counters. bytes, chunks: of its response, over all replicas.

    It weighs its prompt and the output that is to be expected; an output that grows beyond that
    weighs what it has become. Chunks stand for tokens; load reports correct what that misses.
    """

    __slots__ = (
        "_bytes_told", "_chunks_told", "_fleet", "_grows", "_resident", "_size", "bytes", "chunks",
    )  # fmt: skip

    def __init__(self, fleet: ReplicaSet) -> None:
        self._fleet = fleet
        self.bytes = self.chunks = 0
        self._bytes_told = self._chunks_told = 0
        self._size = self._resident = 0
        self._grows = False

    def begin(self, replica: Replica, info: RequestInfo, made: int, exchange: InFlight) -> None:
        """The replica carries the request now. made: output tokens that it goes on from."""
        replica.exchanges.add(exchange)
        self._grows = info.stream
        self._resident = info.prompt_tokens + made
        self._size = info.prompt_tokens + max(made, self._fleet.expected_output(info))
        self._bytes_told, self._chunks_told = self.bytes, self.chunks
        self._fleet.picked(replica, self._size, self._resident)

    def publish(self, replica: Replica) -> None:
        """Bring the replica's counters up to date."""
        new = self.chunks - self._chunks_told
        if not new:
            return
        replica.chunks += new
        replica.bytes += self.bytes - self._bytes_told
        self._bytes_told, self._chunks_told = self.bytes, self.chunks
        if self._grows:
            self._resident += new
            replica.resident_growth += new
            if self._resident > self._size:
                replica.load_growth += self._resident - self._size
                self._size = self._resident

    def end(self, replica: Replica, exchange: InFlight) -> None:
        """The replica carries it no more."""
        self.publish(replica)
        replica.exchanges.discard(exchange)
        self._fleet.released(replica, self._size, self._resident)
