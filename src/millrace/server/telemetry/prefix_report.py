"""Which prefixes this replica holds, and in which tier: hashes of its latest prompts, for gateways
that ask.

It knows which prompts were sent to the engine, and what the engine says of their tiers. A gateway
takes the report as a hint. Nothing here runs for a token; a request costs microseconds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from uuid import uuid4

from msgspec import Raw

from millrace.common.prefix_hash import PrefixReport, hash_pieces

MAX_PROMPTS = 1024  # stored at most, and so many changes
MAX_HASHES_PER_REPORT = 2048  # in a report: after that many, no further prompt is added
DEVICE, HOST, DISK, GONE = 4, 2, 1, 0  # tiers as the engine numbers them, the fastest first


class _Prompt:
    """A prompt, and the fastest tier of its prefix."""

    __slots__ = ("hashes", "tier")

    def __init__(self, hashes: Sequence[int]) -> None:
        self.hashes, self.tier = hashes, DEVICE


class PrefixReporter:
    """The hashes of the last MAX_PROMPTS prompts since the cache was last empty, oldest first.

    enabled: whether there is a prefix cache; without one nothing is stored or sent.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        # What happened, oldest first: hashes and the tier in which they are now.
        self._changes: deque[tuple[Sequence[int], int]] = deque(maxlen=MAX_PROMPTS)
        self._prompts: OrderedDict[int, _Prompt] = OrderedDict()  # by tag
        self._tiers: dict[int, Counter[int]] = {}  # of each hash: prompts with it by tier
        self.clear()

    def clear(self) -> None:
        """The cache has been emptied: a new epoch begins, in which old cursors mean nothing."""
        self._epoch = uuid4().hex[:16]
        self._changes.clear()
        self._prompts.clear()
        self._tiers.clear()
        self._count = 0

    def prefix_hashes(self, prompt: Sequence[Raw], salt: str = "") -> list[int]:
        """The hashes of a prompt, from the JSON of the fields that make it."""
        return hash_pieces(prompt, salt) if self.enabled else []

    def add(self, prefix_hashes: Sequence[int]) -> int:
        """A prompt with these hashes goes to the engine. Returns its tag; 0: it has none."""
        if not prefix_hashes:
            return 0
        tag = prefix_hashes[-1]
        self._forget(tag)
        self._prompts[tag] = _Prompt(prefix_hashes)
        self._count_in(prefix_hashes, DEVICE, 1)
        while len(self._prompts) > MAX_PROMPTS:
            self._forget(next(iter(self._prompts)))
        self._append(prefix_hashes, DEVICE)
        return tag

    def moved(self, tiers: Mapping[int, int]) -> None:
        """Prefixes, by their tags, are in other tiers now. Of what several prompts begin with, the
        fastest tier counts."""
        for tag, tier in tiers.items():
            prompt = self._prompts.get(tag)
            if prompt is None or prompt.tier == tier:
                continue
            before = {one: self._fastest(one) for one in prompt.hashes}
            self._count_in(prompt.hashes, prompt.tier, -1)
            self._count_in(prompt.hashes, tier, 1)
            prompt.tier = tier
            for now in (DEVICE, HOST, DISK, GONE):
                changed = [o for o in prompt.hashes if before[o] != self._fastest(o) == now]
                if changed:
                    self._append(changed, now)

    def report(self, cursor: str) -> PrefixReport | None:
        """What came after the cursor; all that is remembered if it is not one of this epoch."""
        if not self.enabled:
            return None
        oldest = self._count - len(self._changes)
        sent = max(oldest, self._number(cursor))
        found: dict[int, int] = {}
        for hashes, tier in islice(self._changes, sent - oldest, None):
            if len(found) >= MAX_HASHES_PER_REPORT:
                break
            found.update(dict.fromkeys(hashes, tier))
            sent += 1

        def those(tier: int) -> list[int]:
            return [one for one, at in found.items() if at == tier]

        parts = those(DEVICE), those(HOST), those(DISK), those(GONE)
        return PrefixReport(self._epoch, f"{self._epoch}.{sent}", *parts)

    def _append(self, hashes: Sequence[int], tier: int) -> None:
        self._changes.append((hashes, tier))
        self._count += 1

    def _forget(self, tag: int) -> None:
        prompt = self._prompts.pop(tag, None)
        if prompt is not None:
            self._count_in(prompt.hashes, prompt.tier, -1)

    def _count_in(self, hashes: Iterable[int], tier: int, change: int) -> None:
        for one in hashes:
            counts = self._tiers.setdefault(one, Counter())
            counts[tier] += change
            if not counts[tier]:
                del counts[tier]
            if not counts:
                del self._tiers[one]

    def _fastest(self, hash: int) -> int:
        return max(self._tiers.get(hash, ()), default=GONE)

    def _number(self, cursor: str) -> int:
        epoch, _, number = cursor.partition(".")
        if epoch != self._epoch or not number.isdecimal() or len(number) > 18:
            return 0
        return min(int(number), self._count)
