"""The scheduler with a worker of plain arithmetic: right tokens and no leak, in every mix."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine import plan_log
from millrace.engine.engine import LARGE_PIECE, Engine
from millrace.engine.prompt_budget import FOLLOWING_STEPS, min_chunk
from millrace.engine.scheduler import Scheduler
from millrace.engine.waiting_queue import MAX_OVERTAKES
from millrace.errors import ConfigError, RequestError, UserError
from millrace.protocol import (
    STEP_TOKENS,
    AddRequest,
    Delta,
    Limits,
    SamplingParams,
    StepPlan,
    StepResult,
    StepTiming,
)
from tests.support.fake_worker import EOS, FakeWorker, expected_output


def limits(**changes: object) -> Limits:
    values: dict[str, object] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_model_len": 48,
        "page_size": 4,
        "num_pages": 41,
        "num_snapshots": 6,
        "drafts": 1,
        "eos_ids": frozenset({EOS}),
    }
    return Limits(**{**values, **changes})  # type: ignore[arg-type]


def engine(lim: Limits, depth: int = 0, seed: int = 0, log: Path | None = None) -> Engine:
    worker = FakeWorker(
        lim.page_size, lim.drafts, lim.max_num_batched_tokens, seed=seed, policy=lim.cache_policy
    )
    return Engine(Scheduler(lim), worker, depth=depth, check=True, plan_log=log)


def request(name: str, prompt: list[int], max_tokens: int = 8, **params: object) -> AddRequest:
    return AddRequest(
        id=name,
        prompt=prompt,
        params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
    )


def run(
    eng: Engine, collected: dict[str, list[int]] | None = None, steps: int = 5000
) -> dict[str, list[int]]:
    """Step until idle; tokens by request."""
    collected = {} if collected is None else collected
    for _ in range(steps):
        if not eng.has_work():
            return collected
        for delta in eng.step():
            collected.setdefault(delta.id, []).extend(delta.token_ids)
    raise AssertionError("the engine did not come to rest")


def iter_deltas(eng: Engine) -> Iterator[Delta]:
    while eng.has_work():
        yield from eng.step()


def assert_all_free(eng: Engine) -> None:
    eng.scheduler.reset_prefix_cache()
    eng.scheduler.check_integrity()
    stats = eng.stats()
    assert stats.free_pages == stats.total_pages
    assert (stats.running, stats.waiting, stats.snapshots_used) == (0, 0, 0)


@settings(max_examples=40, deadline=None)
@given(
    snapshots=st.integers(3, 12),
    lengths=st.lists(st.integers(9, 40), min_size=1, max_size=12),
    drafts=st.integers(0, 2),
)
def test_a_prompt_that_comes_twice_in_a_row_is_found(
    snapshots: int, lengths: list[int], drafts: int
) -> None:
    """Whatever is cached already, and however often that was used: a new prompt has a chance."""
    eng = engine(limits(num_snapshots=snapshots, num_pages=100, drafts=drafts), depth=1)
    for number, length in enumerate(lengths):
        prompt = [number + 1] * length
        for turn in range(3):
            before = eng.stats().prefix_hits
            eng.add(request(f"{number} {turn}", prompt, 4, ignore_eos=True))
            run(eng, {})
            assert (eng.stats().prefix_hits > before) == (turn > 0)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(0, 2),
    drafts=st.integers(0, 5),
    pages=st.integers(14, 60),
    snapshots=st.integers(0, 8),
    budget=st.integers(24, 64),
    interval=st.sampled_from([0, 4, 8]),
    caching=st.booleans(),
    mixed=st.sampled_from([0, 1, 7]),
    threshold=st.sampled_from([0, 1, 6, 20]),
    partial=st.integers(0, 2),
    long=st.integers(0, 2),
    policy=st.sampled_from(["snapshot", "page"]),
    background=st.sampled_from([0.0, 0.5]),
)
def test_every_mix_of_requests_brings_the_right_tokens(
    seed: int,
    depth: int,
    drafts: int,
    pages: int,
    snapshots: int,
    budget: int,
    interval: int,
    caching: bool,
    mixed: int,
    threshold: int,
    partial: int,
    long: int,
    policy: str,
    background: float,
) -> None:
    """Shared prefixes, chunks, drafts, preemption, aborts, pipelining, priorities, batch work,
    requests that resume or wait for another's prompt: none of it changes a token.
    """
    rng = random.Random(seed)
    lim = limits(
        drafts=drafts,
        num_pages=pages,
        num_snapshots=snapshots,
        max_num_batched_tokens=budget,
        snapshot_interval=interval,
        prefix_caching=caching,
        cache_policy=policy,
        priorities=True,
        mixed_prefill_tokens=mixed,
        long_prefill_token_threshold=threshold,
        max_num_partial_prefills=partial,
        max_long_partial_prefills=long,
    )
    eng = engine(lim, depth, seed)
    stems = [[rng.randint(1, 49) for _ in range(20)] for _ in range(2)]
    wanted: dict[str, list[int]] = {}
    got: dict[str, list[int]] = {}
    aborted: set[str] = set()
    for number in range(rng.randint(1, 12)):
        stem = rng.choice(stems)
        prompt = stem[: rng.randint(0, 20)] + [
            rng.randint(1, 49) for _ in range(rng.randint(1, 16))
        ]
        name, most = f"r{number}", rng.randint(1, 20)
        total = min(len(prompt) + most, lim.max_model_len)
        output = expected_output(prompt, total, lim.eos_ids)
        resumed = rng.randint(0, len(output)) if rng.random() < 0.2 else 0
        wait_for = f"r{rng.randint(0, number)}" if rng.random() < 0.3 else None
        source = msgspec.structs.replace(
            request(name, prompt, most),
            resume=output[:resumed],
            wait_for=wait_for,
            priority=rng.randint(-1, 1),
            background=rng.random() < background,
        )
        eng.add(source)
        wanted[name] = output[resumed:]
        for _ in range(rng.randint(0, 4)):
            for delta in eng.step():
                assert delta.id not in aborted
                got.setdefault(delta.id, []).extend(delta.token_ids)
        if rng.random() < 0.2:
            victim = f"r{rng.randint(0, number)}"
            eng.abort([victim])
            aborted.add(victim)
    run(eng, got)
    for name, tokens in wanted.items():
        if name in aborted:
            assert got.get(name, []) == tokens[: len(got.get(name, []))]
        else:
            assert got[name] == tokens
    assert_all_free(eng)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(0, 2),
    pages=st.integers(16, 60),
    policy=st.sampled_from(["snapshot", "page"]),
    gap=st.integers(0, 12),
)
def test_what_is_counted_as_cached_was_not_computed(
    seed: int, depth: int, pages: int, policy: str, gap: int
) -> None:
    """Hits are what deltas say, and with what steps compute they make up all prompt tokens."""
    rng = random.Random(seed)
    lim = limits(num_pages=pages, cache_policy=policy, snapshot_interval=8)
    eng = engine(lim, depth, seed)
    stem = [rng.randint(1, 49) for _ in range(20)]
    cached: dict[str, int] = {}
    prompts: dict[str, int] = {}
    for number in range(8):
        tail = [rng.randint(1, 49) for _ in range(rng.randint(1, 9))]
        prompt = stem[: rng.randint(0, 20)] + tail
        eng.add(request(str(number), prompt, rng.randint(1, 12)))
        prompts[str(number)] = len(prompt)
        for _ in range(gap):
            cached |= {delta.id: delta.cached_tokens for delta in eng.step()}
    cached |= {delta.id: delta.cached_tokens for delta in iter_deltas(eng)}
    stats = eng.stats()
    assert stats.prefix_hits == sum(cached.values())
    assert stats.prefix_queries == stats.prompt_tokens == sum(prompts.values())
    assert all(cached[name] < prompts[name] for name in prompts)
    plans = eng.worker.plans  # type: ignore[attr-defined]
    computed = sum(chunk.count for plan in plans for chunk in plan.chunks)
    if stats.preemptions == 0:
        assert computed == stats.prefix_queries - stats.prefix_hits
    assert_all_free(eng)


def test_the_lowest_priority_number_runs_first_and_is_preempted_last() -> None:
    eng = engine(limits(max_num_seqs=1, priorities=True, drafts=0))
    ended = []
    for name, priority in (("a", 0), ("b", 2), ("c", -1), ("d", 2)):
        eng.add(msgspec.structs.replace(request(name, [1, 2, 3], 3), priority=priority))
    while eng.has_work():
        ended += [delta.id for delta in eng.step() if delta.finish_reason]
    assert ended == ["c", "a", "b", "d"]
    lim = limits(num_pages=26, drafts=0, prefix_caching=False, priorities=True)
    eng = engine(lim)
    for name, priority in (("low", 1), ("high", 0), ("higher", -1)):
        source = request(name, [ord(name[0])] * 12, 30, ignore_eos=True)
        eng.add(msgspec.structs.replace(source, priority=priority))
    preempted = set()
    while eng.has_work():
        before = set(eng.scheduler.running)
        eng.step()
        preempted |= {r.id for r in before & set(eng.scheduler.waiting)}
    assert preempted == {"low"}
    with pytest.raises(RequestError, match="--scheduling-policy priority"):
        engine(limits()).add(msgspec.structs.replace(request("x", [1]), priority=1))


def test_outputs_of_one_prompt_share_its_pages() -> None:
    """Outputs that wait for the first one find all full pages of the prompt in the cache."""
    eng = engine(limits(num_pages=100, num_snapshots=4))
    prompt = list(range(1, 15))
    for number in range(4):
        source = request(str(number), prompt, 4)
        eng.add(msgspec.structs.replace(source, wait_for="0" if number else None))
    cached = {}
    while eng.has_work():
        for delta in eng.step():
            cached[delta.id] = delta.cached_tokens
    assert cached == {"0": 0, "1": 12, "2": 12, "3": 12}
    eng.add(msgspec.structs.replace(request("lone", prompt, 4), wait_for="long gone"))
    assert run(eng)["lone"]


def test_a_resumed_request_that_has_all_its_tokens_ends_at_once() -> None:
    eng = engine(limits())
    for resume, reason in (([4, 5], "length"), ([EOS], "stop")):
        eng.add(msgspec.structs.replace(request("a", [1, 2], 2), resume=resume))
        assert [d.finish_reason for d in eng.step()] == [reason]
        assert not eng.has_work()
    eng.add(msgspec.structs.replace(request("a", [1, 2], 2), resume=[4, 5]))
    eng.abort(["a"])
    assert not eng.has_work()


def test_preemption_loses_no_token() -> None:
    lim = limits(num_pages=20, drafts=0, prefix_caching=False)
    eng = engine(lim)
    prompts = {f"r{i}": [i + 1] * 12 for i in range(4)}
    for name, prompt in prompts.items():
        eng.add(request(name, prompt, 30, ignore_eos=True))
    got: dict[str, list[int]] = {}
    preemptions = 0
    while eng.has_work():
        for delta in eng.step():
            got.setdefault(delta.id, []).extend(delta.token_ids)
            preemptions += delta.preemptions if delta.finish_reason else 0
    assert eng.stats().preemptions == preemptions > 0
    for name, prompt in prompts.items():
        assert got[name] == expected_output(prompt, 42, frozenset())
    assert_all_free(eng)


def test_prefix_is_hit_on_the_second_use_at_a_known_boundary_and_on_the_third_elsewhere() -> None:
    lim = limits(max_model_len=64, num_pages=200, max_num_batched_tokens=64)
    stem = list(range(1, 17))
    eng = engine(lim)
    cached = []
    for number in range(3):
        source = AddRequest(
            f"a{number}", [*stem, 20 + number, 21, 22, 23, 24], SamplingParams(max_tokens=1)
        )
        eng.add(source)
        while eng.has_work():
            cached += [delta.cached_tokens for delta in eng.step() if delta.finish_reason]
    assert cached == [0, 0, 16]
    deltas_seen = []
    for number in range(2):
        params = SamplingParams(max_tokens=1)
        prompt = [30 + token for token in stem] + [20 + number, 21, 22, 23, 24]
        eng.add(AddRequest(f"b{number}", prompt, params, boundaries=[17]))
        while eng.has_work():
            deltas_seen += [delta.cached_tokens for delta in eng.step() if delta.finish_reason]
    assert deltas_seen == [0, 16]


def test_a_page_cache_knows_prompts_and_answers() -> None:
    """The next turn finds all whole pages of the last one, and no step was cut for that."""
    eng = engine(limits(num_pages=100, cache_policy="page", num_snapshots=0))
    prompt = list(range(1, 11))
    eng.add(request("a", prompt, 9, ignore_eos=True))
    answer = run(eng)["a"]
    assert eng.worker.plans[0].chunks[0].count == 10  # type: ignore[attr-defined]
    eng.add(request("b", [*prompt, *answer, 7, 8, 9], 4))
    cached = {delta.id: delta.cached_tokens for delta in iter_deltas(eng)}
    assert cached == {"b": 16}  # of 18 whose keys and values were computed
    assert eng.stats().prefix_hits == 16
    assert_all_free(eng)


def test_a_preempted_request_finds_its_pages_in_a_page_cache() -> None:
    computed = {}
    for caching in (False, True):
        lim = limits(num_pages=20, drafts=0, prefix_caching=caching, cache_policy="page")
        eng = engine(lim)
        prompts = {f"r{i}": [i + 1] * 12 for i in range(4)}
        for name, prompt in prompts.items():
            eng.add(request(name, prompt, 30, ignore_eos=True))
        got = run(eng)
        assert got == {n: expected_output(p, 42, frozenset()) for n, p in prompts.items()}
        assert eng.stats().preemptions > 0
        plans = eng.worker.plans  # type: ignore[attr-defined]
        computed[caching] = sum(chunk.count for plan in plans for chunk in plan.chunks)
    assert computed[True] < computed[False]


def test_what_a_failed_request_computed_is_not_cached() -> None:
    eng = engine(limits(num_pages=100, cache_policy="page", drafts=0), depth=1)
    eng.add(request("a", list(range(1, 17)), 8))
    scheduler = eng.scheduler
    first, second = scheduler.plan(), scheduler.plan()
    assert first is not None
    assert second is not None
    scheduler.commit(StepResult(first.step, [1], [[]], not_finite=[0]))
    scheduler.commit(StepResult(second.step, [1], [[5]]))
    scheduler.check_integrity()
    assert not scheduler.has_work()
    assert scheduler.stats().free_pages == 99


def test_a_fully_cached_prompt_still_computes_a_token() -> None:
    eng = engine(limits(num_pages=100))
    prompt = list(range(1, 9))
    first = (eng.add(request("a", prompt, 4)), run(eng)["a"])[1]
    eng.add(request("b", prompt, 4))
    assert run(eng)["b"] == first


def test_a_prompt_of_k_plus_1_tokens_is_a_prompt() -> None:
    """Rows are classified by the request's phase, not by how many tokens they have."""
    eng = engine(limits(drafts=3))
    eng.add(request("a", [5, 6, 7, 8], 6))
    plan = eng.scheduler.plan()
    assert plan is not None
    assert plan.decode == []
    assert [chunk.count for chunk in plan.chunks] == [4]


