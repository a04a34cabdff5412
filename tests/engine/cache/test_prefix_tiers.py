"""Which tier the prefixes of tagged prompts are in."""

from __future__ import annotations

from millrace.engine.cache.prefix_tiers import PrefixTiers, Tier


def test_only_changes_of_the_fastest_tier_are_told() -> None:
    tiers = PrefixTiers()
    tiers.set(7, Tier.DEVICE, there=True)
    assert tiers.take_changed() == {7: 4}
    tiers.set(7, Tier.HOST, there=True)
    tiers.set(7, Tier.DISK, there=True)
    assert tiers.take_changed() == {}
    tiers.set(7, Tier.DEVICE, there=False)
    assert tiers.take_changed() == {7: 2}
    tiers.set(7, Tier.HOST, there=False)
    assert tiers.take_changed() == {7: 1}
    tiers.set(7, Tier.DISK, there=False)
    assert tiers.take_changed() == {7: 0}
    tiers.set(0, Tier.DEVICE, there=True)
    assert tiers.take_changed() == {}


def test_tags_are_bounded() -> None:
    tiers = PrefixTiers(most=2)
    for tag in range(1, 6):
        tiers.set(tag, Tier.DEVICE, there=True)
    assert tiers.take_changed() == {4: 4, 5: 4}
    tiers.set(1, Tier.DEVICE, there=False)  # forgotten: nothing to tell
    assert tiers.take_changed() == {}
