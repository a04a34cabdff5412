"""The tree of prompts with snapshots, compared with a simple model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine.cache.policy import NO_SNAPSHOT, Kind
from millrace.engine.cache.pool import Pool
from millrace.engine.cache.snapshot_tree import SnapshotTree

PAGE = 2


def _tree(
    pages: int = 64, snapshots: int = 8, max_nodes: int = 1 << 16
) -> tuple[SnapshotTree, Pool]:
    pool = Pool(pages, first=1)
    return SnapshotTree(PAGE, pool, snapshots, max_nodes=max_nodes), pool


def _publish(tree: SnapshotTree, pages: Pool, tokens: list[int], answer: bool = False) -> None:
    """Publish as a request would: with pages of its own, which it then releases."""
    own = pages.allocate(-(-len(tokens) // PAGE))
    snapshot = tree.begin_save(tokens)
    if snapshot is not None:
        kind = Kind.ANSWER if answer else Kind.PROMPT
        tree.publish(tokens, own, snapshot, kind=kind)
    for page in own:
        pages.release(page)


def test_a_match_leaves_at_least_one_token() -> None:
    tree, pages = _tree()
    _publish(tree, pages, [1, 2, 3, 4])
    assert tree.match([1, 2, 3, 4]).tokens == tree.cached([1, 2, 3, 4]) == 0
    assert tree.match([1, 2, 3, 4, 5]).tokens == tree.cached([1, 2, 3, 4, 5]) == 4


def test_a_junction_is_discovered_on_the_second_use_and_hit_on_the_third() -> None:
    tree, pages = _tree()
    first, second = [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 9, 9, 9]
    tree.record_prompt(first)
    found = tree.match(second)
    assert (found.tokens, found.shared) == (0, 4)
    _publish(tree, pages, second[: found.shared])
    assert tree.match([1, 2, 3, 4, 8, 8]).tokens == 4


def test_only_pages_on_the_path_to_a_snapshot_are_cached() -> None:
    tree, pages = _tree()
    tree.record_prompt([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pages.free == 64
    _publish(tree, pages, [1, 2, 3, 4])
    assert pages.free == 62
    assert tree.evict()
    assert (pages.free, tree.snapshots) == (64, (0, 8))
    assert not tree.evict()


def test_of_equal_ones_the_least_recently_used_is_evicted() -> None:
    tree, pages = _tree()
    _publish(tree, pages, [1, 2])
    _publish(tree, pages, [3, 4])
    tree.match([1, 2, 5])
    tree.evict()
    assert tree.match([1, 2, 5]).tokens == 2
    assert tree.match([3, 4, 5]).tokens == 0


def test_an_estimate_does_not_count_as_a_use() -> None:
    tree, pages = _tree()
    before = tree.version
    _publish(tree, pages, [1, 2])
    _publish(tree, pages, [3, 4])
    assert tree.version == before + 2
    assert tree.cached([1, 2, 5]) == 2
    tree.evict()
    assert tree.version == before + 3
    assert (tree.cached([1, 2, 5]), tree.cached([3, 4, 5])) == (0, 2)


def test_a_second_snapshot_of_the_same_prefix_is_freed() -> None:
    tree, pages = _tree()
    own = pages.allocate(1)
    first, second = tree.begin_save([1, 2]), tree.begin_save([1, 2])
    assert first is not None
    assert second is not None
    tree.publish([1, 2], own, first)
    tree.publish([1, 2], own, second)
    assert (pages.free, tree.snapshots) == (63, (1, 8))
    assert tree.begin_save([1, 2]) is None


def test_ghosts_are_bounded() -> None:
    tree, _ = _tree(max_nodes=10)
    for start in range(100):
        tree.record_prompt([start, 1, 2, 3, 4, 5, 6])
        tree.check()
    assert tree.match([99, 1, 2, 3, 4, 5, 6, 7]).shared == 6
    assert tree.match([0, 1, 2, 3, 4, 5, 6, 7]).shared == 0


def test_a_tail_is_found_by_what_goes_on_with_it() -> None:
    tree, pages = _tree()
    _publish(tree, pages, [1, 2, 3])
    _publish(tree, pages, [1, 2, 3, 4, 5])
    assert tree.match([1, 2, 3]).tokens == 0
    found = tree.match([1, 2, 3, 9])
    assert (found.tokens, len(found.pages)) == (3, 2)
    assert tree.match([1, 2, 3, 4, 5]).tokens == 3
    assert tree.match([1, 2, 3, 4, 5, 6, 7]).tokens == 5
    assert tree.match([1, 2, 4, 4]).tokens == 0
    tree.check()


def test_tails_of_other_salts_are_not_found() -> None:
    tree, pages = _tree()
    _publish(tree, pages, [1])
    assert tree.match([1, 2]).tokens == 1
    assert tree.match([1, 2], "a").tokens == 0


_prompt = st.lists(st.integers(0, 2), min_size=1, max_size=12)
_action = st.one_of(
    st.tuples(st.just("publish"), _prompt),
    st.tuples(st.just("record"), _prompt),
    st.tuples(st.just("match"), _prompt),
    st.tuples(st.just("evict"), st.just([])),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_action, max_size=40), st.booleans())
def test_the_tree_equals_a_simple_model(
    actions: list[tuple[str, list[int]]], answers: bool
) -> None:
    """Whatever is evicted, prompts find the longest of the prefixes that are cached, and no page
    is cached but those on the way to them."""
    tree, pages = _tree(pages=200, snapshots=5)
    cached: set[tuple[int, ...]] = set()
    for kind, tokens in actions:
        known = tuple(tokens if answers else tokens[: len(tokens) // PAGE * PAGE])
        if kind == "publish" and known:
            new = known not in cached
            _publish(tree, pages, list(known), answer=answers)
            assert tree.has(known)
            gone = {one for one in cached if not tree.has(one)}
            assert len(gone) == (new and len(cached) == 5)
            cached = (cached - gone) | {known}
        elif kind == "record":
            tree.record_prompt(tokens)
        elif kind == "match":
            usable = [p for p in cached if len(p) < len(tokens) and tuple(tokens[: len(p)]) == p]
            best = max(map(len, usable), default=0)
            assert tree.cached(tokens) == best
            found = tree.match(tokens)
            assert found.tokens == best
            assert (found.snapshot == NO_SNAPSHOT) == (not usable)
            assert len(found.pages) == -(-found.tokens // PAGE)
        elif kind == "evict":
            assert tree.evict() == bool(cached)
            gone = {one for one in cached if not tree.has(one)}
            assert len(gone) == min(1, len(cached))
            cached -= gone
        tree.check()
        ends = {p[: i + PAGE] for p in cached for i in range(0, len(p), PAGE)}
        assert pages.size - pages.free == len(ends)
        assert tree.snapshots == (len(cached), 5)


def test_where_a_prompt_leaves_what_is_known() -> None:
    tree, pages = _tree()
    tree.record_prompt([1, 2, 3, 4, 5, 6, 7])
    found = tree.compare([1, 2, 3, 9, 9])
    assert (found.known, found.other) == (3, [4])
    assert tree.compare([8]).known == 0
    assert tree.compare([1, 2], "salt").known == 0
    tree.record_prompt([1, 2, 3], "salt")
    assert tree.compare([1, 2, 9], "salt").known == 2
    _publish(tree, pages, [1, 2, 3, 4])
    assert tree.compare([1, 2, 3, 4, 5, 9]).evicted == 0
    tree.evict()
    found = tree.compare([1, 2, 3, 4, 5, 9])
    assert (found.known, found.other, found.evicted) == (5, [6], 4)
