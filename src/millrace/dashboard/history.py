"""The last hour of samples, encoded: a ring of bounded size that any number of viewers reads.

Samples are kept as the JSON that viewers get, which is a tenth of the size of their objects, and
costs a viewer nothing to encode again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from millrace.dashboard.sample import Sample, of_seconds

HOUR = 3600  # samples

_encode = msgspec.json.Encoder().encode


class History:
    """The latest samples. Each has a number, from 1, by which a viewer says what it has seen.

    length: samples that are kept. every: seconds that are added up to one of them.
    """

    def __init__(self, length: int = HOUR, every: int = 1) -> None:
        self._kept: deque[bytes] = deque(maxlen=max(1, length // every))
        self._every = every
        self._open: list[Sample] = []
        self.number = 0

    def add(self, sample: Sample) -> None:
        """Add the newest second."""
        self._open.append(sample)
        if len(self._open) >= self._every:
            whole = self._open[0] if self._every == 1 else of_seconds(self._open)
            self._open = []
            self._kept.append(_encode(whole))
            self.number += 1

    def since(self, number: int) -> list[bytes]:
        """Samples after that number, as JSON, the oldest first; a number from another life of the
        process means all of them."""
        fresh = self.number - number if 0 <= number <= self.number else len(self._kept)
        if fresh <= 0:
            return []
        return list(self._kept)[-fresh:]


def json_list(encoded: Iterable[bytes]) -> msgspec.Raw:
    """A JSON list of values that are JSON already."""
    return msgspec.Raw(b"[" + b",".join(encoded) + b"]")