def test_a_step_with_decode_rows_computes_few_prompt_tokens() -> None:
    eng = engine(limits(mixed_prefill_tokens=5, drafts=0))
    eng.add(request("a", [1] * 20, 20, ignore_eos=True))
    eng.step()
    eng.step()
    for name in ("b", "c"):
        eng.add(request(name, [ord(name)] * 20, 4))
    seen = []
    for _ in range(6):
        eng.step()
        plan = eng.worker.plans[-1]  # type: ignore[attr-defined]
        assert plan.decode
        seen.append(sum(chunk.count for chunk in plan.chunks))
    assert seen == [5] * 6


def test_long_prompts_with_decode_rows_fill_tiles() -> None:
    """The tokens of decode rows count too; the last chunk has any length."""
    eng = engine(
        limits(
            mixed_prefill_tokens=1100, max_num_batched_tokens=4000, max_model_len=6000,
            num_pages=4000, num_snapshots=0, drafts=1,
        )
    )  # fmt: skip
    for number in range(3):
        eng.add(request(f"r{number}", [number + 1] * 20, 200, ignore_eos=True))
    eng.step()
    eng.step()
    eng.add(request("long", [7] * 5000, 4))
    seen = []
    while sum(seen) < 5000:
        eng.step()
        plan = eng.worker.plans[-1]  # type: ignore[attr-defined]
        seen.append(sum(chunk.count for chunk in plan.chunks))
        assert len(plan.decode) == 3
    assert {count + 3 * 2 for count in seen[:-1]} == {1024}
    assert seen[-1] == 5000 % 1018


