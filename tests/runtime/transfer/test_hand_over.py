"""Prompts computed by one engine and answered by another: the tokens of one engine alone."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher

from millrace.engine.engine import Engine
from millrace.errors import ConfigError
from millrace.protocol import AddRequest, Delta, Grammar, RecordSource, SamplingParams
from millrace.runtime.worker import Worker
from tests.support.engines import assert_same, build, generate

_rng = random.Random(21)
PROMPTS = [[_rng.randrange(3, 300) for _ in range(n)] for n in (2, 17, 33, 64, 100)]
LENGTH = 12


def options(k: int = 0, **more: Any) -> dict[str, Any]:
    drafts = {"speculative_config": {"num_speculative_tokens": k}} if k else {}
    return {
        "enable_prefix_caching": True, "num_snapshots": 6, "host_cache_gb": 0.03, "role": "both",
        "kv_lease": 60.0, **drafts, **more,
    }  # fmt: skip


@contextmanager
def pair(model: Path, prefill: dict[str, Any], decode: dict[str, Any]) -> Iterator[list[Engine]]:
    engines = [build(model, **prefill), build(model, **decode)]
    try:
        yield engines
    finally:
        for engine in engines:
            engine.close()


def finish(engines: list[Engine], request: AddRequest) -> list[Delta]:
    """Add a request to the last engine and run until it has ended; the others take note."""
    engines[-1].add(request)
    found: list[Delta] = []
    end = time.monotonic() + 60
    while engines[-1].has_work():
        assert time.monotonic() < end
        found += engines[-1].step()
        for other in engines[:-1]:
            other.poll()
    return found


def compute(
    engine: Engine, prompt: list[int], made: Sequence[int] = (), **params: Any
) -> tuple[RecordSource, list[int]]:
    """Where the record of the prompt and of what was made of its answer is, and the next token."""
    most = len(made) + 1
    chosen = SamplingParams(max_tokens=most, ignore_eos=True, **{"temperature": 0.0, **params})
    name = f"record-{engine.stats().steps}"
    request = AddRequest(name, prompt, chosen, hand_over=name, resume=list(made))
    deltas = finish([engine], request)
    assert isinstance(engine.worker, Worker)
    assert engine.worker.address is not None
    address = engine.worker.address
    [record] = {delta.record for delta in deltas if delta.record}
    source = RecordSource(address.host, address.port, address.engine, name, record)
    return source, [token for delta in deltas for token in delta.token_ids]


def hand_over(
    engines: list[Engine], prompt: list[int], resume: bool = False, **params: Any
) -> list[int]:
    """The answer of the second engine behind the first one's record, and nothing computed twice."""
    prefill, decode = engines
    source, first = compute(prefill, prompt, **params)
    assert source.tokens == len(prompt) - 1
    before = decode.stats()
    chosen = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **{"temperature": 0.0, **params})
    request = AddRequest(
        f"answer-{before.steps}", prompt, chosen, source=source, resume=first if resume else []
    )
    deltas = finish([prefill, decode], request)
    assert decode.stats().prefix_hits - before.prefix_hits == len(prompt) - 1
    tokens = [token for delta in deltas for token in delta.token_ids]
    return [*first, *tokens] if resume else tokens


def assert_all_moved(engines: list[Engine], close: bool = True) -> None:
    """Bytes sent are bytes received; with `close`, nothing is left behind either."""
    prefill, decode = engines
    end = time.monotonic() + 20
    while prefill.stats().transfers.open:
        assert time.monotonic() < end
        prefill.poll()
    sent, received = prefill.stats().transfers, decode.stats().transfers
    assert (sent.sent, sent.sent_bytes) == (received.received, received.received_bytes)
    assert sent.sent_failed == received.received_failed == 0
    for engine in engines if close else ():
        engine.scheduler.reset_prefix_cache()
        engine.scheduler.check_integrity()
        assert engine.stats().host_cache_used == 0


