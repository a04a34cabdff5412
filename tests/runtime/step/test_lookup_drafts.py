"""Drafts that are looked up: the same tokens, whatever is found, beside rows of other methods."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from millrace.engine.engine import Engine
from millrace.errors import RequestError
from millrace.protocol import AddRequest, SamplingParams
from tests.runtime.step.test_cuda_graphs import in_graph_sizes
from tests.runtime.step.test_drafts import heartbeat
from tests.support.engines import PlainAnswers, build, generate, with_few_pages

_rng = random.Random(11)
_text = [_rng.randrange(3, 300) for _ in range(30)]
PROMPTS = [[*_text, 8, 9, *_text[:20]], [5, 6, 7] * 9, _text[5:], [_rng.randrange(3, 9)]]
TOKENS = 40


def speculative(method: str, **more: Any) -> dict[str, Any]:
    return {"speculative_config": {"method": method, **more}}


NGRAM = speculative("ngram", num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=4)
SUFFIX = speculative("suffix")
BOTH = speculative("mtp", num_speculative_tokens=2, lookup="suffix", prompt_lookup_min=1)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> PlainAnswers:
    return PlainAnswers.of(tiny_model, PROMPTS, TOKENS)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(NGRAM, id="ngram"),
        pytest.param(SUFFIX, id="suffix"),
        pytest.param(BOTH, id="mtp-and-suffix"),
        pytest.param({**SUFFIX, "async_scheduling": True}, id="pipelined"),
        pytest.param({**BOTH, "max_num_batched_tokens": 29}, id="chunks"),
        pytest.param(
            {**SUFFIX, "enable_prefix_caching": True, "block_size": 4, "snapshot_interval": 8},
            id="prefix-cache",
        ),
    ],
)
@pytest.mark.parametrize("graphs", [False, True])
def test_no_token_depends_on_what_is_found(
    tiny_model: Path, plain: PlainAnswers, options: dict[str, Any], graphs: bool
) -> None:
    """Three of four drafts are laid right, so that of the recurrent state's window any part is
    kept; the model's own text repeats as well."""
    engine = build(tiny_model, **options)
    if graphs:
        in_graph_sizes(engine)
    heartbeat(engine, engine.scheduler.limits.drafts, plain.sequences)
    plain.assert_said_by(engine)
    stats = engine.stats()
    engine.close()
    assert stats.drafts > stats.accepted_per_position[0] > 5, "some are accepted and some not"
    assert bool(stats.prefix_hits) == bool(options.get("enable_prefix_caching"))
    found = stats.draft_methods
    assert sum(one.drafts for one in found.values()) == stats.drafts
    assert sum(one.tokens for one in found.values()) == stats.draft_tokens
    assert all(one.drafts > 5 for one in found.values())


def test_the_same_tokens_where_requests_are_preempted(
    tiny_model: Path, plain: PlainAnswers
) -> None:
    engine = with_few_pages(build(tiny_model, async_scheduling=True, **SUFFIX), 17)
    prompts = PROMPTS[:2] * 3
    got = generate(engine, prompts, 90)
    assert engine.stats().preemptions > 0
    assert [tokens[:TOKENS] for tokens in got] == plain.greedy[:2] * 3
    engine.close()


def test_the_same_tokens_on_two_ranks(tiny_model: Path, plain: PlainAnswers) -> None:
    engine = build(tiny_model, tensor_parallel_size=2, **NGRAM)
    plain.assert_equal(generate(engine, PROMPTS, TOKENS))
    assert engine.stats().drafts > 20
    engine.close()


def answers(engine: Engine, methods: list[str | None]) -> list[list[int]]:
    """Every prompt's tokens; request i drafts by methods[i] alone."""
    for index, (prompt, method) in enumerate(zip(PROMPTS, methods, strict=True)):
        params = SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=TOKENS, speculative_method=method
        )
        engine.add(AddRequest(str(index), prompt, params))
    out: list[list[int]] = [[] for _ in PROMPTS]
    while engine.has_work():
        for delta in engine.step():
            out[int(delta.id)] += delta.token_ids
    return out


@pytest.mark.parametrize("pipelined", [False, True])
def test_rows_of_every_method_and_of_none_share_steps(
    tiny_model: Path, plain: PlainAnswers, pipelined: bool
) -> None:
    engine = build(tiny_model, async_scheduling=pipelined, **BOTH)
    got = answers(engine, ["none", "suffix", None, "mtp"])
    plain.assert_equal(got)
    found = engine.stats().draft_methods
    assert found["mtp"].drafts > 20
    assert found["suffix"].drafts > 10
    before = engine.stats().drafts
    plain.assert_equal(answers(engine, ["none"] * 4))
    assert engine.stats().drafts == before
    with pytest.raises(RequestError, match="use mtp or suffix or none"):
        answers(engine, ["eagle", None, None, None])
    engine.close()


def test_a_text_that_repeats_takes_a_sixth_of_the_steps(tiny_model: Path) -> None:
    """Every draft is right where the model is made to repeat: width tokens a step."""
    engine = build(tiny_model, **speculative("ngram", num_speculative_tokens=5))
    before = engine.stats().steps
    generate(engine, [[4, 9, 9] * 8], 60, allowed_token_ids=[9])
    assert engine.stats().steps - before <= 1 + 60 // 6 + 3
    engine.close()
