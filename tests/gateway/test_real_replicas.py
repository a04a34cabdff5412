"""Real engines behind the gateway: killed, told to go, read slowly: no token is lost or wrong.

The long variants are in benchmarks/gateway_kill.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from millrace.common.backoff import BackoffPolicy
from millrace.common.http_client import Reading, Target, encode_request, fetch
from millrace.fleet.supervisor import FleetOptions, Supervisor
from millrace.gateway.processes.options import GatewayOptions
from tests.support.gateways import FAST, streamed
from tests.support.running import eventually, run

TOKENS = 300


LocalReply = tuple[list[int], str, int]  # token ids, text, counted tokens


def question(index: int) -> tuple[str, bytes]:
    """(path, body) of one of four greedy streams."""
    body: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "return_token_ids": True}
    body["stream_options"] = {"include_usage": True}
    if index % 2:
        path, more = (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": f"n{index}"}]},
        )
    else:
        path, more = "/v1/completions", {"prompt": [index + 1, 2, 3]}
    return path, json.dumps({**body, **more}).encode()


async def answer(target: Target, index: int) -> LocalReply:
    """One of the four, whole."""
    path, data = question(index)
    response = await fetch(target, path, method="POST", body=data, timeout=60)
    assert response.status == 200, response.body
    return read(response.body)


async def read_slowly(target: Target, index: int, others: list[LocalReply]) -> LocalReply:
    """The same by a client that reads nothing until others have their answers, then in morsels."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.setblocking(False)
    loop, reading = asyncio.get_running_loop(), Reading()
    try:
        await loop.sock_connect(slow, (target.host, target.port))
        await loop.sock_sendall(slow, encode_request(target, "POST", *question(index)))
        assert [await answer(target, i) for i in range(4)] == others
        while not reading.whole:
            data = await asyncio.wait_for(loop.sock_recv(slow, 700), 30)
            assert data, "the stream broke off"
            reading.feed(0, data)
    finally:
        slow.close()
    return read(reading.got.body)


def read(body: bytes) -> LocalReply:
    """What a whole stream says."""
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    assert lines[-1] == b"[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    choices = [choice for event in events for choice in event["choices"]]
    ids = [token for choice in choices for token in choice["token_ids"]]
    text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)
    return ids, text, events[-1]["usage"]["completion_tokens"]


def test_replicas_that_go_under_load_lose_no_request_and_no_token(small_model: Path) -> None:
    """Two are killed; the third gets the notice of a spot node: SIGTERM, and little time."""
    command = [sys.executable, "-m", "millrace.cli", "serve", str(small_model)]
    command += ["--dtype", "float32", "--max-model-len", "512", "--device", "cpu"]
    command += ["--shutdown-timeout", "0.1"]
    options = FleetOptions(
        command=[*command, "--kv-cache-memory-bytes", str(64 << 20)],
        count=3,
        port=0,
        device="cpu",
        restarts=BackoffPolicy(0.1),
        gateway=GatewayOptions(health=FAST),
    )

    async def scenario() -> None:
        fleet = Supervisor(options, lambda line: None)
        await fleet.start()
        try:
            target = Target("127.0.0.1", fleet.gateway.port)
            truth = [await answer(target, index) for index in range(4)]
            assert all(len(ids) == count == TOKENS for ids, _, count in truth)
            assert await read_slowly(target, 0, truth) == truth[0]
            for victim, number in enumerate((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)):
                await _end_in_mid_stream(fleet, target, truth, victim, number)
            events = fleet.gateway.counters.events()
            assert events["resumed"] >= 3
            assert events["cut_off"] == 0
        finally:
            await fleet.stop()

    run(scenario(), timeout=240)


async def _end_in_mid_stream(
    fleet: Supervisor,
    target: Target,
    truth: list[LocalReply],
    victim: int,
    number: signal.Signals,
) -> None:
    """Twelve streams run, four of them on the victim; all answers are those from before."""
    running = [asyncio.create_task(answer(target, index % 4)) for index in range(12)]
    await eventually(lambda: streamed(fleet.gateway, victim) > 10, 30)
    before = fleet.gateway.counters.events()["resumed"]
    os.kill(fleet.pids[victim], number)
    for index, got in enumerate(await asyncio.gather(*running)):
        assert got == truth[index % 4]
    assert fleet.gateway.counters.events()["resumed"] > before
