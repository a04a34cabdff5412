"""In which tiers the prefixes of prompts are, for those who choose a replica by that.

A prompt has a tag, a number that its sender knows it by. What is at the end of the prompt, or of
its answer, counts: the prefixes of one conversation go together. It holds no prefix and moves none.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import IntFlag

MOST_TAGS = 8192


class Tier(IntFlag):
    """NOWHERE: in none. The fastest one counts."""

    NOWHERE = 0
    DISK = 1
    HOST = 2
    DEVICE = 4


class PrefixTiers:
    """The tiers of each tag, and which have changed. Tags of 0 are nobody's."""

    def __init__(self, most: int = MOST_TAGS) -> None:
        self._most = most
        self._tiers: OrderedDict[int, Tier] = OrderedDict()
        self._changed: dict[int, Tier] = {}  # at most as many

    def set(self, tag: int, tier: Tier, there: bool) -> None:
        """The prefix of a tag is in a tier, or no longer."""
        if not tag:
            return
        before = self._tiers.get(tag, Tier.NOWHERE)
        after = before | tier if there else before & ~tier
        if _fastest(before) != _fastest(after):
            self._changed[tag] = _fastest(after)
        self._tiers[tag] = after
        self._tiers.move_to_end(tag)
        if after is Tier.NOWHERE or len(self._tiers) > self._most:
            gone = tag if after is Tier.NOWHERE else next(iter(self._tiers))
            del self._tiers[gone]

    def take_changed(self) -> dict[int, int]:
        """The tags whose fastest tier has changed since the last call, with that tier."""
        changed, self._changed = self._changed, {}
        while len(changed) > self._most:
            del changed[next(iter(changed))]
        return {tag: int(tier) for tag, tier in changed.items()}


def _fastest(tiers: Tier) -> Tier:
    return next((t for t in (Tier.DEVICE, Tier.HOST, Tier.DISK) if t in tiers), Tier.NOWHERE)
