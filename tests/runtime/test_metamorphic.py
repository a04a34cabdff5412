"""One set of prompts, served with every option: the greedy tokens stay the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from millrace.engine import background
from tests.support.engines import assert_same, build, generate, run, with_few_pages

_rng = random.Random(0)
_stem = [_rng.randrange(3, 300) for _ in range(40)]
# Shared beginnings of many lengths, and lengths around pages, windows and chunks of the maths.
PROMPTS = [
    _stem[: _rng.randint(0, 40)] + [_rng.randrange(3, 300) for _ in range(_rng.randint(1, 50))]
    for _ in range(6)
] + [[_rng.randrange(3, 300) for _ in range(n)] for n in (1, 2, 16, 17, 64, 65)]


@pytest.fixture(scope="module")
def cold(tiny_model: Path) -> list[list[int]]:
    """Each prompt alone, in one chunk, without drafts or cache."""
    out = []
    for prompt in PROMPTS:
        tokens, _ = run(tiny_model, [prompt], max_num_seqs=1)
        out += tokens
    return out


def mtp(k: int, **options: Any) -> dict[str, Any]:
    return {"speculative_config": {"num_speculative_tokens": k}, **options}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="co-batched"),
        pytest.param({"async_scheduling": True}, id="pipelined"),
        pytest.param({"max_num_batched_tokens": 4}, id="chunks-of-4"),
        pytest.param({"max_num_batched_tokens": 13}, id="chunks-of-13"),
        pytest.param({"max_num_batched_tokens": 64}, id="chunks-of-64"),
        pytest.param({"max_num_batched_tokens": 65, "block_size": 1}, id="pages-of-1"),
        pytest.param(
            {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 20}, id="long-prompts"
        ),
        pytest.param({"enable_prefix_caching": True}, id="prefix-cache"),
        pytest.param(
            {"enable_prefix_caching": True, "block_size": 4, "snapshot_interval": 8},
            id="many-snapshots",
        ),
        pytest.param(
            {"enable_prefix_caching": True, "block_size": 4, "num_snapshots": 1}, id="one-snapshot"
        ),
        *(pytest.param(mtp(k), id=f"mtp-{k}") for k in range(1, 6)),
        pytest.param(mtp(1, async_scheduling=True), id="mtp-1-pipelined"),
        pytest.param(mtp(5, max_num_batched_tokens=29), id="mtp-5-chunks-of-29"),
        pytest.param(
            mtp(
                2,
                mixed_prefill_tokens=30,
                long_prefill_token_threshold=9,
                max_long_partial_prefills=2,
                async_scheduling=True,
                enable_prefix_caching=True,
            ),
            id="mtp-2-long-prompts-pipelined",
        ),
        pytest.param(
            mtp(2, enable_prefix_caching=True, block_size=4, snapshot_interval=8),
            id="mtp-2-prefix-cache",
        ),
        pytest.param(
            mtp(3, enable_prefix_caching=True, block_size=8, async_scheduling=True),
            id="mtp-3-prefix-cache-pipelined",
        ),
    ],
)
def test_same_tokens(tiny_model: Path, cold: list[list[int]], options: dict[str, Any]) -> None:
    got, _ = run(tiny_model, PROMPTS, **options)
    assert_same(tiny_model, PROMPTS, cold, got)


@pytest.mark.parametrize("k", [0, 2])
def test_same_tokens_on_a_warm_prefix_cache(
    tiny_model: Path, cold: list[list[int]], k: int
) -> None:
    options = mtp(k, enable_prefix_caching=True, block_size=4, num_snapshots=64)
    engine = build(tiny_model, **options)
    for repeat in range(3):
        got = generate(engine, PROMPTS)
        assert_same(tiny_model, PROMPTS, cold, got)
        if repeat:
            assert engine.stats().prefix_hits > repeat * sum(map(len, PROMPTS)) // 2
    engine.close()


@pytest.mark.parametrize("k", [0, 2])
def test_same_tokens_under_salts(tiny_model: Path, cold: list[list[int]], k: int) -> None:
    """Salts change what is cached, never a token: prompts of one salt alone find each other."""
    options = mtp(k, enable_prefix_caching=True, block_size=4, num_snapshots=64)
    engine = build(tiny_model, **options)
    hits = []
    for salts in (["a", "b"], ["", "a"], ["c"], ["a", "b"], ["c"]):
        before = engine.stats().prefix_hits
        given = [salts[i % len(salts)] for i in range(len(PROMPTS))]
        assert_same(tiny_model, PROMPTS, cold, generate(engine, PROMPTS, salts=given))
        hits.append(engine.stats().prefix_hits - before)
    assert hits[3] > 2 * hits[0]  # the same prompts under the same salts
    assert hits[4] > 2 * hits[2]
    engine.close()


@pytest.mark.parametrize(("k", "pipelined"), [(0, False), (2, False), (2, True)])
def test_same_tokens_when_preempted(
    tiny_model: Path, cold: list[list[int]], k: int, pipelined: bool
) -> None:
    engine = build(tiny_model, **mtp(k, async_scheduling=pipelined))
    engine = with_few_pages(engine, 18)  # one longest sequence and a little
    got = generate(engine, PROMPTS)
    assert engine.stats().preemptions > 0
    assert_same(tiny_model, PROMPTS, cold, got)
    engine.close()


@pytest.mark.parametrize(("k", "pipelined"), [(0, False), (3, True)])
def test_same_tokens_beside_batch_work(
    tiny_model: Path, cold: list[list[int]], k: int, pipelined: bool
) -> None:
    """Rows that miss steps, often and at any time, go on as if they had not."""
    engine = build(tiny_model, **mtp(k, async_scheduling=pipelined))
    others = frozenset(range(0, len(PROMPTS), 2))
    with mock.patch.object(background, "STEPS", 3), mock.patch.object(background, "ROWS", 2):
        got = generate(engine, PROMPTS, background=others)
    assert_same(tiny_model, PROMPTS, cold, got)
    engine.close()


@pytest.mark.parametrize("k", [pytest.param(0, marks=pytest.mark.sweep), 2])
def test_same_tokens_on_two_ranks(tiny_model: Path, cold: list[list[int]], k: int) -> None:
    got, _ = run(tiny_model, PROMPTS, tensor_parallel_size=2, **mtp(k, enable_prefix_caching=True))
    assert_same(tiny_model, PROMPTS, cold, got)


def test_aborts_leave_the_others_alone(tiny_model: Path, cold: list[list[int]]) -> None:
    """An aborted request gives its slot and pages to others without harm."""
    engine = build(tiny_model, **mtp(1, async_scheduling=True, enable_prefix_caching=True))
    steps = iter(range(1000))

    def between() -> None:
        if next(steps) in (2, 5, 9):
            victim = engine.scheduler.running[0].id
            gone.add(int(victim))
            engine.abort([victim])

    gone: set[int] = set()
    got = generate(engine, PROMPTS, between=between)
    assert len(gone) == 3
    kept = [i for i in range(len(PROMPTS)) if i not in gone]
    pick = lambda rows: [rows[i] for i in kept]  # noqa: E731
    assert_same(tiny_model, pick(PROMPTS), pick(cold), pick(got))
    engine.scheduler.reset_prefix_cache()
    engine.scheduler.check_integrity()
    assert engine.stats().free_pages == engine.stats().total_pages
    engine.close()
