"""Requests on which replicas have failed: what a gateway process knows, and whom it refuses.

A request that makes replicas fail must not be carried from one to the next. It is known by a digest
of its path and body. The health monitor collects the evidence of all processes
(health/evidence.py); here is its copy in one process, bounded in number and in time.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from hashlib import blake2b

import msgspec

from millrace.gateway.http.message import LocalReply, Request, error_reply

MAX_REPLICAS_TO_FAIL = 2  # replicas that see a request on which they fail
BURST_SECONDS = 1.0  # failures at one replica within this time are of one moment
LONGEST_BURST_SECONDS = 10.0  # for those of requests that had been sent before
_MAX_SUSPECTS = 4096


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """A failure that a request met at a replica.

    digest: of the request. reached: the request had been sent, so it may be the cause. lost: the
    health monitor itself reported that the replica is gone. sent_at: by `time.monotonic()`, which
    all processes of a host share.
    """

    reason: str
    digest: bytes
    reached: bool = True
    lost: bool = False
    sent_at: float = 0.0


class Success(msgspec.Struct, frozen=True, tag="success"):
    """A request was answered in full. digest: of one on which replicas had failed; else empty."""

    digest: bytes = b""


Outcome = Failure | Success


class Suspect(msgspec.Struct, frozen=True, tag="suspect"):
    """The evidence against a request.

    size: bytes of its body. failures: replicas that failed on it; 0: it has been cleared. seconds:
    for which this is remembered. refused: it is not to be sent to another replica.
    """

    digest: bytes
    size: int
    failures: int
    seconds: float
    refused: bool
    reason: str


def digest_of(request: Request) -> bytes:
    """The digest of a request; it ends with the size of the body in 8 bytes."""
    state = blake2b(request.path, digest_size=16)
    state.update(b"\n")
    state.update(request.body)
    return state.digest() + len(request.body).to_bytes(8, "big")


def size_of(digest: bytes) -> int:
    """Bytes of the body of the request with this digest."""
    return int.from_bytes(digest[16:], "big")


class FailureBurst:
    """Failures that requests met at one replica at one moment. began: by `time.monotonic()`.

    Those that had been sent before it began belong to it for longer: all of them meet the same
    failure of the replica, but some of them notice late.
    """

    def __init__(self, began: float = -LONGEST_BURST_SECONDS) -> None:
        self.began = began
        self._digests: set[bytes] = set()

    @property
    def count(self) -> int:
        """Different requests that it met."""
        return len(self._digests)

    def after(self, now: float, failure: Failure) -> FailureBurst:
        """The burst to which a failure at `now` belongs, with that failure in it."""
        since = now - self.began
        same = since <= BURST_SECONDS or (
            since <= LONGEST_BURST_SECONDS and not self.is_met_anew(failure)
        )
        burst = self if same else FailureBurst(now)
        burst._digests.add(failure.digest)
        return burst

    def is_met_anew(self, failure: Failure) -> bool:
        """Whether the request was sent after the burst had begun."""
        return failure.sent_at > self.began


class SuspectRequests:
    """The suspects that one process knows, by digest; the oldest make room for new ones."""

    def __init__(self) -> None:
        self._suspects: OrderedDict[bytes, tuple[float, Suspect]] = OrderedDict()
        self._sizes: dict[int, int] = {}  # size of a body -> suspects of that size

    def __len__(self) -> int:
        return len(self._suspects)

    def update(self, suspect: Suspect) -> None:
        """Take over what the health monitor says of a request."""
        self._drop(suspect.digest)
        if suspect.failures:
            self._suspects[suspect.digest] = (time.monotonic() + suspect.seconds, suspect)
            self._sizes[suspect.size] = self._sizes.get(suspect.size, 0) + 1
        if len(self._suspects) > _MAX_SUSPECTS:
            self._drop(next(iter(self._suspects)))

    def find(self, request: Request) -> Suspect | None:
        """The evidence against this request; None if there is none, which costs no digest."""
        if len(request.body) not in self._sizes:
            return None
        digest = digest_of(request)
        until, suspect = self._suspects.get(digest, (0.0, None))
        if suspect is not None and until < time.monotonic():
            self._drop(digest)
            return None
        return suspect

    def refusal(self, suspect: Suspect) -> LocalReply:
        """The reply to a copy of a request that is refused."""
        until, _ = self._suspects.get(suspect.digest, (0.0, suspect))
        return suspect_reply(suspect.reason, max(1, round(until - time.monotonic())))

    def _drop(self, digest: bytes) -> None:
        _, suspect = self._suspects.pop(digest, (0.0, None))
        if suspect is not None:
            left = self._sizes[suspect.size] - 1
            if left:
                self._sizes[suspect.size] = left
            else:
                del self._sizes[suspect.size]


def suspect_reply(reason: str, seconds: int | None = None) -> LocalReply:
    """502 for a request on which replicas failed. seconds: for which copies are refused."""
    again = f"; the same request is refused for another {seconds} s" if seconds else ""
    message = (
        f"{MAX_REPLICAS_TO_FAIL} replicas failed on this request, so it is sent to no other one"
        f"{again}; the last failure: {reason}"
    )
    return error_reply(502, message, code="replicas_failed_on_request", retry_after=seconds)
