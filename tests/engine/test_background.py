"""Batch work beside other requests: what it may take of their steps, and that it goes on."""

from __future__ import annotations

from unittest import mock

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine import background
from millrace.engine.background import Turn, Turns
from millrace.engine.engine import Engine
from millrace.protocol import AddRequest
from tests.engine import test_scheduler as scheduler_tests
from tests.engine.test_scheduler import engine, limits, request, run


def batch(name: str, prompt: list[int], max_tokens: int = 30) -> AddRequest:
    return msgspec.structs.replace(stream(name, prompt, max_tokens), background=True)


def stream(name: str, prompt: list[int], max_tokens: int) -> AddRequest:
    return request(name, prompt, max_tokens, ignore_eos=True)


def prompt(number: int, length: int = 4) -> list[int]:
    return [1 + (number * 7 + i * 3) % 49 for i in range(length)]


def step_rows(eng: Engine) -> tuple[set[str], set[str]]:
    """(requests that got tokens in a step, those of the background)"""
    ids = {delta.id for delta in eng.step() if delta.token_ids}
    return ids, {name for name in ids if name.startswith("b")}


def test_the_turns_come_as_they_are_said_to() -> None:
    turns = Turns()
    assert [turns.choose(True, False), turns.choose(False, True)] == [Turn.ALL] * 2
    found = [turns.choose(True, True) for _ in range(3 * background.STEPS)]
    assert found.count(Turn.BACKGROUND) == 3
    assert found.count(Turn.FOREGROUND) == 3 * (background.STEPS - 1)


def test_streams_have_their_steps_alone_until_they_end() -> None:
    eng = engine(limits(drafts=0, max_num_seqs=8, num_pages=200))
    for number in range(4):
        eng.add(batch(f"b{number}", prompt(number)))
    while not step_rows(eng)[1]:
        pass
    eng.add(stream("user", prompt(9), 15))
    alone = 0
    for _ in range(17):
        ids, others = step_rows(eng)
        if "user" in ids:
            assert others == set()
            alone += 1
    assert alone >= 10
    assert set(run(eng)) >= {"b0", "b1", "b2", "b3"}


def test_some_rows_run_beside_many_others() -> None:
    eng = engine(limits(drafts=0, max_num_seqs=48, num_pages=800, max_num_batched_tokens=512))
    for number in range(8):
        eng.add(batch(f"b{number}", prompt(number)))
    for _ in range(3):
        eng.step()
    for number in range(32):
        eng.add(stream(f"u{number}", prompt(number, 6), 20))
    found = [step_rows(eng) for _ in range(20)]
    beside = {len(others) for ids, others in found if len(ids - others) == 32}
    assert max(beside) == 32 // background.ROWS


def test_the_background_gives_up_its_slot() -> None:
    eng = engine(limits(drafts=0, max_num_seqs=2))
    for number in range(2):
        eng.add(batch(f"b{number}", prompt(number), 40))
    for _ in range(4):
        eng.step()
    eng.add(stream("user", prompt(9), 3))
    steps = 0
    while "user" not in step_rows(eng)[0]:
        steps += 1
        assert steps < 5
    got = run(eng)
    assert {"b0", "b1"} <= set(got)
    assert eng.stats().preemptions == 1


def test_the_background_does_not_stand_still() -> None:
    eng = engine(limits(drafts=0, max_num_seqs=4, max_model_len=400, num_pages=400))
    eng.add(batch("b0", prompt(0), 10))
    eng.add(stream("user", prompt(9), 380))
    got = [step_rows(eng)[1] for _ in range(2 * background.STEPS + 50)]
    assert 2 <= sum(map(bool, got)) <= 3


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.integers(0, 2), drafts=st.integers(0, 3),
       pages=st.integers(14, 40), policy=st.sampled_from(["snapshot", "page"]))  # fmt: skip
def test_frequent_turns_change_no_token(
    seed: int, depth: int, drafts: int, pages: int, policy: str
) -> None:
    check = scheduler_tests.test_every_mix_of_requests_brings_the_right_tokens
    with mock.patch.object(background, "STEPS", 3), mock.patch.object(background, "ROWS", 2):
        check.hypothesis.inner_test(  # type: ignore[attr-defined]
            seed=seed, depth=depth, drafts=drafts, pages=pages, snapshots=4, budget=32, interval=4,
            caching=True, mixed=7, threshold=6, partial=1, long=1, policy=policy, background=0.5,
        )  # fmt: skip
