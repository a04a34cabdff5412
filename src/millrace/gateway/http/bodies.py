"""Request bodies in memory: a bound for each, and one for all bodies of a process.

A body counts from its first byte until its request has been answered, because it may have to be
sent to another replica until then.
"""

from __future__ import annotations

from collections import deque

from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.shared_counters import ProcessCounters
from millrace.gateway.http.message import LocalReply, error_reply


class BodyBudget:
    """The bytes of all bodies in this process. held: bytes now."""

    def __init__(self, limits: GatewayLimits, process_counters: ProcessCounters) -> None:
        self.held = 0
        self._limits = limits
        self._process_counters = process_counters

    def refusal(self, size: int, more: int) -> LocalReply | None:
        """The refusal of a body that would grow by `more` bytes to `size`; None if it fits."""
        limits = self._limits
        if size > limits.max_body_bytes:
            message = (
                f"the body is larger than {limits.max_body_bytes} bytes, which is --max-body-bytes"
            )
            return error_reply(413, message, close=True)
        if self.held + more > limits.max_bodies_bytes:
            self._process_counters.count_event("body_refused")
            message = (
                f"request bodies hold {limits.max_bodies_bytes} bytes already, as many as "
                "--max-bodies-bytes allows; try again later"
            )
            return error_reply(503, message, retry_after=1, close=True, code="too_many_bytes")
        return None

    def add(self, change: int) -> None:
        """Change the bytes held."""
        self.held += change
        self._process_counters.add_gauge("body_bytes", change)


class RequestBodies:
    """The bodies of one connection, in their order. size: bytes of the one being received."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._pieces: list[bytes] = []
        self.size = 0
        self._complete_sizes: deque[int] = (
            deque()
        )  # sizes of complete ones whose requests are not answered yet

    def take(self, piece: bytes) -> LocalReply | None:
        """More of a body has come. Returns a refusal, with the body dropped, if it does not fit."""
        refusal = self._budget.refusal(self.size + len(piece), len(piece))
        if refusal is not None:
            self.drop()
            return refusal
        self._pieces.append(piece)
        self.size += len(piece)
        self._budget.add(len(piece))
        return None

    def finish(self) -> bytes:
        """The body that was received; it is complete."""
        body = b"".join(self._pieces)
        self._complete_sizes.append(self.size)
        self._pieces, self.size = [], 0
        return body

    def drop(self) -> None:
        """Drop the body that is being received."""
        self._budget.add(-self.size)
        self._pieces, self.size = [], 0

    def release_oldest(self) -> None:
        """The request of the oldest complete body has been answered."""
        self._budget.add(-self._complete_sizes.popleft())

    def close(self) -> None:
        """The connection is gone; release all of its bodies."""
        self.drop()
        while self._complete_sizes:
            self.release_oldest()
