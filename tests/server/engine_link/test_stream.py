"""The mailbox between engine and reader, and the figures it keeps."""

from __future__ import annotations

import asyncio

import pytest

from millrace.errors import ModelError, RequestError
from millrace.protocol import AddRequest, Delta, SamplingParams, TokenLogprobs
from millrace.server.engine_link.stream import Stream
from millrace.server.telemetry.metrics import Histogram, RequestMetrics
from tests.support.running import run


def new_stream(metrics: RequestMetrics | None = None) -> Stream:
    request = AddRequest(id="r", prompt=[1, 2, 3], params=SamplingParams(), arrival=10.0)
    return Stream(request, metrics or RequestMetrics())


def test_what_is_not_taken_is_merged() -> None:
    async def body() -> None:
        stream = new_stream()
        stream.put(Delta("r", [1], cached_tokens=2), 11.0)
        stream.put(Delta("r", [2, 3]), 12.0)
        stream.put(Delta("r", [4], "stop", 4), 13.0)
        assert await stream.take() == Delta("r", [1, 2, 3, 4], "stop", 4, 2)

    run(body())


def test_log_probabilities_are_merged_with_their_tokens() -> None:
    async def body() -> None:
        stream = new_stream()
        one, two, three = (TokenLogprobs([token], [-1.0], 1) for token in (1, 2, 3))
        stream.put(Delta("r", [1], logprobs=[one], prompt_logprobs=[three]), 11.0)
        stream.put(Delta("r", [2], logprobs=[two]), 12.0)
        delta = await stream.take()
        assert (delta.logprobs, delta.prompt_logprobs) == ([one, two], [three])

    run(body())


def test_a_reader_waits_for_the_next_delta() -> None:
    async def body() -> None:
        stream = new_stream()
        reader = asyncio.ensure_future(stream.take())
        await asyncio.sleep(0)
        assert not reader.done()
        stream.put(Delta("r", [7]), 11.0)
        assert (await reader).token_ids == [7]

    run(body())


def test_a_failure_reaches_a_waiting_reader_and_every_later_one() -> None:
    async def body() -> None:
        stream = new_stream()
        reader = asyncio.ensure_future(stream.take())
        await asyncio.sleep(0)
        stream.fail(RuntimeError("first"))
        stream.fail(RuntimeError("second"))
        for taken in (reader, stream.take()):
            with pytest.raises(RuntimeError, match="first"):
                await taken

    run(body())


def test_what_came_before_a_failure_is_not_lost() -> None:
    async def body() -> None:
        stream = new_stream()
        stream.put(Delta("r", [1], "length"), 11.0)
        stream.fail(RuntimeError("later"))
        assert (await stream.take()).finish_reason == "length"
        with pytest.raises(RuntimeError, match="later"):
            await stream.take()

    run(body())


@pytest.mark.parametrize(
    "late",
    [
        Delta("r", [2]),
        Delta("r", [2], "length"),
        Delta("r", [], "error", error="why"),
    ],
)
def test_what_comes_after_the_end_does_not_replace_it(late: Delta) -> None:
    """The server ends a request itself, while the engine's next tokens are under way."""

    async def body() -> None:
        metrics = RequestMetrics()
        stream = new_stream(metrics)
        reader = asyncio.ensure_future(stream.take())
        await asyncio.sleep(0)  # it waits; what follows comes before it runs again
        stream.put(Delta("r", [1]), 11.0)
        stream.put(Delta("r", [], "abort"), 11.0)
        stream.put(late, 11.0)
        assert await reader == Delta("r", [1], "abort")
        assert stream.generated_tokens == 1
        assert +metrics.finished == {"abort": 1}

    run(body())


def test_tokens_after_a_failure_do_not_put_it_off() -> None:
    async def body() -> None:
        stream = new_stream()
        stream.fail(RuntimeError("gone"))
        stream.put(Delta("r", [1]), 11.0)
        with pytest.raises(RuntimeError, match="gone"):
            await stream.take()

    run(body())


@pytest.mark.parametrize(("model_failed", "kind"), [(False, RequestError), (True, ModelError)])
def test_an_error_comes_after_the_tokens_before_it(
    model_failed: bool, kind: type[Exception]
) -> None:
    async def body() -> None:
        stream = new_stream()
        stream.put(Delta("r", [1]), 11.0)
        stream.put(Delta("r", [2]), 11.5)
        stream.put(Delta("r", [], "error", error="why", model_failed=model_failed), 12.0)
        assert stream.ended
        assert (await stream.take()).token_ids == [1, 2]
        with pytest.raises(kind, match="why"):
            await stream.take()

    run(body())


def test_latencies_are_those_of_the_clock() -> None:
    metrics = RequestMetrics()
    stream = new_stream(metrics)
    for delta, now in (
        (Delta("r", [1], queued=0.25), 10.5),
        (Delta("r", [2, 3]), 10.75),
        (Delta("r", [4, 5], "length"), 11.5),
    ):
        stream.put(delta, now)
    assert metrics.queue_time.sum == 0.25
    assert metrics.queue_time.buckets(vllm=True)[-1] == ("+Inf", 1.0)
    assert metrics.time_to_first_token.sum == 0.5
    assert metrics.inter_token_latency.sum == 1.0
    assert metrics.inter_token_latency.buckets(vllm=True)[-1] == ("+Inf", 2.0)
    assert metrics.time_per_output_token.sum == 0.25
    assert metrics.end_to_end.sum == 1.5
    assert metrics.generation_tokens.sum == 5
    assert +metrics.finished == {"length": 1}


def test_a_request_ends_once() -> None:
    metrics = RequestMetrics()
    stream = new_stream(metrics)
    stream.put(Delta("r", [1], "stop"), 11.0)
    stream.abandon()
    assert +metrics.finished == {"stop": 1}
    other = new_stream(metrics)
    other.abandon()
    assert +metrics.finished == {"stop": 1, "abort": 1}


def test_a_stop_text_ends_a_request_like_a_stop_token() -> None:
    metrics = RequestMetrics()
    stream = new_stream(metrics)
    stream.put(Delta("r", [1, 2], queued=0.0), 11.0)
    stream.end_by_text()
    assert not stream.ended  # the engine is still to be told
    stream.put(Delta("r", [3], "length"), 12.0)
    stream.abandon()
    assert +metrics.finished == {"stop": 1}
    assert metrics.generation_tokens.sum == 2


def test_what_a_request_cost_is_known_at_its_end() -> None:
    metrics = RequestMetrics()
    stream = new_stream(metrics)
    stream.put(Delta("r", [1], cached_tokens=2), 10.5)
    stream.put(Delta("r", [], "length", cached_tokens=2, preemptions=3), 11.0)
    assert metrics.prefill_computed_tokens.sum == 1
    assert metrics.preemptions.sum == 3
    # vLLM counts requests of one token here, at 0.
    assert metrics.time_per_output_token_or_zero.buckets(vllm=True)[-1] == ("+Inf", 1.0)
    assert metrics.time_per_output_token.buckets(vllm=True)[-1] == ("+Inf", 0.0)


def test_a_histogram_counts_up_to_and_with_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0), finer=(0.5,))
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.observe(value)
    rows = [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.buckets(vllm=True) == rows
    assert histogram.buckets(vllm=False) == [("0.5", 1.0), *rows]
    assert histogram.sum == 102.0
