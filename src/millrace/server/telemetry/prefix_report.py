"""Which prefixes this replica probably holds: hashes of its latest prompts, for gateways that ask.

It knows which prompts were sent to the engine, not what the engine's cache still holds of them, so
a gateway takes the report as a hint. Nothing here runs for a token; a request costs microseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from uuid import uuid4

from msgspec import Raw

from millrace.common.prefix_hash import PrefixReport, hash_pieces

MAX_PROMPTS = 256  # stored at most
MAX_HASHES_PER_REPORT = 2048  # in a report: after that many, no further prompt is added


class PrefixReporter:
    """The hashes of the last MAX_PROMPTS prompts since the cache was last empty, oldest first.

    enabled: whether there is a prefix cache; without one nothing is stored or sent.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self._chains: deque[Sequence[int]] = deque(maxlen=MAX_PROMPTS)
        self.clear()

    def clear(self) -> None:
        """The cache has been emptied: a new epoch begins, in which old cursors mean nothing."""
        self._epoch = uuid4().hex[:16]
        self._chains.clear()
        self._count = 0

    def prefix_hashes(self, prompt: Sequence[Raw], salt: str = "") -> list[int]:
        """The hashes of a prompt, from the JSON of the fields that make it."""
        if not self.enabled:
            return []
        return hash_pieces(prompt, salt)

    def add(self, prefix_hashes: Sequence[int]) -> None:
        """A prompt with these hashes goes to the engine."""
        if prefix_hashes:
            self._chains.append(prefix_hashes)
            self._count += 1

    def report(self, cursor: str) -> PrefixReport | None:
        """What came after the cursor; all that is remembered if it is not one of this epoch."""
        if not self.enabled:
            return None
        oldest = self._count - len(self._chains)
        sent = max(oldest, self._number(cursor))
        hashes: dict[int, None] = {}
        for prefix_hashes in islice(self._chains, sent - oldest, None):
            if len(hashes) >= MAX_HASHES_PER_REPORT:
                break
            hashes.update(dict.fromkeys(prefix_hashes))
            sent += 1
        return PrefixReport(self._epoch, f"{self._epoch}.{sent}", list(hashes))

    def _number(self, cursor: str) -> int:
        epoch, _, number = cursor.partition(".")
        if epoch != self._epoch or not number.isdecimal() or len(number) > 18:
            return 0
        return min(int(number), self._count)
