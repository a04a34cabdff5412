"""The depth of drafts: against costs and acceptance that the test knows."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from millrace.engine.draft_depth import STALE, TRIAL, DraftDepth
from millrace.engine.request import Request
from millrace.protocol import AddRequest, Limits, SamplingParams


def limits(depths: list[int], schedule: list[tuple[int, int, int]] | None = None) -> Limits:
    return Limits(
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        max_model_len=512,
        page_size=16,
        num_pages=100,
        num_snapshots=0,
        drafts=max(depths),
        depths=depths,
        depth_schedule=schedule or [],
    )


def requests(count: int) -> list[Request]:
    source = AddRequest("", [1], SamplingParams())
    return [Request(str(i), 1, [1], 99, frozenset(), 0, i, source) for i in range(count)]


def chosen(
    chooser: DraftDepth, running: list[Request], share: float, cost: float, steps: int
) -> Counter[int]:
    """Depths of so many steps. share: of drafts that are accepted behind accepted ones. cost: of a
    draft, as a part of a step's."""
    rng, seen, made = random.Random(steps), Counter[int](), 0
    for _ in range(steps):
        depth = chooser.choose(running)
        seen[depth] += 1
        for request in running:
            count, verified = 0, min(made, depth)
            while count < verified and rng.random() < share:
                count += 1
            chooser.accepted(request, verified, count)
        chooser.took(len(running), depth, 0.01 * (1 + cost * depth) * rng.uniform(0.98, 1.02))
        made = depth
    return seen


@pytest.mark.parametrize(
    ("share", "cost", "best"), [(0.9, 0.05, 3), (0.6, 0.25, 1), (0.1, 0.2, 0), (0.85, 1.5, 0)]
)
def test_the_depth_of_the_most_tokens_a_second_is_found(
    share: float, cost: float, best: int
) -> None:
    chooser, running = DraftDepth(limits([0, 1, 3])), requests(8)
    chosen(chooser, running, share, cost, 300)
    seen = chosen(chooser, running, share, cost, 2000)
    assert seen[best] > 0.95 * 2000
    assert all(
        0 < seen[depth] <= (2000 / STALE + 1) * TRIAL for depth in (0, 1, 3) if depth != best
    )


def test_it_follows_a_text_that_changes() -> None:
    chooser, running = DraftDepth(limits([0, 1, 5])), requests(1)
    chosen(chooser, running, 0.05, 0.1, 500)
    assert chooser.choose(running) == 0
    chosen(chooser, running, 1.0, 0.1, 3 * STALE)
    assert chosen(chooser, running, 1.0, 0.1, 100)[5] > 90


def test_what_is_known_of_later_drafts_outlasts_a_stretch_of_wrong_ones() -> None:
    chooser, (request,) = DraftDepth(limits([1, 3])), requests(1)
    for _ in range(100):
        chooser.accepted(request, 3, 3)
    for _ in range(100):
        chooser.accepted(request, 3, 0)
    assert request.acceptance[0] < 0.01
    assert min(request.acceptance[1:]) > 0.99


def test_a_schedule_takes_the_choice_away() -> None:
    chooser = DraftDepth(limits([0, 1, 3], [(1, 2, 3), (3, 8, 1), (33, 64, 0)]))
    found = [chooser.choose(requests(rows)) for rows in (1, 2, 3, 8, 9, 33, 64)]
    assert found == [3, 3, 1, 1, 3, 0, 0]


def test_each_size_of_batches_has_its_own_depth() -> None:
    chooser, few, many = DraftDepth(limits([0, 1, 3])), requests(2), requests(60)
    for _ in range(10):
        chosen(chooser, few, 0.8, 0.02, 100)
        chosen(chooser, many, 0.8, 0.6, 100)
    assert chosen(chooser, few, 0.8, 0.02, 100)[3] > 80
    assert chosen(chooser, many, 0.8, 0.6, 100)[1] > 80
