"""Arrays of prompt budgets bring the numbers of the budget that serves."""

from __future__ import annotations

from random import Random

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.config import bucket_above, bucket_below
from millrace.engine import prompt_budget
from millrace.protocol import Limits
from millrace.simulate.aggregated import budget
from tests.simulate.scenarios import LIMITS

limits = st.builds(
    lambda batched, mixed, threshold, partial, long: msgspec.structs.replace(
        LIMITS,
        max_num_batched_tokens=batched,
        mixed_prefill_tokens=mixed,
        long_prefill_token_threshold=threshold,
        max_num_partial_prefills=partial,
        max_long_partial_prefills=long,
    ),
    st.sampled_from([512, 2048, 8192]),
    st.sampled_from([0, 100, 1536]),
    st.sampled_from([0, 64, 1024]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([0, 1, 2]),
)
counts = st.lists(st.integers(0, 3000), min_size=1, max_size=8)


def test_buckets() -> None:
    tokens = np.arange(0, 700)
    assert budget.bucket_above(tokens[1:]).tolist() == [bucket_above(n) for n in range(1, 700)]
    assert budget.bucket_below(tokens).tolist() == [bucket_below(n) for n in range(700)]


@settings(max_examples=200, deadline=None)
@given(limits, st.lists(st.tuples(st.integers(0, 500), st.integers(0, 9000)), min_size=1))
def test_tokens_of_a_step(given_limits: Limits, pairs: list[tuple[int, int]]) -> None:
    decode, missing = (np.array(values) for values in zip(*pairs, strict=True))
    found = budget.step_tokens(given_limits, decode, missing).tolist()
    assert found == [prompt_budget.step_tokens(given_limits, d, m) for d, m in pairs]


@settings(max_examples=200, deadline=None)
@given(limits, st.integers(0, 400), st.integers(0, 3000), st.booleans(), st.integers(0, 1 << 30))
def test_rounds(given_limits: Limits, decode: int, tokens: int, following: bool, seed: int) -> None:
    """One engine among three, offered the same prompts in both rounds."""
    random = Random(seed)
    one = prompt_budget.PromptBudget(given_limits, tokens, decode, following)
    one.start_priority()
    rows = np.full(3, tokens), np.full(3, decode), np.full(3, following)
    many = budget.PromptBudgets(given_limits, *rows)
    at = np.array([1])
    for _ in range(random.randrange(4)):
        missing = random.randrange(1, 2000)
        whole = one.whole(missing)
        assert many.whole(at, np.array([missing])).tolist() == [whole]
        if whole:
            computed = random.choice([whole, max(1, whole // 2)])
            one.spend_whole(computed)
            many.spend_whole(at, np.array([computed]))
    for _ in range(random.randrange(1, 6)):
        missing, split = random.randrange(1, 4000), random.random() < 0.4
        chunk = one.chunk(missing, split)
        found = many.chunk(at, np.array([missing]), np.array([split]))
        assert found.tolist() == [chunk]
        if chunk:
            computed = random.choice([chunk, max(1, chunk // 2)])
            one.spend_chunk(missing, chunk, computed, split)
            values = (np.array([n]) for n in (missing, chunk, computed))
            many.spend_chunk(at, *values, np.array([split]))
        assert many.left[1] == one.left
    assert many.whole_prompts[1] == one.whole_prompts
    assert many.left[0] == many.left[2] == tokens
