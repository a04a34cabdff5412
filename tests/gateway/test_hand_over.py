"""Real servers for prompts and for answers behind one gateway: the tokens of one server alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.common.http_client import Target, fetch, parse_url
from millrace.gateway.app import Gateway
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.health.health_monitor import ReplicaSpec
from tests.support.gateways import gateway
from tests.support.live_server import LiveServer, started, wait_for
from tests.support.running import eventually, run

TOKENS = 24
LEASE = 3.0
LIMITS = GatewayLimits(hand_over_prompt=32, hand_over_ratio=1.0)
_rng = random.Random(4)
PROMPTS = [[_rng.randrange(3, 300) for _ in range(_rng.randrange(60, 200))] for _ in range(8)]


def server(model: Path, log: Path, role: str, device: str, transport: str, ranks: int = 1) -> Any:
    command = [sys.executable, "-m", "millrace.cli", "serve", str(model), "--port", "0"]
    command += ["--role", role, "--kv-transport", transport, "--kv-lease", str(LEASE)]
    command += ["--dtype", "float32", "--max-model-len", "512", "--device", device]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--host-cache-gb", "0.1"]
    command += ["--max-engine-restarts", "1000", "--snapshot-distance", "0"]
    command += ["--num-snapshots", "16", "--served-model-name", "m"]
    command += ["--tensor-parallel-size", str(ranks)]
    command += ["--debug"] if device == "cpu" else []
    return started(command, log)


@contextlib.contextmanager
def servers(
    model: Path, folder: Path, *options: Any, both: bool = False, device: str = "cpu"
) -> Iterator[tuple[LiveServer, LiveServer]]:
    """(one for prompts, one for answers). options: transport and ranks."""
    with contextlib.ExitStack() as stack:
        made = []
        for side in ("prefill", "decode"):
            role, log = "both" if both else side, folder / f"{side}.log"
            made.append(stack.enter_context(server(model, log, role, device, *options)))
        for one in made:
            one.wait_ready(120)
        yield made[0], made[1]


@contextlib.asynccontextmanager
async def in_front(all_servers: list[LiveServer]) -> AsyncIterator[tuple[Gateway, Target]]:
    specs = [ReplicaSpec(target=parse_url(one.url)) for one in all_servers]
    async with gateway(replicas=specs, limits=LIMITS, policy="prefix_aware") as (made, target):
        await eventually(lambda: len(made.replicas.available()) == len(specs), 60)
        yield made, target


async def answer(target: Target, number: int, count: int = TOKENS) -> list[int]:
    """The tokens of a prompt; every other one is seeded, the rest are greedy."""
    sampling: dict[str, Any] = {"temperature": 0.8, "seed": 7} if number % 2 else {"temperature": 0}
    body = {
        "model": "m", "prompt": PROMPTS[number], "max_tokens": count, "ignore_eos": True,
        "stream": True, "return_token_ids": True, **sampling,
    }  # fmt: skip
    data = json.dumps(body).encode()
    response = await fetch(target, "/v1/completions", method="POST", body=data, timeout=120)
    assert response.status == 200, response.body
    events = response.body.split(b"\n\n")
    assert events[-2] == b"data: [DONE]", "the stream broke off"
    choices = [json.loads(event[6:])["choices"][0] for event in events[:-2]]
    return [token for choice in choices for token in choice["token_ids"]]


def figures(of: list[LiveServer], name: str) -> float:
    return sum(one.metric(f"millrace:kv_transfer_{name}_total") for one in of)


def all_pages_free(of: LiveServer) -> bool:
    free = of.metric("millrace:kv_pages_free") + of.metric("millrace:kv_pages_evictable")
    return free == of.metric("millrace:kv_pages_capacity")


def assert_nothing_left(of: list[LiveServer]) -> None:
    """Once the leases have ended, nothing is offered and every page is free or evictable."""
    for one in of:
        wait_for(lambda one=one: one.metric("millrace:kv_transfer_open") == 0, LEASE + 60)
        wait_for(lambda one=one: all_pages_free(one), 10)
        wait_for(lambda one=one: one.open_in_engine() == 0, 10)


@pytest.mark.parametrize(
    ("transport", "ranks"),
    [
        ("tcp", 1),
        *(pytest.param(*one, marks=pytest.mark.sweep) for one in (("nixl", 1), ("shm", 2))),
    ],
)
def test_a_pair_behind_a_gateway_says_what_one_server_says(
    small_model: Path, tmp_path: Path, transport: str, ranks: int
) -> None:
    async def scenario(prefill: LiveServer, decode: LiveServer) -> None:
        truth = [await answer(parse_url(prefill.url), number) for number in range(8)]
        assert all(len(tokens) == TOKENS for tokens in truth)
        async with in_front([prefill, decode]) as (made, target):
            assert [await answer(target, number) for number in range(8)] == truth
            events = made.counters.events()
            # By when the gateway has heard what is cached, a prefix moves, or a prompt.
            assert events["handed_over"] + events["prefix_moved"] == 8
            assert events["hand_over_failed"] == 0
        # The record of a prompt ends before its last token; what is cached here is longer.
        await eventually(lambda: figures([prefill], "sent") == figures([decode], "received") == 8)
        for unit in ("bytes", "pages"):
            assert figures([prefill], f"sent_{unit}") == figures([decode], f"received_{unit}") > 0

    with servers(small_model, tmp_path, transport, ranks) as (prefill, decode):
        run(scenario(prefill, decode), timeout=240)
        assert_nothing_left([prefill, decode])


@pytest.mark.sweep
def test_streams_of_a_drained_server_go_on_at_another(small_model: Path, tmp_path: Path) -> None:
    """By their records, all of a sudden, to the tokens of one server alone."""
    count = 200

    async def scenario(one: LiveServer, other: LiveServer) -> None:
        truth = [await answer(parse_url(one.url), n, count) for n in range(4)]
        await fetch(parse_url(one.url), "/reset_prefix_cache", method="POST")
        async with in_front([one, other]) as (made, target):
            asked = [asyncio.create_task(answer(target, n, count)) for n in range(4)]
            first = made.replicas.all[0]
            await eventually(
                lambda: first.exchanges and all(e.account.chunks > 20 for e in first.exchanges), 60
            )
            running = len(first.exchanges)
            made.monitor.drain(first.member.id, then_remove=False)
            assert [await task for task in asked] == truth
            events = made.counters.events()
            assert events["stream_moved"] == running > 0
            assert events["hand_over_failed"] == events["cut_off"] == 0
        await eventually(lambda: figures([one], "sent") == running)
        assert figures([one], "sent_bytes") == figures([other], "received_bytes")

    with servers(small_model, tmp_path, "tcp", both=True) as (one, other):
        run(scenario(one, other), timeout=240)
        assert_nothing_left([one, other])


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["cuda_ipc", "shm"])
def test_two_processes_on_one_gpu(small_model: Path, tmp_path: Path, transport: str) -> None:
    """With CUDA IPC no byte of a record leaves the GPU."""

    async def scenario(prefill: LiveServer, decode: LiveServer) -> None:
        truth = [await answer(parse_url(prefill.url), number) for number in range(4)]
        async with in_front([prefill, decode]) as (made, target):
            assert [await answer(target, number) for number in range(4)] == truth
            events = made.counters.events()
            assert events["handed_over"] + events["prefix_moved"] == 4
        await eventually(lambda: figures([prefill], "sent") == figures([decode], "received") == 4)
        assert figures([prefill], "sent_bytes") == figures([decode], "received_bytes") > 0

    with servers(small_model, tmp_path, transport, device="cuda") as (prefill, decode):
        run(scenario(prefill, decode), timeout=240)
        assert_nothing_left([prefill, decode])
