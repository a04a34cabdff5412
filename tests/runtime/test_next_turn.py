"""The next turn of a conversation resumes where the answer ended, and its tokens stay the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from millrace.engine.engine import Engine
from tests.support.engines import assert_same, build, generate, run

_rng = random.Random(4)
PROMPTS = [[_rng.randrange(3, 300) for _ in range(n)] for n in (1, 2, 15, 16, 17, 30, 47, 65)]
NEW = 7  # tokens of the next message
LENGTHS = [1, 3, 5, 11, 13, 16, 17, 24]


def next_turns(prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
    rng = random.Random(len(prompts[0]))
    return [
        [*prompt, *answer, *(rng.randrange(3, 300) for _ in range(NEW))]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


@pytest.fixture(scope="module")
def turns(tiny_model: Path) -> list[tuple[list[list[int]], list[list[int]]]]:
    """(prompts, answers) of three turns, each computed alone and cold."""
    found, prompts = [], PROMPTS
    for _ in range(3):
        answers = [
            run(tiny_model, [prompt], length, max_num_seqs=1)[0][0]
            for prompt, length in zip(prompts, LENGTHS, strict=True)
        ]
        found.append((prompts, answers))
        prompts = next_turns(prompts, answers)
    return found


def options(k: int = 0, **more: Any) -> dict[str, Any]:
    drafts = {"speculative_config": {"num_speculative_tokens": k}} if k else {}
    return {"enable_prefix_caching": True, "num_snapshots": 64, **drafts, **more}


def answer_all(engine: Engine, prompts: list[list[int]], together: bool) -> list[list[int]]:
    """Answers of the lengths above."""
    if together:
        longest = generate(engine, prompts, max(LENGTHS))
        return [answer[:n] for answer, n in zip(longest, LENGTHS, strict=True)]
    return [generate(engine, [p], n)[0] for p, n in zip(prompts, LENGTHS, strict=True)]


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(options(), id="no-drafts"),
        *(pytest.param(options(k), id=f"mtp-{k}") for k in (1, 2, 3)),
        pytest.param(options(async_scheduling=True), id="pipelined"),
        pytest.param(options(2, async_scheduling=True, block_size=4), id="mtp-2-pipelined"),
        pytest.param(  # shown by test_tiers, too
            options(1, tensor_parallel_size=2), id="mtp-1-two-ranks", marks=pytest.mark.sweep
        ),
        pytest.param(options(3, block_size=1), id="mtp-3-pages-of-1"),
    ],
)
def test_a_next_turn_computes_its_own_tokens_only(
    tiny_model: Path, turns: list[tuple[list[list[int]], list[list[int]]]], given: dict[str, Any]
) -> None:
    engine = build(tiny_model, **given)
    for number, (prompts, answers) in enumerate(turns):
        before = engine.stats().prefix_hits
        assert_same(tiny_model, prompts, answers, answer_all(engine, prompts, together=False))
        if number:
            # The last token of an answer is not computed yet: nobody asked for what follows it.
            known = sum(len(prompt) - NEW - 1 for prompt in prompts)
            assert engine.stats().prefix_hits - before == known
    engine.close()


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("k", [0, 2])
def test_answers_that_end_at_different_times_are_kept(
    tiny_model: Path,
    turns: list[tuple[list[list[int]], list[list[int]]]],
    k: int,
    pipelined: bool,
) -> None:
    """A token ends each answer, which a pipelined host learns one step late: the slot's state must
    be that of the end all the same."""
    engine = build(tiny_model, **options(k, async_scheduling=pipelined, max_num_seqs=8))
    prompts, answers = turns[0]
    for prompt, answer in zip(prompts, answers, strict=True):
        got = generate(engine, [prompt, [7, 8, 9]], 24, stop_token_ids=[answer[-1]])[0]
        assert_same(tiny_model, [prompt], [answer[: len(got)]], [got])
        turn = [*prompt, *got, 11, 12, 13]
        expected = run(tiny_model, [turn], 8, max_num_seqs=1)[0]
        before = engine.stats().prefix_hits
        assert_same(tiny_model, [turn], expected, generate(engine, [turn], 8))
        assert engine.stats().prefix_hits - before == len(turn) - 4
    engine.close()


def test_seeded_tokens_stay_the_same(tiny_model: Path) -> None:
    seeded = {"temperature": 0.8, "seed": 5, "top_p": 0.9}
    cold = build(tiny_model, max_num_seqs=1)
    for k in (0, 1, 3):
        engine = build(tiny_model, **options(k))
        prompt = PROMPTS[5]
        for _ in range(3):
            answer = generate(engine, [prompt], 9, **seeded)[0]
            assert answer == generate(cold, [prompt], 9, **seeded)[0]
            prompt = [*prompt, *answer, 5, 6, 7]
        assert engine.stats().prefix_hits > len(prompt)
        engine.close()
    cold.close()


def test_branches_of_one_answer_do_not_disturb_each_other(
    tiny_model: Path, turns: list[tuple[list[list[int]], list[list[int]]]]
) -> None:
    """Two requests resume at one unfinished page at the same time, each in a copy of its own."""
    prompts, answers = turns[0]
    stem = [*prompts[5], *answers[5]]
    branches = [[*stem, *tail] for tail in ([3, 4, 5], [3, 4, 6], [200] * 20)]
    expected = [run(tiny_model, [branch], 12, max_num_seqs=1)[0][0] for branch in branches]
    engine = build(tiny_model, **options(2))
    generate(engine, [prompts[5]], LENGTHS[5])
    for _ in range(2):
        assert_same(tiny_model, branches, expected, generate(engine, branches, 12))
    assert engine.stats().prefix_hits >= 6 * (len(stem) - 1)
    engine.close()
