"""The tree of prompts with snapshots, compared with a simple model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine.cache.policy import NO_SNAPSHOT
from millrace.engine.cache.pool import Pool
from millrace.engine.cache.snapshot_tree import SnapshotTree

PAGE = 2


def _tree(
    pages: int = 64, snapshots: int = 8, max_nodes: int = 1 << 16
) -> tuple[SnapshotTree, Pool]:
    pool = Pool(pages, first=1)
    return SnapshotTree(PAGE, pool, snapshots, max_nodes=max_nodes), pool


def _publish(tree: SnapshotTree, pages: Pool, tokens: list[int]) -> None:
    """Publish as a request would: with pages of its own, which it then releases."""
    own = pages.allocate(len(tokens) // PAGE)
    snapshot = tree.begin_save(tokens)
    if snapshot is not None:
        tree.publish(tokens, own, snapshot)
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


def test_eviction_is_least_recently_used() -> None:
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


_prompt = st.lists(st.integers(0, 2), min_size=1, max_size=12)
_action = st.one_of(
    st.tuples(st.just("publish"), _prompt),
    st.tuples(st.just("record"), _prompt),
    st.tuples(st.just("match"), _prompt),
    st.tuples(st.just("evict"), st.just([])),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_action, max_size=40))
def test_the_tree_equals_a_simple_model(actions: list[tuple[str, list[int]]]) -> None:
    tree, pages = _tree(pages=200, snapshots=5)
    cached: list[tuple[int, ...]] = []  # prefixes with a snapshot, used longest ago first
    for kind, tokens in actions:
        full_pages = tuple(tokens[: len(tokens) // PAGE * PAGE])
        if kind == "publish" and full_pages:
            if full_pages not in cached:
                if len(cached) == 5:
                    cached.pop(0)
                cached.append(full_pages)
            _publish(tree, pages, list(full_pages))
        elif kind == "record":
            tree.record_prompt(tokens)
        elif kind == "match":
            usable = tuple(tokens[: (len(tokens) - 1) // PAGE * PAGE])
            hits = [p for p in cached if usable[: len(p)] == p]
            found = tree.match(tokens)
            assert found.tokens == max((len(p) for p in hits), default=0)
            assert (found.snapshot == NO_SNAPSHOT) == (not hits)
            assert len(found.pages) * PAGE == found.tokens <= found.shared
            best = found.tokens
            for prefix in sorted((p for p in hits if len(p) <= best), key=len):
                cached.remove(prefix)
                cached.append(prefix)
        elif kind == "evict" and tree.evict():
            cached.pop(0)
        tree.check()
        needed = {p[: i + PAGE] for p in cached for i in range(0, len(p), PAGE)}
        assert pages.size - pages.free == len(needed)
        assert tree.snapshots == (len(cached), 5)