def alone(model: Path, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    engine = build(model, max_num_seqs=1)
    answers = [generate(engine, [prompt], LENGTH, **params)[0] for prompt in prompts]
    engine.close()
    return answers


def under_a_grammar(
    engines: list[Engine], prompt: list[int], model: Path | None = None
) -> list[int]:
    """A seeded answer behind the first engine's record; of a new engine alone with `model`."""
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=5)
    request = AddRequest("words", prompt, params, grammar=WORDS)
    if model is None:
        source, _ = compute(engines[0], prompt)
        deltas = finish(engines, msgspec.structs.replace(request, source=source))
    else:
        cold = build(model, max_num_seqs=1)
        deltas = finish([cold], request)
        cold.close()
    return [token for delta in deltas for token in delta.token_ids]


CORE = [("shm", 0, 1, 1), ("tcp", 2, 1, 1), ("nixl", 3, 1, 1), ("shm", 1, 2, 1)]
ALL = [
    (transport, k, *ranks)
    for transport in ("shm", "tcp", "nixl")
    for k in range(4)
    for ranks in ((1, 1), (2, 1), (1, 2))
]
SEEDED = {"temperature": 0.9, "seed": 3}
WORDS = Grammar(LLMatcher.grammar_from_regex(r"(yes|no), [0-9]{2,5}( and [a-f]{1,6}){1,2}\."))


@pytest.mark.parametrize(
    ("transport", "k", "ranks", "ranks_behind"),
    [
        pytest.param(
            *one, marks=() if one in CORE else pytest.mark.sweep, id="-".join(map(str, one))
        )
        for one in ALL
    ],
)
def test_same_tokens_over_every_transport(
    tiny_model: Path, transport: str, k: int, ranks: int, ranks_behind: int
) -> None:
    """Greedy, seeded and under a grammar, the last prompt with a prefix that is there already. k:
    drafts. ranks: that compute the prompts; ranks_behind: that answer them."""
    given = options(k, kv_transport=transport)
    one = {**given, "tensor_parallel_size": ranks}
    other = {**given, "tensor_parallel_size": ranks_behind}
    prompts = [*PROMPTS, [*PROMPTS[3], *PROMPTS[1]]]
    with pair(tiny_model, one, other) as engines:
        greedy = [hand_over(engines, prompt) for prompt in prompts]
        for engine in engines:
            engine.scheduler.reset_prefix_cache()
        seeded = [hand_over(engines, prompt, **SEEDED) for prompt in prompts]
        words = under_a_grammar(engines, prompts[2][::-1])
        assert_all_moved(engines)
    assert_same(tiny_model, prompts, alone(tiny_model, prompts), greedy)
    assert words == under_a_grammar([], prompts[2][::-1], tiny_model)
    assert seeded == alone(tiny_model, prompts, **SEEDED)


@pytest.mark.parametrize(
    ("transport", "k", "ranks"),
    [
        ("shm", 2, 1),
        pytest.param("tcp", 0, 1, marks=pytest.mark.sweep),
        pytest.param("nixl", 3, 1, marks=pytest.mark.sweep),
        pytest.param("tcp", 1, 2, marks=pytest.mark.sweep),
    ],
)
def test_a_record_comes_while_its_prompt_is_computed(
    tiny_model: Path, transport: str, k: int, ranks: int
) -> None:
    """The answer is asked for before the prompt; its tokens are those of one engine alone."""
    given = options(k, kv_transport=transport)
    prompts = [PROMPTS[4] * 2, PROMPTS[3] * 3]
    one = {**given, "tensor_parallel_size": ranks, "max_num_batched_tokens": 64}
    with pair(tiny_model, one, given) as (prefill, decode):
        assert isinstance(prefill.worker, Worker)
        assert prefill.worker.address is not None
        address = prefill.worker.address
        answers = []
        for number, prompt in enumerate(prompts):
            source = RecordSource(address.host, address.port, address.engine, f"r{number}", 0)
            params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **SEEDED)
            decode.add(AddRequest(f"a{number}", prompt, params, source=source))
            decode.step()
            only = SamplingParams(max_tokens=1, ignore_eos=True)
            prefill.add(AddRequest(f"r{number}", prompt, only, hand_over=f"r{number}"))
            answers.append(run_beside(prefill, decode))
            assert decode.stats().prefix_hits == sum(len(p) - 1 for p in prompts[: number + 1])
        assert_all_moved([prefill, decode])
    assert answers == alone(tiny_model, prompts, **SEEDED)