def roomy(**changes: object) -> Limits:
    """Limits with enough pages and slots, also for long prompts."""
    sizes: dict[str, object] = {
        "max_num_seqs": 16, "max_num_batched_tokens": 2048, "mixed_prefill_tokens": 1024,
        "max_model_len": 40_000, "page_size": 16, "num_pages": 20_000, "num_snapshots": 0,
        "long_prefill_token_threshold": 512, "max_long_partial_prefills": 1, "drafts": 0,
    }  # fmt: skip
    return limits(**{**sizes, **changes})


def unchecked(lim: Limits) -> Engine:
    """An engine for long prompts, whose worker does not check every earlier token."""
    worker = FakeWorker(lim.page_size, lim.drafts, lim.max_num_batched_tokens, checks=False)
    return Engine(Scheduler(lim), worker, check=True)


def chunk_sizes(eng: Engine) -> list[int]:
    """Prompt tokens of the last step by request, as planned."""
    plan = eng.worker.plans[-1]  # type: ignore[attr-defined]
    return [chunk.count for chunk in plan.chunks]


@pytest.mark.parametrize(("threshold", "later"), [(LARGE_PIECE, 1), (LARGE_PIECE // 2, 2)])
def test_nothing_is_launched_behind_a_large_piece_of_a_prompt(threshold: int, later: int) -> None:
    """So a request that arrives while it runs is in the next step; with a small one in the next
    but one."""
    lim = roomy(long_prefill_token_threshold=threshold)
    worker = FakeWorker(lim.page_size, lim.drafts, lim.max_num_batched_tokens, checks=False)
    eng = Engine(Scheduler(lim), worker, depth=1, check=True)
    launch, running = worker.launch, 3  # the step that runs when the request arrives

    def launch_and_wait(plan: StepPlan, masks: object = None) -> Any:
        pending = launch(plan, None)
        if len(worker.plans) == running + 1:
            pending.result = arrive(pending.value)
        return pending

    def arrive(value: StepResult) -> Callable[[], StepResult]:
        def result() -> StepResult:
            eng.add(request("short", [9] * 64, max_tokens=2))
            return value

        return result

    worker.launch = launch_and_wait  # type: ignore[method-assign]
    eng.add(request("long", [7] * 8192, max_tokens=2))
    run(eng)
    first = next(i for i, plan in enumerate(worker.plans) if len(plan.chunks) == 2)
    assert first == running + later


def test_prompt_tokens_are_counted_as_pieces_are_computed_and_once_when_cached() -> None:
    eng = unchecked(roomy(num_snapshots=8))
    prompt = [1 + n % 40 for n in range(4000)]
    eng.add(request("first", prompt, 1))
    seen = [0]
    while eng.has_work():
        eng.step()
        seen.append(eng.scheduler.stats().prefilled_tokens)
        assert seen[-1] - seen[-2] == sum(chunk_sizes(eng))
    assert seen[-1] == 4000
    assert len(set(seen)) > 3  # it came in pieces
    eng.add(request("again", [*prompt, 5, 6, 7], 1))
    run(eng)
    stats = eng.scheduler.stats()
    assert stats.prefix_hits > 0
    assert stats.prefilled_tokens == stats.prompt_tokens == 4000 + 4003


def test_a_short_prompt_does_not_wait_behind_long_ones() -> None:
    eng = unchecked(roomy())
    for number in range(4):
        eng.add(request(f"long{number}", [number + 1] * 4000))
    eng.step()
    assert chunk_sizes(eng) == [512]
    eng.add(request("short", [9] * 64, 1))
    assert [delta.id for delta in eng.step()] == ["short"]
    assert chunk_sizes(eng) == [
        64,
        64,
    ]  # 128 tokens in all: a quarter for the long one, whole tiles


def test_cached_tokens_do_not_make_a_prompt_long() -> None:
    """A long prompt with all but its end in the cache counts as short."""
    eng = unchecked(roomy(num_snapshots=8))
    prompt = [1 + n % 40 for n in range(4000)]
    eng.add(request("first", prompt, 1))
    run(eng)
    for number in range(2):
        eng.add(request(f"long{number}", [41 + number] * 4000))
    eng.step()
    eng.add(request("again", [*prompt, 5, 6, 7], 1))
    assert [delta.id for delta in eng.step() + eng.step()] == ["again"]


def test_steps_of_a_long_prompt_are_small_while_short_ones_come() -> None:
    """So that the next short one waits for the end of a small step."""
    eng = unchecked(roomy())
    eng.add(request("long", [1] * 16_000, 1))
    eng.step()
    large = chunk_sizes(eng)[0]
    eng.add(request("short", [2] * 10, 1))
    sizes = []
    for _ in range(FOLLOWING_STEPS + 3):
        eng.step()
        sizes.append(chunk_sizes(eng))
    at = next(i for i, step in enumerate(sizes) if len(step) == 2)
    assert sum(sizes[at]) <= large // 4
    assert sizes[at + 1 : at + 1 + FOLLOWING_STEPS] == [[large // 2]] * FOLLOWING_STEPS
    assert sizes[at + 1 + FOLLOWING_STEPS] == [large]


def test_the_first_of_several_long_prompts_ends_first() -> None:
    eng = unchecked(roomy(max_long_partial_prefills=2, max_num_partial_prefills=2))
    for number in range(3):
        eng.add(request(f"long{number}", [number + 1] * 2000, 1))
    seen, ended = [], []
    while eng.has_work():
        ended += [delta.id for delta in eng.step()]
        seen.append(chunk_sizes(eng))
    assert ended == ["long0", "long1", "long2"]
    assert seen[:3] == [[512, 512]] * 3  # two at a time
    assert seen[3] == [464, 464, 96]  # 1,024 tokens again: the third has what the ends leave


def test_a_prompt_of_a_higher_priority_takes_its_tokens_first() -> None:
    eng = unchecked(roomy(priorities=True, mixed_prefill_tokens=0))
    eng.add(msgspec.structs.replace(request("low", [1] * 4000), priority=1))
    eng.step()
    for name, priority in (("short", 2), ("high", 0)):
        source = request(name, [ord(name[0])] * (64 if name == "short" else 3000), 1)
        eng.add(msgspec.structs.replace(source, priority=priority))
    running = {r.id: r for r in eng.scheduler.running}
    eng.step()
    assert "short" not in running
    assert chunk_sizes(eng) == [512, 64]  # one long prompt at a time, and the short one
    assert running["low"].computed == 512


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(600, 4000),
    threshold=st.sampled_from([0, 64, 500]),
    depth=st.integers(0, 2),
    interval=st.sampled_from([0, 256]),
    decoding=st.integers(0, 6),
)
def test_a_long_prompt_ends_under_a_flood_of_short_ones(
    seed: int, length: int, threshold: int, depth: int, interval: int, decoding: int
) -> None:
    """It gets `min_chunk` tokens of each step, fewer only where it saves a snapshot."""
    rng = random.Random(seed)
    lim = roomy(long_prefill_token_threshold=threshold, snapshot_interval=interval, num_snapshots=4)
    worker = FakeWorker(lim.page_size, 0, lim.max_num_batched_tokens, checks=False)
    eng = Engine(Scheduler(lim), worker, depth=depth, check=True)
    for number in range(decoding):
        eng.add(request(f"row{number}", [rng.randint(1, 49)], 4000, ignore_eos=True))
    eng.step()
    eng.add(request("long", [rng.randint(1, 49) for _ in range(length)], 1))
    smallest = min(lim.max_num_batched_tokens - 16, lim.mixed_prefill_tokens)
    # Spread over steps a budget is halved at most; the first step may have been planned before.
    least = min_chunk(lim, smallest // 2)
    stops = length // interval + 2 if interval else 2
    bound = -(-length // least) + stops + depth
    for step in range(bound + 1):
        for number in range(rng.randint(1, 8)):
            prompt = [rng.randint(1, 49) for _ in range(rng.randint(1, 200))]
            eng.add(request(f"s{step}.{number}", prompt, rng.randint(1, 3)))
        if any(delta.id == "long" for delta in eng.step()):
            return
    raise AssertionError(f"{bound} steps were not enough")


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(0, 2),
    caching=st.booleans(),
    length=st.integers(30, 40),
)
def test_overtaking_a_request_that_lacks_pages_is_limited(
    seed: int, depth: int, caching: bool, length: int
) -> None:
    """Small requests that keep coming use the free pages, and then let it in."""
    rng = random.Random(seed)
    lim = limits(max_num_seqs=8, num_pages=13, drafts=0, prefix_caching=caching)
    eng = engine(lim, depth)
    for number in range(3):
        eng.add(request(f"early{number}", [number + 1] * 4, 8, ignore_eos=True))
    eng.step()
    eng.add(request("big", [7] * length, 4))
    got: dict[str, list[int]] = {}
    running: set[str] = set()
    overtook: set[str] = set()
    steps = 0
    while "big" not in running:
        overtook |= {name for name in running if name.startswith("late")}
        steps += 1
        small = [rng.randint(1, 49) for _ in range(rng.randint(1, 8))]
        eng.add(request(f"late{steps}", small, rng.randint(1, 6), ignore_eos=True))
        for delta in eng.step():
            got.setdefault(delta.id, []).extend(delta.token_ids)
        running = {r.id for r in eng.scheduler.running}
        assert steps < 100
    # One may come in the step that finds out that pages are lacking.
    assert len(overtook) <= 1 + MAX_OVERTAKES
    assert run(eng, got)["big"] == expected_output([7] * length, length + 4, lim.eos_ids)
    assert_all_free(eng)


def test_abort_frees_everything_in_every_phase() -> None:
    for steps in range(8):
        for depth in (0, 1):
            eng = engine(limits(), depth)
            for number in range(6):
                eng.add(request(f"r{number}", [number + 1] * 10, 20, ignore_eos=True))
            for _ in range(steps):
                eng.step()
            eng.abort([f"r{number}" for number in range(6)] + ["nobody"])
            run(eng)
            assert_all_free(eng)


def test_requests_that_cannot_run_are_refused_with_the_reason() -> None:
    eng = engine(limits(vocab_size=50))
    for bad, words in (
        (request("a", []), "empty"),
        (request("a", [1] * 48), "at most 47 tokens"),
        (request("a", [1], stop_token_ids=list(range(40))), "at most 16"),
        (request("a", [1, 90]), "contains token 90; the model's tokens are 0 to 49"),
        (request("a", [1], logit_bias={50: 1.0}), "logit_bias contains token 50"),
        (msgspec.structs.replace(request("a", [1]), resume=[2] * 48), "requested 49 tokens"),
    ):
        with pytest.raises(RequestError, match=words):
            eng.add(bad)
    eng.add(request("a", [1]))
    with pytest.raises(RequestError, match="in use"):
        eng.add(request("a", [1]))


def test_given_seeds_are_used_and_others_differ() -> None:
    eng = engine(limits())
    eng.add(request("a", [1], seed=7))
    eng.add(request("b", [1]))
    eng.add(request("c", [1]))
    plan = eng.scheduler.plan()
    assert plan is not None
    seeds = [a.seed for a in plan.admissions]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


def test_a_plan_log_on_a_full_disk_ends_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    eng = engine(limits(), log=Path("/dev/full"))
    prompts = {f"r{number}": [number + 1] * 12 for number in range(40)}
    for name, prompt in prompts.items():
        eng.add(request(name, prompt, 30, ignore_eos=True))
    got = run(eng)
    eng.close()
    for name, prompt in prompts.items():
        assert got[name] == expected_output(prompt, 42, frozenset())
    (line,) = caplog.messages
    assert line == "plan log /dev/full: No space left on device; it ends here"


def test_a_plan_log_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--plan-log .*: No such file or directory"):
        engine(limits(), log=tmp_path / "none" / "log")


def test_plan_log_replays(tmp_path: Path) -> None:
    path = tmp_path / "plan.log"
    lim = limits()
    eng = engine(lim, depth=1, seed=3, log=path)
    for number in range(5):
        eng.add(request(f"r{number}", [number + 1, 2, 3, 4, 5, 6], 9))
    run(eng)
    eng.close()
    entries = list(plan_log.read(path))
    assert sum(isinstance(e, StepPlan) for e in entries) == sum(
        isinstance(e, StepResult) for e in entries
    )
    again = FakeWorker(lim.page_size, lim.drafts, lim.max_num_batched_tokens, seed=3)
    assert plan_log.replay(path, again) == []
    other = FakeWorker(lim.page_size, lim.drafts, lim.max_num_batched_tokens, seed=4)
    with pytest.raises(AssertionError):  # other acceptance: the plans no longer fit
        assert plan_log.replay(path, other) == []
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="truncated, or no plan log"):
        list(plan_log.read(path))


@pytest.mark.parametrize("depth", [0, 1])
def test_plan_log_has_times_and_sizes(tmp_path: Path, depth: int) -> None:
    """Counts follow from prompts and outputs; times are in order, and walls do not overlap."""
    path, prompts = tmp_path / "plan.log", [7, 3, 12]
    eng = engine(limits(), depth=depth, seed=3, log=path)
    for number, length in enumerate(prompts):
        eng.add(request(f"r{number}", list(range(1, length + 1)), 9))
    run(eng)
    eng.close()
    timings = [e for e in plan_log.read(path) if isinstance(e, StepTiming)]
    assert [t.step for t in timings] == sorted(t.step for t in timings)
    assert sum(t.sum_prefill_tokens for t in timings) == sum(prompts)
    ended = 0.0
    for t in timings:
        assert t.planned <= t.launched <= t.ended <= t.committed
        assert 0 <= t.wall <= t.ended - ended + 1e-9
        assert depth or t.accepted_tokens >= t.num_decode_requests  # ended rows get none
        assert t.decode_tokens == t.num_decode_requests * (1 + limits().drafts)
        ended = t.ended
    first = next(t for t in timings if t.num_decode_requests and not t.sum_prefill_tokens)
    assert first.sum_decode_kv_tokens >= min(prompts)
    assert sum(t.accepted_tokens for t in timings) > len(prompts) * 4


def test_results_out_of_order_are_refused() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", [1, 2]))
    scheduler.plan()
    with pytest.raises(RuntimeError, match="expected step"):
        scheduler.commit(StepResult(99, [1], [[1]]))


def test_the_first_delta_has_the_queue_time() -> None:
    scheduler = Scheduler(limits(max_num_seqs=1, drafts=0))
    for name in ("a", "b"):
        source = request(name, [1, 2], max_tokens=2, ignore_eos=True)
        scheduler.add(msgspec.structs.replace(source, arrival=10.0))
    deltas_seen = []
    for now in (11.0, 12.0, 13.0, 14.0):
        plan = scheduler.plan(now)
        assert plan is not None
        slots = [*plan.decode, *(chunk.slot for chunk in plan.chunks)]
        deltas_seen += scheduler.commit(StepResult(plan.step, slots, [[7]]))
    assert [(delta.id, delta.queued) for delta in deltas_seen] == [
        ("a", 1.0), ("a", None), ("b", 3.0), ("b", None)
    ]  # fmt: skip


def test_pages_that_only_the_prefix_cache_holds_can_be_evicted() -> None:
    eng = engine(limits(num_pages=100))
    eng.add(request("a", list(range(1, 14)), 4))
    run(eng)
    stats = eng.stats()
    assert stats.evictable_pages == 4  # of 16 computed tokens, the answer among them
    assert stats.free_pages + stats.evictable_pages == stats.total_pages


def test_tokens_of_steps_are_counted() -> None:
    eng = engine(limits(drafts=0, num_snapshots=0))
    eng.add(request("a", list(range(1, 6)), 3, ignore_eos=True))
    run(eng)
    stats = eng.stats()
    # One step of 5 prompt tokens and the first output token, two of one token.
    assert stats.step_tokens == [2, 1, *[0] * (len(STEP_TOKENS) - 1)]
    assert stats.step_tokens_sum == 8


def test_requests_that_wait_for_a_prefix_are_deferred() -> None:
    scheduler = Scheduler(limits(num_pages=100))
    prompt = list(range(1, 15))
    for number in range(3):
        source = request(str(number), prompt, 4)
        scheduler.add(msgspec.structs.replace(source, wait_for="0" if number else None))
    assert (scheduler.stats().waiting, scheduler.stats().waiting_deferred) == (3, 0)
    scheduler.plan()
    assert (scheduler.stats().waiting, scheduler.stats().waiting_deferred) == (2, 2)


def test_no_drafts_are_counted_without_drafts() -> None:
    eng = engine(limits(drafts=0))
    eng.add(request("a", [1, 2, 3]))
    run(eng)
    assert (eng.stats().drafts, eng.stats().accepted_per_position) == (0, [])


def test_host_time_of_a_step_at_256_sequences() -> None:
    """Plan and commit, with their messages encoded: well under a step of any model."""
    lim = limits(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_model_len=4096,
        page_size=16,
        num_pages=40_000,
    )
    scheduler = Scheduler(lim)
    encode = msgspec.msgpack.Encoder().encode
    worker = FakeWorker(16, 1, 8192, checks=False)
    for number in range(256):
        scheduler.add(request(f"request-{number}", [number + 1] * 24, 4000, ignore_eos=True))
    while scheduler.stats().waiting or any(c for c in worker.plans[-1].chunks):
        plan = scheduler.plan()
        assert plan is not None
        scheduler.commit(worker.launch(plan).result())
    best = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        plan = scheduler.plan()
        assert plan is not None
        encode(plan)
        spent = time.perf_counter() - start
        result = StepResult(plan.step, plan.decode, [[7, 8] for _ in plan.decode])
        start = time.perf_counter()
        deltas: list[Delta] = scheduler.commit(result)
        encode(deltas)
        best = min(best, spent + time.perf_counter() - start)
        assert len(deltas) == 256
    assert best < 0.002
