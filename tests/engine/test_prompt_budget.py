"""How a step's prompt tokens are shared between prompts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.config import TILE, bucket_above, bucket_below, token_buckets
from millrace.engine.prompt_budget import PromptBudget, min_chunk, step_tokens
from millrace.protocol import Limits


def limits(**changes: Any) -> Limits:
    values: dict[str, Any] = {
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "max_model_len": 40_000,
        "page_size": 16,
        "num_pages": 10_000,
        "num_snapshots": 0,
        "drafts": 1,
        "mixed_prefill_tokens": 2048,
        "long_prefill_token_threshold": 2048,
        "max_long_partial_prefills": 1,
    }
    return Limits(**{**values, **changes})


def opened(tokens: int = 2048, decode_tokens: int = 0, **changes: Any) -> PromptBudget:
    budget = PromptBudget(limits(**changes), tokens, decode_tokens)
    budget.start_priority()
    return budget


@given(st.integers(1, 70_000))
def test_buckets_around_every_number_of_tokens(tokens: int) -> None:
    buckets = token_buckets(tokens)
    assert buckets == sorted(set(buckets))
    assert bucket_above(tokens) == buckets[-1] >= tokens
    assert bucket_below(tokens) == max((b for b in buckets if b <= tokens), default=0)
    assert all(bucket % TILE == 0 for bucket in buckets if bucket > 64)


def test_half_of_the_budget_is_for_prompts_that_fit_into_it() -> None:
    budget = opened(2048)
    assert budget.whole(1025) == 0
    assert budget.whole(1000) == 1000
    budget.spend_whole(1000)
    assert (budget.whole(25), budget.whole(24)) == (0, 24)
    assert budget.chunk(1048) == 1048


def test_a_long_prompt_gets_a_quarter_where_others_wait_for_the_step() -> None:
    assert opened(8192).chunk(30_000) == 2048
    budget = opened(8192)
    budget.spend_whole(64)
    assert budget.chunk(30_000) == 512 - 64  # 512 tokens in all


def test_a_long_prompt_gets_half_where_short_ones_came_lately() -> None:
    budget = PromptBudget(limits(), 8192, 0, following=True)
    budget.start_priority()
    assert budget.chunk(30_000) == 1024
    assert budget.chunk(2048) == 2048  # not long


def test_tokens_left_by_a_snapshot_stop_go_to_others() -> None:
    budget = opened(2048)
    budget.spend_whole(48)
    assert (budget.left, budget.whole(976), budget.whole(977)) == (2000, 976, 0)
    budget = opened(2048)
    budget.spend_chunk(30_000, 2048, 100)
    assert budget.left == 1948


def test_the_end_of_a_split_prompt_counts_towards_the_threshold() -> None:
    """A step in which a long prompt ends and another begins is no larger than others."""
    budget = opened(8192)
    assert budget.chunk(928, split=True) == 928
    budget.spend_chunk(928, 928, 928, split=True)
    assert budget.chunk(30_000) == 2048 - 928
    budget.spend_chunk(30_000, 1120, 1120)
    assert budget.chunk(928, split=True) == 0
    assert budget.chunk(928) == 928  # never split, not long: it has no part in that
    small = opened(8192)
    small.spend_whole(64)
    assert small.chunk(928, split=True) == 512 - 64


def test_without_a_threshold_no_prompt_is_long() -> None:
    budget = opened(8192, long_prefill_token_threshold=0)
    assert budget.chunk(30_000) == 8192


def test_a_limit_of_partial_prefills() -> None:
    budget = opened(8192, max_long_partial_prefills=2, max_num_partial_prefills=2)
    budget.spend_chunk(30_000, 2048, 2048)
    assert budget.chunk(20_000) == 2048
    budget.spend_chunk(20_000, 2048, 2048)
    assert budget.chunk(20_000) == 0
    assert budget.chunk(2000) == 2000
    budget.spend_chunk(2000, 2000, 2000)
    assert budget.left == 2096
    budget.spend_chunk(1900, 1900, 1900)
    assert budget.chunk(196) == 196
    assert budget.chunk(1000) == 0  # a third piece


@pytest.mark.parametrize(
    ("decode_tokens", "missing", "tokens"),
    [
        (0, 100_000, 8192),
        (452, 64, 1980),  # all of it: nothing is cut, so nothing is rounded
        (452, 1980, 1980),
        (452, 1984, 1084),  # two steps of 1,536 tokens, not one of 2,432 and one of 580
        (452, 100_000, 1980),  # 2,432 = 19 tiles
    ],
)
def test_prompts_are_spread_evenly_over_steps_of_full_tiles(
    decode_tokens: int, missing: int, tokens: int
) -> None:
    assert step_tokens(limits(), decode_tokens, missing) == tokens


@given(
    decode_tokens=st.integers(0, 600),
    mixed=st.integers(0, 3000),
    missing=st.integers(1, 50_000),
    batched=st.integers(601, 9000),
)
def test_steps_stay_within_their_limits_and_are_as_few_as_possible(
    decode_tokens: int, mixed: int, missing: int, batched: int
) -> None:
    sizes = limits(max_num_batched_tokens=batched, mixed_prefill_tokens=mixed)
    tokens = step_tokens(sizes, decode_tokens, missing)
    most = batched - decode_tokens
    if decode_tokens and mixed:
        most = min(most, mixed)
    assert 0 < tokens <= most
    if decode_tokens:
        largest = step_tokens(sizes, decode_tokens, 10**9)
        assert 2 * largest >= most
        assert -(-missing // tokens) == -(-missing // largest)


@given(
    tokens=st.integers(1, 9000),
    decode_tokens=st.integers(0, 600),
    threshold=st.integers(0, 3000),
    shorts=st.lists(st.integers(1, 500), max_size=20),
    missing=st.integers(1, 50_000),
)
def test_the_first_in_turn_always_gets_its_min_chunk(
    tokens: int, decode_tokens: int, threshold: int, shorts: list[int], missing: int
) -> None:
    budget = opened(tokens, decode_tokens, long_prefill_token_threshold=threshold)
    for short in shorts:
        if budget.whole(short):
            budget.spend_whole(short)
    given_now = budget.chunk(missing)
    least = min_chunk(limits(long_prefill_token_threshold=threshold), tokens)
    assert min(missing, least) <= given_now <= min(missing, budget.left)
