"""Closed and open loops: identities that hold whatever the parameters are, and directions."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import ConfigError
from millrace.plan.model.profiles import step_model
from millrace.plan.predict.load import Load, Settings, settings_of
from millrace.plan.predict.loops import Replica

MODEL = step_model("h200", "qwen3.5-27b", drafts=1)


def replica(load: Load, **options: object) -> Replica:
    return Replica(MODEL, load, settings_of("millrace", **options))


@settings(max_examples=25, deadline=None)
@given(
    st.floats(16, 4000), st.floats(2, 1000), st.sampled_from([1, 3, 20, 256, 700]),
    st.booleans(),
)  # fmt: skip
def test_a_closed_loop_holds_its_identity(
    prompt: float, answer: float, streams: int, served: bool
) -> None:
    """Streams = requests/s x (TTFT + (output - 1) x TPOT), and no more rows than streams."""
    load = Load(input=prompt, output=answer, concurrency=streams, text="0.9")
    found = replica(load, served=served).closed(streams)
    held = found.requests * (found.ttft + (answer - 1) * found.tpot)
    assert held == pytest.approx(streams, rel=0.02)
    assert 0 < found.rows <= min(streams, 256) + 1e-6
    assert found.itl_p99 >= found.decode_step > 0
    assert 0 <= found.mixed <= 1


def test_more_streams_bring_more_tokens_and_longer_gaps() -> None:
    load = Load(input=768, output=384, concurrency=1, text="0.9")
    found = [replica(load).closed(n) for n in (1, 4, 16, 64, 256)]
    for fewer, more in pairwise(found):
        assert more.total_tokens > fewer.total_tokens
        assert more.tpot > fewer.tpot


def test_streams_beyond_the_slots_wait() -> None:
    load = Load(input=768, output=384, concurrency=512, text="0.9")
    few, many = replica(load).closed(256), replica(load).closed(512)
    assert many.waiting == 256
    assert many.total_tokens == pytest.approx(few.total_tokens, rel=0.02)
    assert many.ttft > few.ttft + 5


def test_cached_prompts_are_not_computed() -> None:
    plain = Load(input=8192, output=64, concurrency=16)
    cached = Load(input=8192, output=64, concurrency=16, cached=8000)
    assert replica(cached).closed(16).requests > 5 * replica(plain).closed(16).requests


def test_an_open_loop_ends_at_the_capacity() -> None:
    load = Load(input=768, output=384, rate=1, text="0.9")
    one = replica(load)
    most = one.capacity()
    half = one.open(most / 2)
    assert half is not None
    assert half.requests == pytest.approx(most / 2, rel=0.02)
    assert one.open(most * 1.01) is None


def test_a_finite_run_is_slower_than_the_long_run() -> None:
    load = Load(input=768, output=384, concurrency=256, requests=768, text="0.9")
    one = replica(load)
    steady = one.closed(256)
    whole = 768 * (768 + 384)
    assert 0.85 < whole / one.run_seconds(steady, 256) / steady.total_tokens < 1.0


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (Load(input=0, output=1, rate=1), "input 0 and output 1: both need 1 token or more"),
        (Load(input=9, output=1), "give a concurrency or a rate, one of both, above 0"),
        (Load(input=9, output=1, rate=1, concurrency=1), "one of both"),
        (Load(input=9, output=1, rate=1, cached=9), "cached 9: use 0 to 8"),
        (Load(input=9, output=1, rate=1, text="x"), "unknown text 'x'"),
    ],
)
def test_what_is_no_load_is_refused(load: Load, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replica(load)


def test_prompts_apart_stop_the_decoding_rows() -> None:
    load = Load(input=768, output=384, concurrency=64, text="0.9")
    mixed = Replica(MODEL, load, Settings(mixed=1536)).closed(64)
    apart = Replica(MODEL, load, Settings(apart=True)).closed(64)
    assert apart.itl_p99 > mixed.itl_p99
