"""The tree of computed pages, compared with a simple model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine.cache.page_tree import PageTree
from millrace.engine.cache.policy import NO_SNAPSHOT
from millrace.engine.cache.pool import Pool

PAGE = 2


def _tree(pages: int = 64) -> tuple[PageTree, Pool]:
    pool = Pool(pages, first=1)
    return PageTree(PAGE, pool), pool


def _store(tree: PageTree, pages: Pool, tokens: list[int]) -> list[int]:
    """Store as a request would: with pages of its own, which it then releases."""
    own = pages.allocate(-(-len(tokens) // PAGE))
    tree.store(tokens, own)
    for page in own:
        pages.release(page)
    return own


def test_a_match_is_whole_pages_and_leaves_at_least_one_token() -> None:
    tree, pages = _tree()
    own = _store(tree, pages, [1, 2, 3, 4, 5])
    assert pages.free == 62  # the last page is not whole
    assert tree.match([1, 2, 3, 4]).tokens == tree.cached([1, 2, 3, 4]) == 2
    found = tree.match([1, 2, 3, 4, 5, 6, 7])
    assert (found.tokens, found.pages, found.snapshot) == (4, own[:2], NO_SNAPSHOT)
    assert tree.match([1, 2, 9, 9]).tokens == 2


def test_of_equal_pages_the_first_stays() -> None:
    tree, pages = _tree()
    first = _store(tree, pages, [1, 2, 3, 4])
    second = _store(tree, pages, [1, 2, 3, 4, 5, 6])
    assert tree.match([1, 2, 3, 4, 5, 6, 7]).pages == [*first, second[2]]
    assert pages.free == 61


def test_the_ends_of_what_was_used_longest_ago_are_given_up_first() -> None:
    tree, pages = _tree()
    _store(tree, pages, [1, 2, 3, 4])
    _store(tree, pages, [1, 2, 5, 6])
    tree.match([1, 2, 3, 4, 5])
    left = []
    while tree.evict():
        tree.check()
        left.append((tree.cached([1, 2, 3, 4, 0]), tree.cached([1, 2, 5, 6, 0])))
    assert left == [(4, 2), (2, 2), (0, 0)]
    assert pages.free == 64


def test_a_page_in_use_is_freed_by_its_request() -> None:
    tree, pages = _tree()
    own = pages.allocate(1)
    tree.store([1, 2], own)
    assert pages.evictable == 0
    assert tree.evict()
    assert pages.free == 63
    pages.release(own[0])
    assert pages.free == 64


def test_nothing_stops_for_it_and_prompts_of_more_than_a_page_gain() -> None:
    tree, _ = _tree()
    assert tree.stops(0, 40, [10, 20], shared=8) == []
    assert tree.begin_save([1, 2]) is None
    assert tree.snapshots == (0, 0)
    assert not tree.can_resume(PAGE)
    assert tree.can_resume(PAGE + 1)


_prompt = st.lists(st.integers(0, 2), min_size=1, max_size=12)
_action = st.one_of(
    st.tuples(st.just("store"), _prompt),
    st.tuples(st.just("match"), _prompt),
    st.tuples(st.just("evict"), st.just([])),
    st.tuples(st.just("clear"), st.just([])),
)
Prefix = tuple[int, ...]


def _use(order: list[Prefix], tokens: list[int]) -> int:
    """In the model, use the cached prefixes of tokens, longest first. Returns the longest."""
    found = [tuple(tokens[:n]) for n in range(PAGE, len(tokens) + 1, PAGE)]
    found = [prefix for prefix in found if prefix in order]
    for prefix in reversed(found):
        order.remove(prefix)
        order.append(prefix)
    return len(found[-1]) if found else 0


@settings(max_examples=200, deadline=None)
@given(st.lists(_action, max_size=40))
def test_the_tree_equals_a_simple_model(actions: list[tuple[str, list[int]]]) -> None:
    tree, pages = _tree(pages=200)
    order: list[Prefix] = []  # cached prefixes, used longest ago first
    for kind, tokens in actions:
        if kind == "store":
            missing = [tuple(tokens[:n]) for n in range(PAGE, len(tokens) + 1, PAGE)]
            order += [prefix for prefix in missing if prefix not in order]
            _use(order, tokens)
            _store(tree, pages, tokens)
        elif kind == "match":
            assert tree.cached(tokens) == _use(order, tokens[:-1])
            found = tree.match(tokens)
            assert found.tokens == found.shared == len(found.pages) * PAGE
            assert found.tokens == tree.cached(tokens)
        elif kind == "clear":
            tree.clear()
            order.clear()
        else:
            assert tree.evict() == bool(order)
            del order[:1]
        tree.check()
        assert pages.size - pages.free == pages.evictable == len(order)
        for prefix in order:
            assert tree.cached([*prefix, 9]) >= len(prefix)
