"""Steps of any depth after each other: the same tokens, from the same window of the state."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from millrace.engine.engine import Engine
from tests.runtime.step.test_cuda_graphs import in_graph_sizes
from tests.runtime.step.test_drafts import PROMPTS, heartbeat
from tests.runtime.step.test_logits_processors import PATTERN, add, finish, regex, tokens_of
from tests.support.engines import PlainAnswers, build, generate

AUTO = {"speculative_config": {"num_speculative_tokens": "auto"}}
BOTH = {
    "speculative_config": {
        "num_speculative_tokens": "auto", "lookup": "ngram", "prompt_lookup_min": 1
    }
}  # fmt: skip


def at_random(engine: Engine, seed: int = 3) -> Engine:
    """The engine, each step of which has any of its depths."""
    scheduler, rng = engine.scheduler, random.Random(seed)
    depths = scheduler.limits.depths
    assert len(depths) == 3
    scheduler.draft_depth.choose = lambda requests: rng.choice(depths)  # type: ignore[method-assign]
    return engine


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> PlainAnswers:
    return PlainAnswers.of(tiny_model, PROMPTS)


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        pytest.param(AUTO, True, id="mtp-graphs"),
        pytest.param({**AUTO, "async_scheduling": True}, False, id="mtp-pipelined"),
        pytest.param({**BOTH, "max_num_batched_tokens": 29}, False, id="both-chunks"),
        pytest.param(
            {
                **AUTO, "enable_prefix_caching": True, "block_size": 4, "snapshot_interval": 8,
                "async_scheduling": True,
            },
            True,
            id="mtp-prefix-cache-graphs",
        ),
    ],
)  # fmt: skip
def test_no_token_depends_on_the_depths(
    tiny_model: Path, plain: PlainAnswers, options: dict[str, Any], graphs: bool
) -> None:
    engine = at_random(build(tiny_model, **options))
    if graphs:
        in_graph_sizes(engine)
    heartbeat(engine, engine.scheduler.limits.drafts, plain.sequences)
    plain.assert_said_by(engine)
    stats = engine.stats()
    engine.close()
    assert min(stats.steps_by_depth[depth] for depth in engine.scheduler.limits.depths) > 5
    assert stats.accepted_per_position[1] > 2
    assert stats.draft_tokens < stats.drafts * len(stats.accepted_per_position)


def test_rows_with_options_and_grammars_at_any_depth(tiny_model: Path) -> None:
    def run(engine: Engine) -> dict[str, Any]:
        add(engine, "a", PROMPTS[1], repetition_penalty=1.4, logprobs=2)
        add(engine, "b", PROMPTS[4], prompt_logprobs=1)
        add(engine, "c", PROMPTS[2], grammar=regex(PATTERN), temperature=1.0, seed=2)
        return finish(engine)

    want = run(build(tiny_model))
    got = run(at_random(build(tiny_model, **AUTO)))
    assert {name: tokens_of(deltas) for name, deltas in got.items()} == {
        name: tokens_of(deltas) for name, deltas in want.items()
    }


def test_an_engine_chooses_by_itself(tiny_model: Path) -> None:
    """No draft of random weights is right, so steps soon have none. The engine says how long steps
    took; here a draft takes a fifth of a step."""
    engine = build(tiny_model, debug=False, **AUTO)
    chooser, told = engine.scheduler.draft_depth, list[float]()
    took = chooser.took

    def known(rows: int, depth: int, seconds: float) -> None:
        told.append(seconds)
        took(rows, depth, 0.01 + 0.002 * depth)

    chooser.took = known  # type: ignore[method-assign]
    generate(engine, PROMPTS[:3], 180)
    before = engine.stats().steps_by_depth[0]
    generate(engine, PROMPTS[:3], 100)
    after = engine.stats().steps_by_depth[0]
    engine.close()
    assert after - before > 80
    assert len(told) > 200
    assert min(told) > 0


def test_a_schedule_by_rows(tiny_model: Path) -> None:
    schedule = [[1, 1, 2], [2, 3, 1]]
    spec = {"num_speculative_tokens": 2, "num_speculative_tokens_per_batch_size": schedule}
    engine = build(tiny_model, speculative_config=spec)
    generate(engine, PROMPTS[:1], 8)
    assert set(engine.stats().steps_by_depth) == {2}
    generate(engine, PROMPTS[:2], 8)
    assert engine.stats().steps_by_depth[1] > 2
    engine.close()
