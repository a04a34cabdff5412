"""Sampling with drafts: the same draws, and draws from the right distribution."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from millrace.protocol import AddRequest, SamplingParams
from tests.support.engines import build, draft_well, generate, logits_after

PROMPT = [5, 9, 40, 77, 120, 6]


PROMPTS = [PROMPT, [3, 4]]


@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}])
@pytest.mark.parametrize("k", [1, 3])
def test_drafts_change_no_draw(tiny_model: Path, params: dict[str, float], k: int) -> None:
    """A request's seed and the position alone decide; so k = 0 and k > 0 agree token by token.

    The random head drafts poorly, so most drafts are replaced by what will be drawn.
    """
    chosen = {"temperature": 1.0, "seed": 11, **params}
    engine = build(tiny_model)
    plain = generate(engine, PROMPTS, 40, **chosen)
    engine.close()
    engine = build(tiny_model, speculative_config={"num_speculative_tokens": k})
    draft_well(engine, [[*p, *o] for p, o in zip(PROMPTS, plain, strict=True)])
    drafted = generate(engine, PROMPTS, 40, **chosen)
    accepted = engine.stats().accepted_per_position
    engine.close()
    assert drafted == plain
    assert min(accepted) > 5, "too few drafts were accepted to show anything"
    assert accepted[0] < engine.stats().drafts, "no draft was rejected"


def test_draws_follow_the_softmax(tiny_model: Path) -> None:
    """Pearson's chi-square of the second token, which a draft precedes, over many seeds."""
    first = int(logits_after(tiny_model, PROMPT).argmax())
    probabilities = torch.softmax(logits_after(tiny_model, [*PROMPT, first]), 0)
    engine = build(
        tiny_model,
        debug=False,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        speculative_config={"num_speculative_tokens": 1},
    )
    draws = 3000
    counts = torch.zeros_like(probabilities)
    for seed in range(draws):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=1, ignore_eos=True)
        engine.add(AddRequest(str(seed), [*PROMPT, first], params))
    while engine.has_work():
        for delta in engine.step():
            counts[delta.token_ids[0]] += 1
    engine.close()
    assert counts.sum() == draws
    large = probabilities * draws >= 5  # the rest is one cell together
    expected = torch.cat([probabilities[large], probabilities[~large].sum()[None]]) * draws
    seen = torch.cat([counts[large], counts[~large].sum()[None]])
    statistic = float(((seen - expected) ** 2 / expected).sum())
    freedom = expected.numel() - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_the_second_draw_after_an_accepted_draft_is_no_repeat(tiny_model: Path) -> None:
    """Positions draw with noise of their own: equal tokens in a row are no more likely."""
    engine = build(tiny_model, speculative_config={"num_speculative_tokens": 3})
    out = generate(engine, [PROMPT], 200, temperature=3.0, seed=1)[0]
    engine.close()
    repeats = sum(a == b for a, b in pairwise(out))
    assert repeats < 15


def test_synthetic_acceptance_keeps_its_rate(tiny_model: Path) -> None:
    spec = {"num_speculative_tokens": 2, "synthetic_acceptance": [0.9, 0.5]}
    engine = build(tiny_model, debug=False, speculative_config=spec)
    generate(engine, [[i + 3] for i in range(40)], 60, temperature=1.0)
    stats = engine.stats()
    engine.close()
    first, second = (n / stats.drafts for n in stats.accepted_per_position)
    assert abs(first - 0.9) < 0.05
    assert abs(second - 0.45) < 0.07
