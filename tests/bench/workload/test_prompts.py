"""What is asked and when: ranges, seeds, arrivals."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.bench.load.arrivals import Schedule, check_schedule, due_times
from millrace.bench.workload.prompts import RandomSpec, length_range, random_prompts
from millrace.errors import UserError


def test_the_two_meanings_of_the_range_ratio() -> None:
    assert length_range(1024, 0.5, "vllm") == (512, 1536)
    assert length_range(1024, 0.5, "inferencex") == (512, 1024)
    assert length_range(100, 0.0, "vllm") == (100, 100)
    assert length_range(100, 1.0, "inferencex") == (100, 100)


@pytest.mark.parametrize(
    ("ratio", "convention"), [(1.0, "vllm"), (-0.1, "vllm"), (0, "inferencex")]
)
def test_a_ratio_without_meaning_is_refused(ratio: float, convention: str) -> None:
    with pytest.raises(UserError, match=f"{convention} convention"):
        length_range(10, ratio, convention)  # type: ignore[arg-type]


@given(
    length=st.integers(1, 200),
    ratio=st.floats(0.05, 0.95),
    convention=st.sampled_from(["vllm", "inferencex"]),
    seed=st.integers(0, 999),
)
def test_prompts_stay_in_range_and_follow_their_seed(
    length: int, ratio: float, convention: str, seed: int
) -> None:
    spec = RandomSpec(
        count=20,
        input_len=length,
        output_len=length,
        range_ratio=ratio,
        convention=convention,  # type: ignore[arg-type]
        prefix_len=3,
        vocab_size=50,
        seed=seed,
    )
    prompts = random_prompts(spec)
    low, high = length_range(length, ratio, spec.convention)
    for prompt in prompts:
        assert low + 3 <= prompt.input_tokens == len(prompt.content) <= high + 3
        assert low <= prompt.output_tokens <= high
        assert all(0 <= token < 50 for token in prompt.content)
        assert prompt.content[:3] == prompts[0].content[:3]
    assert random_prompts(spec) == prompts


def test_other_seeds_give_other_prompts() -> None:
    made = [random_prompts(RandomSpec(count=4, input_len=30, output_len=3, seed=s)) for s in (1, 2)]
    assert all(a.content != b.content for a, b in zip(*made, strict=True))


def test_text_has_as_many_words_as_it_says() -> None:
    for prompt in random_prompts(RandomSpec(count=5, input_len=12, output_len=3), as_text=True):
        assert isinstance(prompt.content, str)
        assert len(prompt.content.split()) == prompt.input_tokens == 12


@pytest.mark.parametrize("field", ["count", "input_len", "output_len", "vocab_size"])
def test_sizes_below_one_are_refused_by_the_name_of_their_flag(field: str) -> None:
    sizes = {"count": 1, "input_len": 1, "output_len": 1, "vocab_size": 1, field: 0}
    with pytest.raises(UserError, match="0: use 1 or more"):
        random_prompts(RandomSpec(**sizes))


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float | None]:
    schedule = Schedule(rate=rate, burstiness=burstiness, seed=seed)
    check_schedule(schedule)
    return list(itertools.islice(due_times(schedule), count))


def test_without_a_rate_a_request_is_due_when_there_is_a_place() -> None:
    assert arrivals(3, math.inf, 1.0, 0) == [None, None, None]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_of_their_gamma(burstiness: float) -> None:
    times = arrivals(20_001, 50.0, burstiness, 7)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert min(gaps) >= 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    # Of a gamma distribution with shape k, the coefficient of variation is 1 / sqrt(k).
    spread = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert spread == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0)])
def test_a_rate_or_burstiness_that_is_not_positive_is_refused(
    rate: float, burstiness: float
) -> None:
    with pytest.raises(UserError, match="above 0"):
        arrivals(1, rate, burstiness, 0)
