"""A prompt that its client gives up halfway: who sends it again computes only the rest."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from millrace.engine.engine import Engine
from millrace.protocol import AddRequest, SamplingParams
from millrace.runtime.step.inputs import SampledRows
from tests.support.engines import assert_same, build, generate, run, runner_of, watch_drafts

_rng = random.Random(6)
PROMPT = [_rng.randrange(3, 300) for _ in range(180)]
STEP = 32  # tokens


@pytest.fixture(scope="module")
def cold(tiny_model: Path) -> list[int]:
    return run(tiny_model, [PROMPT], max_num_seqs=1)[0][0]


def options(k: int = 0, **more: Any) -> dict[str, Any]:
    drafts = {"speculative_config": {"num_speculative_tokens": k}} if k else {}
    return {
        "enable_prefix_caching": True, "num_snapshots": 4, "snapshot_distance": 8,
        "max_num_batched_tokens": STEP, **drafts, **more,
    }  # fmt: skip


def give_up(engine: Engine, prompt: list[int], steps: int) -> None:
    """Add a prompt, abort it after so many steps, and let the engine end what it has launched."""
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    engine.add(AddRequest("given up", list(prompt), params))
    for _ in range(steps):
        engine.step()
    engine.abort(["given up"])
    while engine.has_work():
        assert not engine.step()


@pytest.mark.parametrize(
    "given",
    [
        *(pytest.param(options(k), id=f"mtp-{k}") for k in (0, 2)),
        pytest.param(options(1, async_scheduling=True, block_size=4), id="mtp-1-pipelined"),
        pytest.param(options(host_cache_gb=0.02), id="with-host-memory"),
    ],
)
def test_what_was_computed_is_found_again(
    tiny_model: Path, cold: list[int], given: dict[str, Any]
) -> None:
    """Each try gets further than the one before, and the tokens are those of a cold run."""
    engine = build(tiny_model, **given)
    had = 0
    for steps in (1, 2, 2):
        give_up(engine, PROMPT, steps)
        again = engine.scheduler.kv_manager.policy.cached(PROMPT)
        assert had + STEP // 2 < again < len(PROMPT)
        had = again
    before = engine.stats().prefix_hits
    got = generate(engine, [PROMPT])
    assert engine.stats().prefix_hits - before == had
    assert_same(tiny_model, [PROMPT], [cold], got)
    engine.scheduler.reset_prefix_cache()
    engine.scheduler.check_integrity()
    engine.close()


def test_the_drafts_stay_the_same_too(tiny_model: Path) -> None:
    """The record has what the draft head reads of the part's last token."""
    found = []
    for steps in (0, 2):
        engine = build(tiny_model, **options(2))
        if steps:
            give_up(engine, PROMPT, steps)
        drafts: list[list[int]] = []
        slots = runner_of(engine).slots

        def after(rows: SampledRows, count: Tensor, slots: Any = slots, to: Any = drafts) -> None:
            at = int(rows.base[0] + count[0]) + 1
            to.append(slots.tokens[rows.slots[0], at : at + 2].tolist())

        watch_drafts(runner_of(engine), after)
        generate(engine, [PROMPT])
        assert (engine.stats().prefix_hits > 0) == bool(steps)
        found.append(drafts)
        engine.close()
    assert found[0] == found[1]
    assert len(found[0]) > 8


def test_a_few_tokens_take_no_snapshot(tiny_model: Path) -> None:
    engine = build(tiny_model, **options(snapshot_distance=STEP))
    give_up(engine, PROMPT[: STEP + 20], 1)
    assert engine.stats().snapshots_used == 0
    engine.close()


def test_nothing_is_kept_without_the_cache_or_for_prompt_logprobs(tiny_model: Path) -> None:
    engine = build(tiny_model, **options(enable_prefix_caching=False))
    give_up(engine, PROMPT, 2)
    assert generate(engine, [PROMPT], 2)
    assert engine.stats().prefix_hits == 0
    engine.close()
