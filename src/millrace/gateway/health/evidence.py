"""Evidence from failed requests: against a replica, and against a request.

One failure does not say whose fault it is. Outlier detection follows Envoy's: a replica is ejected
after failures in a row, here of that many different requests, so that one request that fails
everywhere ejects none; and requests alone never eject more than half of the replicas of a model,
nor the last one. A request is suspect once replicas have failed on it, and is refused after two.

Requests that were running on a replica when another request killed it are suspects as well. So a
failure that several requests met at the same moment weighs less: they are refused for a short time.
Several copies of a request that were running there then have met one failure together, not several.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence

from millrace.gateway.routing.replicas import Member
from millrace.gateway.routing.suspects import (
    MAX_REPLICAS_TO_FAIL,
    Failure,
    FailureBurst,
    Suspect,
    size_of,
)

_SHARED_SECONDS = 30.0  # for which a request is refused that may be another one's victim
_MAX_CASES = 1024
_REMEMBERED_BURSTS = 4  # of a request
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


class _Case:
    """One suspect request."""

    def __init__(self) -> None:
        self.failures = 0
        self.bursts: list[FailureBurst] = []  # the last ones, none twice
        self.reason = ""
        self.updated = 0.0


class RequestEvidence:
    """Suspect requests of all gateway processes. seconds: for which a certain one is refused."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._cases: OrderedDict[bytes, _Case] = OrderedDict()
        self._bursts: dict[int, FailureBurst] = {}  # by replica

    def add(self, replica: int, target: object, failure: Failure) -> Suspect:
        """A replica failed while it had this request."""
        now = time.monotonic()
        burst = self._bursts.get(replica, FailureBurst()).after(now, failure)
        self._bursts[replica] = burst
        case = self._cases.pop(failure.digest, None)
        if case is None or now - case.updated > max(self._seconds, _SHARED_SECONDS):
            case = _Case()
        if burst not in case.bursts or burst.is_met_anew(failure):
            case.failures += 1
        others = [one for one in case.bursts if one is not burst]
        case.bursts = [*others[1 - _REMEMBERED_BURSTS :], burst]
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
        alone = any(burst.count == 1 for burst in case.bursts[-2:])
        certain = alone or case.failures >= _CERTAIN_FAILURES
        refused = case.failures >= MAX_REPLICAS_TO_FAIL and self._seconds > 0
        seconds = min(_SHARED_SECONDS, self._seconds) if refused and not certain else self._seconds
        return Suspect(digest, size_of(digest), case.failures, seconds, refused, case.reason)
