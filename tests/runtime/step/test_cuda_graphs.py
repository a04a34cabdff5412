"""Steps in the sizes of graphs, run on the CPU as they are captured on a GPU: the same tokens."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.config import token_buckets
from millrace.engine.engine import Engine
from millrace.protocol import Chunk, StepPlan
from millrace.runtime.step.cuda_graphs import MOST_CHUNKS, Forward, GraphSizes, Tail
from millrace.runtime.step.inputs import Sizes, tokens_of
from tests.runtime.step.test_logits_processors import PATTERN, add, finish, regex
from tests.runtime.step.test_logits_processors import tokens_of as tokens_in
from tests.support.engines import build, generate, with_few_pages

_rng = random.Random(4)
_stem = [_rng.randrange(3, 300) for _ in range(40)]
PROMPTS = [_stem[:i] + [_rng.randrange(3, 300) for _ in range(n)] for i, n in ((0, 1), (30, 20))]
PROMPTS += [_stem, [9, 8], [_rng.randrange(3, 300) for _ in range(100)], _stem[:20] + [4] * 50]
TOKENS = 20


def mtp(k: int, **options: Any) -> dict[str, Any]:
    return {"speculative_config": {"num_speculative_tokens": k}, **options}


def in_graph_sizes(engine: Engine) -> Engine:
    """The engine, every step of which runs in the sizes of a graph where one has room for it."""
    engine.worker.runner.capture(engine.worker.config)  # type: ignore[attr-defined]
    return engine


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> list[list[int]]:
    return generate(build(tiny_model), PROMPTS, TOKENS)


OPTIONS = [
    {},
    {"max_num_batched_tokens": 40},
    {"enable_prefix_caching": True, "snapshot_interval": 16},
    {"dtype": "float32", "kv_cache_dtype": "float32", "debug": True},
    mtp(1),
    mtp(3, max_num_batched_tokens=50, enable_prefix_caching=True),
    {"max_num_seqs": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_tokens(tiny_model: Path, plain: list[list[int]], options: dict[str, Any]) -> None:
    engine = in_graph_sizes(build(tiny_model, **options))
    for _ in range(2):
        assert generate(engine, PROMPTS, TOKENS) == plain


def test_the_same_tokens_where_requests_are_preempted(tiny_model: Path) -> None:
    engine = with_few_pages(in_graph_sizes(build(tiny_model, **mtp(2))), 16)
    assert generate(engine, PROMPTS, 60) == generate(build(tiny_model), PROMPTS, 60)
    assert engine.stats().preemptions > 0


def test_more_prompts_in_a_step_than_a_graph_has_room_for(tiny_model: Path) -> None:
    prompts = [[3 + i, 7, 9 + i][: 1 + i % 3] for i in range(MOST_CHUNKS + 8)]
    options: dict[str, Any] = {"max_num_seqs": len(prompts), **mtp(1)}
    want = generate(build(tiny_model, **options), prompts, TOKENS)
    for graphs in (False, True):
        engine = in_graph_sizes(build(tiny_model, prefill_graphs=graphs, **options))
        assert generate(engine, prompts, TOKENS) == want


@pytest.mark.parametrize("k", [0, 2])
def test_the_same_draws(tiny_model: Path, k: int) -> None:
    given: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "seed": 6}
    want = generate(build(tiny_model), PROMPTS, TOKENS, **given)
    options = mtp(k) if k else {}
    assert (
        generate(
            in_graph_sizes(build(tiny_model, **options)),
            PROMPTS,
            TOKENS,
            **given,
        )
        == want
    )


@pytest.mark.parametrize("k", [0, 2])
def test_rows_with_wishes_share_the_forward(tiny_model: Path, k: int) -> None:
    def run(engine: Engine) -> dict[str, Any]:
        add(engine, "a", PROMPTS[1], repetition_penalty=1.4, logprobs=2)
        add(engine, "b", PROMPTS[4], prompt_logprobs=1)
        add(engine, "c", PROMPTS[2], grammar=regex(PATTERN), temperature=1.0, seed=2)
        add(engine, "d", PROMPTS[5])
        return finish(engine)

    options = mtp(k) if k else {}
    want = run(build(tiny_model, **options))
    got = run(in_graph_sizes(build(tiny_model, **options)))
    for name, deltas in want.items():
        assert tokens_in(got[name]) == tokens_in(deltas)
        ours, theirs = (
            [
                line
                for delta in some
                for line in [*(delta.logprobs or []), *(delta.prompt_logprobs or [])]
            ]
            for some in (got[name], deltas)
        )
        assert [line.token_ids for line in ours] == [line.token_ids for line in theirs]


def test_a_closed_engine_is_freed_without_the_garbage_collector(tiny_model: Path) -> None:
    """It does not look at what was there when it was frozen."""
    engine = in_graph_sizes(build(tiny_model))
    generate(engine, PROMPTS, 4)
    worker: Any = engine.worker
    model = weakref.ref(worker.model)
    gc.collect()
    gc.disable()
    try:
        engine.close()
        del engine, worker
        assert model() is None
    finally:
        gc.enable()


# --- which graph a step takes --------------------------------------------------------------------


def plans(rows: int, width: int) -> Iterator[StepPlan]:
    """Steps of all kinds, for `rows` slots."""
    rng = random.Random(1)
    for _ in range(300):
        decode = rng.randrange(rows + 1)
        prompts = rng.randrange(min(rows - decode, 40) + 1)
        counts = [rng.choice([1, 5, 64, 200]) for _ in range(prompts)]
        yield StepPlan(
            step=0, admissions=[], grants=[], decode=list(range(1, decode + 1)), saves=[],
            chunks=[Chunk(decode + i, 0, n, last=True) for i, n in enumerate(counts, 1)], context=9,
        )  # fmt: skip


@pytest.mark.parametrize("options", [{"max_num_seqs": 256}, {"max_num_seqs": 20, **mtp(3)}])
def test_every_step_has_a_graph_that_is_captured(tiny_model: Path, options: dict[str, Any]) -> None:
    options = {"max_num_batched_tokens": 3000, "mixed_prefill_tokens": 2048, **options}
    config = build(tiny_model, kv_cache_memory_bytes=1 << 28, **options).worker.config  # type: ignore[attr-defined]
    sizes = GraphSizes.of(config)
    captured = list(sizes.all())
    assert len(captured) == len(set(captured)) < 100
    assert set(sizes.largest()) <= set(captured)
    for plan in plans(config.max_num_seqs, sizes.width):
        if not plan.decode and not plan.chunks:
            continue
        tokens = tokens_of(plan, sizes.width)
        if tokens > config.most_mixed_tokens:
            continue
        found = sizes.forward(plan)
        if len(plan.chunks) > sizes.most.chunks:
            assert found is None
            continue
        assert found in captured
        assert found.tokens >= tokens
        assert found.decode >= len(plan.decode)
        assert found.chunks >= len(plan.chunks)
        if plan.chunks:
            assert found.tokens in token_buckets(config.most_mixed_tokens)
        assert sizes.tail(plan, filters=True) in captured
        assert sizes.most.cover(Sizes.of(plan))


def test_what_no_graph_has_room_for(tiny_model: Path) -> None:
    config = build(tiny_model, max_num_seqs=3).worker.config  # type: ignore[attr-defined]
    sizes = GraphSizes.of(config)
    chunks = [Chunk(slot, 0, 1, last=False) for slot in range(1, 5)]
    plan = StepPlan(0, [], [], [], chunks, [], 9)
    assert sizes.forward(plan) is None
    assert sizes.forward(StepPlan(0, [], [], [1], [], [], 9)) == Forward(1, 0, 1)
    two = StepPlan(0, [], [], [1, 2], [], [], 9)
    assert sizes.tail(two, filters=False) == Tail(2, False)


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"prefill_graphs": False}])
def test_prompts_have_graphs_unless_they_are_switched_off(
    tiny_model: Path, options: dict[str, Any]
) -> None:
    engine = build(tiny_model, max_num_seqs=3, **options)
    sizes = GraphSizes.of(engine.worker.config)  # type: ignore[attr-defined]
    assert bool(sizes.tokens) == ("prefill_graphs" not in options)
    plan = StepPlan(0, [], [], [], [Chunk(1, 0, 1, last=False)], [], 9)
    captured = set(sizes.all())
    assert (sizes.forward(plan) in captured) == bool(sizes.tokens)
    assert generate(in_graph_sizes(engine), PROMPTS, 6)


# --- the tables that kernels read ----------------------------------------------------------------


def test_tiles_places_and_live_rows() -> None:
    from millrace.kernels.batch import PrefillRows

    counts = [5, 1, 9, 0, 0]
    offsets = torch.tensor([4, *counts]).cumsum(0).int()
    slots = torch.tensor([7, 8, 9, 0, 0])
    rows = PrefillRows(slots, torch.zeros(5, dtype=torch.int64), offsets, None, None)
    found = [(row, number) for row, number in rows.tiles(4, 24).T.tolist() if row >= 0]
    assert found == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert rows.places(24).tolist() == [-1] * 4 + [*range(5), 0, *range(9)] + [-1] * 5
    assert rows.token_slots(24).tolist() == [0] * 4 + [7] * 5 + [8] + [9] * 9 + [0] * 5
    assert rows.live().tolist() == [3]
