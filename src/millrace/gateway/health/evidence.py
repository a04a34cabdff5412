"""Evidence from failed requests: against a replica, and against a request.

One failure does not say whose fault it is. Outlier detection follows Envoy's: a replica is ejected
after failures in a row, here of that many different requests, so that one request that fails
everywhere ejects none; and requests alone never eject more than half of the replicas of a model,
nor the last one. A request is suspect once replicas have failed on it, and is refused after two.

Requests that were running on a replica when another request killed it are suspects as well. So a
failure that several requests met at the same moment weighs less: they are refused for a short time.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence

from millrace.gateway.routing.replicas import Member
from millrace.gateway.routing.suspects import (
    BURST_SECONDS,
    MAX_REPLICAS_TO_FAIL,
    Failure,
    Suspect,
    size_of,
)

_SHARED_SECONDS = 30.0  # for which a request is refused that may be another one's victim
_MAX_CASES = 1024
_CERTAIN_FAILURES = 3  # of a request; so many moments are no coincidence


class ReplicaEvidence:
    """Failures in a row of different requests at one replica."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, failure: Failure) -> int:
        """Count a failure; returns how many different requests have failed in a row."""
        if len(self._digests) < 1000:
            self._digests.add(failure.digest)
        return len(self._digests)

    def clear(self) -> None:
        """A request succeeded, or the replica has been checked and taken back."""
        self._digests.clear()


def may_eject(member: Member, members: Sequence[Member]) -> bool:
    """Whether requests alone may take this replica out: another one of its models stays up, and at
    least half of them do (Envoy's panic threshold)."""
    peers = [m for m in members if set(m.models) == set(member.models) and m.state != "draining"]
    left = sum(peer.state == "up" for peer in peers if peer.id != member.id)
    return left >= 1 and 2 * left >= len(peers)


class _Burst:
    """The requests that failed at one replica at one moment."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.digests: set[bytes] = set()


class _Case:
    """One suspect request."""

    def __init__(self) -> None:
        self.failures = 0
        self.bursts: list[_Burst] = []
        self.reason = ""
        self.updated = 0.0


class RequestEvidence:
    """Suspect requests of all gateway processes. seconds: for which a certain one is refused."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._cases: OrderedDict[bytes, _Case] = OrderedDict()
        self._bursts: dict[int, _Burst] = {}  # by replica

    def add(self, replica: int, target: object, failure: Failure) -> Suspect:
        """A replica failed while it had this request."""
        now = time.monotonic()
        burst = self._bursts.get(replica)
        if burst is None or now - burst.began > BURST_SECONDS:
            burst = self._bursts[replica] = _Burst(now)
        burst.digests.add(failure.digest)
        case = self._cases.pop(failure.digest, None)
        if case is None or now - case.updated > max(self._seconds, _SHARED_SECONDS):
            case = _Case()
        case.failures += 1
        case.bursts = [*case.bursts[-1:], burst]
        case.reason = f"{target}: {failure.reason}"
        case.updated = now
        self._cases[failure.digest] = case
        if len(self._cases) > _MAX_CASES:
            self._cases.popitem(last=False)
        return self._suspect(failure.digest, case)

    def review(self, digest: bytes) -> Suspect | None:
        """The evidence once the moment of its last failure is over."""
        case = self._cases.get(digest)
        return self._suspect(digest, case) if case is not None else None

    def clear(self, digest: bytes) -> Suspect | None:
        """The request was answered in full: it is innocent."""
        case = self._cases.pop(digest, None)
        if case is None:
            return None
        return Suspect(digest, size_of(digest), 0, 0.0, False, "")

    def forget_replica(self, replica: int) -> None:
        """The replica was removed."""
        self._bursts.pop(replica, None)

    def _suspect(self, digest: bytes, case: _Case) -> Suspect:
        alone = any(len(burst.digests) == 1 for burst in case.bursts)
        certain = alone or case.failures >= _CERTAIN_FAILURES
        refused = case.failures >= MAX_REPLICAS_TO_FAIL and self._seconds > 0
        seconds = min(_SHARED_SECONDS, self._seconds) if refused and not certain else self._seconds
        return Suspect(digest, size_of(digest), case.failures, seconds, refused, case.reason)