def run_beside(prefill: Engine, decode: Engine) -> list[int]:
    """Both engines in turn until they have nothing to do. Returns what the second one says."""
    tokens, end = [], time.monotonic() + 60
    while decode.has_work():
        assert time.monotonic() < end
        if prefill.has_work():
            prefill.step()
        prefill.poll()
        tokens += [token for delta in decode.step() for token in delta.token_ids]
    return tokens


def test_seeded_tokens_with_other_numbers_of_drafts(tiny_model: Path) -> None:
    """No part of a record depends on how many drafts a step verifies."""
    seeded = {"temperature": 0.9, "seed": 3}
    with pair(tiny_model, options(1), options(3)) as engines:
        answers = [hand_over(engines, prompt, **seeded) for prompt in PROMPTS]
        assert_all_moved(engines)
    assert answers == alone(tiny_model, PROMPTS, **seeded)


def test_the_first_token_may_come_from_the_first_engine(tiny_model: Path) -> None:
    """A stream goes on behind tokens that the client has already."""
    with pair(tiny_model, options(2), options(2, block_size=16, async_scheduling=True)) as engines:
        answers = [hand_over(engines, prompt, resume=True) for prompt in PROMPTS]
    assert_same(tiny_model, PROMPTS, alone(tiny_model, PROMPTS), answers)


@pytest.mark.parametrize("k", [0, 2])
def test_a_stream_moves_with_what_it_has_so_far(tiny_model: Path, k: int) -> None:
    """Seeded: the other engine computes nothing but the last token, and goes on as the first."""
    seeded = {"temperature": 0.9, "seed": 3}
    whole = alone(tiny_model, PROMPTS[1:4], **seeded)
    with pair(tiny_model, options(k), options(k)) as engines:
        for prompt, answer, count in zip(PROMPTS[1:4], whole, (1, 5, 9), strict=True):
            source, after = compute(engines[0], prompt, answer[:count], **seeded)
            assert source.tokens == len(prompt) + count - 1
            assert after == [answer[count]]
            params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **seeded)
            request = AddRequest(
                f"rest-{count}", prompt, params, source=source, resume=answer[:count]
            )
            deltas = finish(engines, request)
            assert [t for delta in deltas for t in delta.token_ids] == answer[count:]
        assert_all_moved(engines)


def test_prompts_with_a_cached_prefix_move_only_what_is_new(tiny_model: Path) -> None:
    shared = PROMPTS[3]
    longer = [[*shared, *PROMPTS[n]] for n in (1, 2)]
    with pair(tiny_model, options(1), options(1)) as engines:
        hand_over(engines, shared)
        before = engines[1].stats().transfers.received_pages
        answers = [hand_over(engines, prompt) for prompt in longer]
        moved = engines[1].stats().transfers.received_pages - before
        whole = sum(-(-(len(prompt) - 1) // 16) for prompt in longer)
        assert moved <= whole - 2 * (len(shared) // 16 - 1)
        assert engines[0].stats().prefix_hits > 0
        assert_all_moved(engines, close=False)
        assert hand_over(engines, longer[0]) == answers[0]
        assert engines[1].stats().transfers.local == 1
    assert_same(tiny_model, longer, alone(tiny_model, longer), answers)


def test_engines_of_other_formats_are_refused_and_nothing_is_computed(tiny_model: Path) -> None:
    with pair(tiny_model, options(0), options(1)) as engines:
        source, _ = compute(engines[0], PROMPTS[2])
        request = AddRequest("a", PROMPTS[2], SamplingParams(max_tokens=4), source=source)
        [delta] = finish(engines, request)
        assert delta.transfer_failed
        assert "drafter: mtp" in (delta.error or "")
        assert engines[1].stats().prompt_tokens == 0


def test_roles_that_cannot_work_are_refused(tiny_model: Path) -> None:
    for given, text in (
        ({"enable_prefix_caching": False, "host_cache_gb": 0.0}, "leave prefix caching on"),
        ({"num_snapshots": 0}, "num_snapshots 0: use 2 or more"),
        ({"kv_transport": "cuda_ipc"}, "the device is a CPU; use shm"),
        ({"kv_lease": 0.0}, "kv_lease 0: use seconds above 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            build(tiny_model, **options(**given))
