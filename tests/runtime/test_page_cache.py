"""A model with nothing but attention: prompts resume at any page, and the tokens stay the same."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from millrace.engine.tier_transfers import LEAST_GAIN
from millrace.model.tiny import UNIT_TEST, write_checkpoint
from tests.support.engines import assert_same, build, generate, run, with_few_pages

_rng = random.Random(2)
_stem = [_rng.randrange(3, 300) for _ in range(40)]
PROMPTS = [
    _stem[: _rng.randint(0, 40)] + [_rng.randrange(3, 300) for _ in range(_rng.randint(1, 50))]
    for _ in range(6)
] + [[_rng.randrange(3, 300) for _ in range(n)] for n in (1, 4, 5, 16, 17)]
TOTAL = sum(map(len, PROMPTS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = replace(UNIT_TEST, layer_types=("full_attention",) * 3)
    return write_checkpoint(tmp_path_factory.mktemp("attention") / "model", shape, seed=3)


@pytest.fixture(scope="module")
def cold(model: Path) -> list[list[int]]:
    return [run(model, [prompt], max_num_seqs=1)[0][0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"block_size": 4}, id="whole-prompts"),
        pytest.param({"block_size": 1, "max_num_batched_tokens": 13}, id="chunks-pages-of-1"),
        pytest.param({"async_scheduling": True}, id="pipelined"),
        pytest.param(
            {"block_size": 4, "tensor_parallel_size": 2}, id="two-ranks", marks=pytest.mark.sweep
        ),
    ],
)
def test_same_tokens_cold_and_cached(
    model: Path, cold: list[list[int]], options: dict[str, Any]
) -> None:
    engine = build(model, enable_prefix_caching=True, **options)
    assert engine.scheduler.limits.cache_policy == "page"
    for _ in range(2):
        assert_same(model, PROMPTS, cold, generate(engine, PROMPTS))
    page = options.get("block_size", 16)
    # The second time all but the last token, and what is no whole page.
    assert engine.stats().prefix_hits >= sum((len(p) - 1) // page * page for p in PROMPTS)
    assert engine.stats().snapshots_total == 0
    engine.close()


def test_same_tokens_in_the_next_turn(model: Path, cold: list[list[int]]) -> None:
    """Pages that decode steps wrote serve the next turn, which includes the answer."""
    turns = [[*p, *answer, 9, 8, 7] for p, answer in zip(PROMPTS, cold, strict=True)]
    expected = [run(model, [turn], max_num_seqs=1)[0][0] for turn in turns]
    engine = build(model, enable_prefix_caching=True, block_size=4)
    generate(engine, PROMPTS)
    before = engine.stats().prefix_hits
    assert_same(model, turns, expected, generate(engine, turns))
    known = sum((len(turn) - 4) // 4 * 4 for turn in turns)  # without the last token of an answer
    assert engine.stats().prefix_hits - before == known
    engine.close()


@pytest.mark.parametrize("pipelined", [False, True])
def test_same_tokens_when_preempted(model: Path, cold: list[list[int]], pipelined: bool) -> None:
    options = {"enable_prefix_caching": True, "async_scheduling": pipelined}
    engine = with_few_pages(build(model, **options), 18)
    for _ in range(2):
        assert_same(model, PROMPTS, cold, generate(engine, PROMPTS))
    assert engine.stats().preemptions > 0
    engine.scheduler.reset_prefix_cache()
    assert engine.stats().free_pages == engine.stats().total_pages
    engine.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_prefixes_come_back_from_memory_and_files(
    model: Path, cold: list[list[int]], tmp_path: Path, ranks: int
) -> None:
    """Pages for a conversation or two on the device: the others come back from lower tiers."""
    lines = [(p, a) for p, a in zip(PROMPTS, cold, strict=True) if len(p) > 40]
    turns = [[*prompt, *answer, 9, 8, 7] for prompt, answer in lines]
    expected = [run(model, [turn], max_num_seqs=1)[0][0] for turn in turns]
    given: dict[str, Any] = {
        "enable_prefix_caching": True, "block_size": 4, "host_cache_gb": 0.02,
        "tensor_parallel_size": ranks,
    }  # fmt: skip
    if ranks == 1:
        given["disk_cache"] = str(tmp_path)
    engine = with_few_pages(build(model, **given), 42)
    for number, (prompt, answer) in enumerate(lines):
        assert_same(model, [prompt], [answer], generate(engine, [prompt]))
        assert engine.stats().host_cache_used > 0, number
    before = engine.stats().prefix_hits
    for turn, answer in zip(turns, expected, strict=True):
        assert_same(model, [turn], [answer], generate(engine, [turn]))
        engine.scheduler.check_integrity()
    known = sum((len(turn) - 4) // 4 * 4 for turn in turns)
    missed = known - (engine.stats().prefix_hits - before)
    assert 0 <= missed < LEAST_GAIN * len(turns)  # fewer tokens are not worth a load
    assert engine.stats().host_hits >= LEAST_GAIN
    engine.close()
    if ranks == 1:  # a restart
        engine = build(model, **given)
        for turn, answer in zip(turns, expected, strict=True):
            assert_same(model, [turn], [answer], generate(engine, [turn]))
        assert engine.stats().disk_hits > 0
        engine.close()


def test_a_draft_head_needs_snapshots_of_its_hidden_vector(
    model: Path, cold: list[list[int]]
) -> None:
    speculative = {"num_speculative_tokens": 2}
    options = {"enable_prefix_caching": True, "block_size": 4, "speculative_config": speculative}
    engine = build(model, **options)
    assert engine.scheduler.limits.cache_policy == "snapshot"
    for repeat in range(3):
        assert_same(model, PROMPTS, cold, generate(engine, PROMPTS))
        if repeat:
            assert engine.stats().prefix_hits > repeat * TOTAL // 2
    engine.close()


def test_options_without_effect_are_named(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(model, num_snapshots=4, enable_prefix_caching=True).close()
    assert "num_snapshots: no effect" in caplog.text
