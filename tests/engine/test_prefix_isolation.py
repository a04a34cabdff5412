"""Prompts with different cache salts share no page and no snapshot, in any mix of requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine.engine import Engine
from millrace.engine.scheduler import Scheduler
from millrace.protocol import AddRequest, Limits, Masks, SamplingParams, StepPlan
from tests.support.fake_worker import FakePending, FakeWorker, expected_output

SALTS = ("", "a", "b")
STEM = list(range(10, 34))


class Witness(FakeWorker):
    """Records the salt of each page and snapshot when it is written, and which requests get it
    later.

    salts: of each request, by its seed.
    """

    def __init__(self, limits: Limits, salts: list[str]) -> None:
        sizes = limits.page_size, limits.drafts, limits.max_num_batched_tokens
        super().__init__(*sizes, policy=limits.cache_policy)
        self.salt_of_request = salts
        self.salt_of_slot: dict[int, str] = {}
        self.salt_of_page: dict[int, str] = {}
        self.salt_of_snapshot: dict[int, str] = {}
        self.resumed: list[str] = []

    def launch(self, plan: StepPlan, masks: Callable[[], Masks] | None = None) -> FakePending:
        resumed = set()
        for admission in plan.admissions:
            salt = self.salt_of_slot[admission.slot] = self.salt_of_request[admission.seed]
            if admission.start > 0:
                if admission.snapshot >= 0:
                    assert self.salt_of_snapshot[admission.snapshot] == salt
                resumed.add(admission.slot)
                self.resumed.append(salt)
        for grant in plan.grants:
            salt = self.salt_of_slot[grant.slot]
            shared = grant.first == 0 and grant.slot in resumed
            for page in grant.pages:
                if shared:
                    assert self.salt_of_page[page] == salt
                self.salt_of_page[page] = salt
        for save in plan.saves:
            self.salt_of_snapshot[save.snapshot] = self.salt_of_slot[save.slot]
        return super().launch(plan, masks)


Policy = Literal["snapshot", "page"]
POLICIES: tuple[Policy, ...] = ("snapshot", "page")


def engine(
    salts: list[str], num_pages: int, num_snapshots: int, policy: Policy = "snapshot"
) -> tuple[Engine, Witness]:
    limits = Limits(
        max_num_seqs=3, max_num_batched_tokens=16, max_model_len=48, page_size=4, drafts=1,
        num_pages=num_pages, num_snapshots=num_snapshots, eos_ids=frozenset(), cache_policy=policy,
    )  # fmt: skip
    witness = Witness(limits, salts)
    return Engine(Scheduler(limits), witness, depth=1, check=True), witness


def source(number: int, length: int, salt: str) -> AddRequest:
    params = SamplingParams(max_tokens=3, seed=number)
    return AddRequest(str(number), [*STEM[:length], 40 + number % 3], params, cache_salt=salt)


def serve(eng: Engine, sources: list[AddRequest], gaps: list[int]) -> dict[str, int]:
    """Add the requests some steps apart and run to the end. Returns the cached tokens of each."""
    cached, output = {}, {one.id: list[int]() for one in sources}
    waiting = list(zip(sources, gaps, strict=True))
    while waiting or eng.has_work():
        while waiting and (waiting[0][1] <= 0 or not eng.has_work()):
            eng.add(waiting.pop(0)[0])
        waiting = [(one, gap - 1) for one, gap in waiting]
        for delta in eng.step():
            output[delta.id] += delta.token_ids
            cached[delta.id] = delta.cached_tokens
    for one in sources:
        assert output[one.id] == expected_output(one.prompt, len(one.prompt) + 3, frozenset())
    return cached


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, len(STEM)), st.sampled_from(SALTS), st.integers(0, 6)),
        min_size=2,
        max_size=14,
    ),
    num_pages=st.integers(26, 60),
    num_snapshots=st.integers(1, 8),
    policy=st.sampled_from(POLICIES),
)
def test_salts_share_no_page_and_no_snapshot(
    requests: list[tuple[int, str, int]], num_pages: int, num_snapshots: int, policy: Policy
) -> None:
    salts = [salt for _, salt, _ in requests]
    eng, _ = engine(salts, num_pages, num_snapshots, policy)
    sources = [source(n, length, salt) for n, (length, salt, _) in enumerate(requests)]
    serve(eng, sources, [gap for *_, gap in requests])
    eng.scheduler.reset_prefix_cache()
    assert eng.stats().free_pages == eng.stats().total_pages


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("salt", SALTS)
def test_requests_with_the_same_salt_share_prefixes(salt: str, policy: Policy) -> None:
    """The second prompt of each salt finds the first one's prefix, never that of another salt."""
    salts = [*SALTS, salt]
    eng, witness = engine(salts, 60, 8, policy)
    cached = serve(eng, [source(n, 24, one) for n, one in enumerate(salts)], [99] * len(salts))
    assert [cached[str(n)] for n in range(3)] == [0, 0, 0]
    assert cached["3"] == 24
    assert witness.resumed == [salt]


def test_what_others_send_does_not_change_where_a_prompt_is_cached() -> None:
    """Junctions are discovered among prompts of one salt only."""
    alone, _ = engine(["a", "a"], 60, 8)
    before = serve(alone, [source(0, 20, "a"), source(1, 12, "a")], [99, 99])
    crowd, _ = engine(["a", "b", "b", "a"], 60, 8)
    sources = [source(0, 20, "a"), source(1, 12, "b"), source(2, 12, "b"), source(3, 12, "a")]
    sources[3] = AddRequest("3", source(1, 12, "a").prompt, sources[3].params, cache_salt="a")
    after = serve(crowd, sources, [99] * 4)
    assert after["3"] == before["1"]
