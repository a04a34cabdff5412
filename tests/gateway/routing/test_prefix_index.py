"""Prefixes that replicas report: learnt without having been relayed here, and forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

from millrace.common.http_client import Target, fetch, parse_url
from millrace.common.prefix_hash import PrefixReport, hash_chain
from millrace.gateway.app import Gateway
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.health.health_monitor import HealthPolicy
from millrace.gateway.routing.prefix_index import PrefixTable, ReportedPrefixes
from tests.support.gateways import gateway
from tests.support.live_server import fake_server
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

POLLING = HealthPolicy(health_check_interval=60, load_interval=0.01, slow_start=0.0)
PROMPT = [1, 2] * 400
CHAIN = hash_chain(json.dumps(PROMPT).encode())


async def complete(target: Target, prompt: list[int]) -> str:
    """Which replica of the gateway answered, by name."""
    body = json.dumps({"prompt": prompt, "max_tokens": 2, "stream": True}).encode()
    answer = await fetch(target, "/v1/completions", method="POST", body=body, timeout=30)
    assert answer.status == 200, answer.body
    return answer.headers.get("x-replica", "")


def prefixes_since(question: str) -> str | None:
    """From where on a question to /load asks for prefixes; None: for none."""
    path, _, query = question.partition("?")
    assert path == "/load"
    return dict(parse_qsl(query)).get("prefixes_since")


def known(made: Gateway, chain: list[int] = CHAIN) -> tuple[int, list[int]]:
    return PrefixTable(made.counters.prefixes).longest_match([0, 1], chain)


def load(epoch: str, number: int, hashes: list[int]) -> dict[str, Any]:
    prefixes = {"epoch": epoch, "since": f"{epoch}.{number}", "hashes": hashes}
    return {"requests": 0, "tokens": 0, "prefixes": prefixes}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_prompt_that_a_replica_got_another_way_finds_its_way_there(processes: int) -> None:
    async def scenario() -> None:
        some = [
            await MockReplica(kind="millrace", name="a", load=load("a", 0, [])).start(),
            await MockReplica(kind="millrace", name="b", load=load("b", 1, CHAIN)).start(),
        ]
        options = {"policy": "prefix_aware", "health": POLLING, "processes": processes}
        async with gateway(*(r.url for r in some), **options) as (made, target):
            await eventually(lambda: known(made) == (len(CHAIN), [1]))
            assert {await complete(target, [*PROMPT, n]) for n in range(4)} == {"b"}
            await eventually(lambda: prefixes_since(some[1].load_questions[-1]) == "b.1")
            assert prefixes_since(some[1].load_questions[0]) == "0"
        for replica in some:
            await replica.stop()

    run(scenario())


def test_a_server_reports_prefixes_of_direct_requests(text_model: Path, tmp_path: Path) -> None:
    with (
        fake_server(text_model, tmp_path / "a") as a,
        fake_server(text_model, tmp_path / "b") as b,
    ):

        async def scenario() -> None:
            await complete(parse_url(b.url), PROMPT)
            options: dict[str, Any] = {"policy": "prefix_aware", "health": POLLING}
            async with gateway(a.url, b.url, **options) as (made, target):
                await eventually(lambda: known(made) == (len(CHAIN), [1]))
                for number in range(3):
                    await complete(target, [*PROMPT, number])
            text = "vllm:request_success_total"
            assert (a.metric(text), b.metric(text)) == (1, 5)  # each a probe

        run(scenario())


def test_a_replica_that_has_restarted_is_forgotten() -> None:
    async def scenario() -> None:
        replica = await MockReplica(kind="millrace", load=load("a", 7, CHAIN)).start()
        options: dict[str, Any] = {"policy": "prefix_aware", "health": POLLING}
        async with gateway(replica.url, **options) as (made, _):
            await eventually(lambda: known(made) == (len(CHAIN), [0]))
            replica.load = load("b", 1, CHAIN[:1])  # between two health checks
            await eventually(lambda: known(made) == (1, [0]))
        await replica.stop()

    run(scenario())


def test_a_replica_that_comes_back_reports_all_prefixes_again() -> None:
    counters = SharedCounters(1)
    reported, table = ReportedPrefixes(counters, 3), PrefixTable(counters.prefixes)
    reported.apply(PrefixReport("a", "a.1", CHAIN), "0")
    reported.forget()
    assert (table.longest_match([3], CHAIN), reported.cursor) == ((0, []), "0")
    reported.apply(PrefixReport("a", "a.2", []), "a.1")  # it was under way
    assert reported.cursor == "0"
    reported.apply(PrefixReport("a", "a.2", CHAIN), "0")
    assert (table.longest_match([3], CHAIN), reported.cursor) == ((len(CHAIN), [3]), "a.2")


@pytest.mark.parametrize(
    ("policy", "kind"), [("least_loaded", "millrace"), ("prefix_aware", "other")]
)
def test_prefixes_are_read_only_where_they_are_used(policy: str, kind: str) -> None:
    async def scenario() -> None:
        replica = await MockReplica(kind=kind, load={"requests": 1, "tokens": 5}).start()
        async with gateway(replica.url, policy=policy, health=POLLING):
            await eventually(lambda: len(replica.load_questions) > 2)
            assert {prefixes_since(question) for question in replica.load_questions} == {None}
        await replica.stop()

    run(scenario())


@pytest.mark.parametrize(
    "wrong", [{"hashes": [-1]}, {"hashes": [2**70]}, {"since": "a b"}, {"epoch": 3}]
)
def test_a_report_of_rubbish_teaches_nothing_and_ends_nothing(wrong: dict[str, Any]) -> None:
    async def scenario() -> None:
        replica = await MockReplica(kind="millrace", load=load("a", 1, CHAIN)).start()
        assert replica.load is not None
        replica.load["prefixes"] |= wrong
        options: dict[str, Any] = {"policy": "prefix_aware", "health": POLLING}
        async with gateway(replica.url, **options) as (made, _):
            await eventually(lambda: len(replica.load_questions) > 2)
            assert known(made) == (0, [])
            replica.load = load("a", 1, CHAIN)
            await eventually(lambda: known(made) == (len(CHAIN), [0]))
        await replica.stop()

    run(scenario())
