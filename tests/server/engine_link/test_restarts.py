"""A server that is told to stop, and an engine that dies, sticks or falls silent."""

from __future__ import annotations

import concurrent.futures
import json
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from millrace.config import EngineArgs
from millrace.protocol import AddRequest, SamplingParams
from millrace.server.engine_link import client as engine_client
from millrace.server.engine_link.client import EngineClient, EngineDeadError
from millrace.server.telemetry.metrics import RequestMetrics
from tests.server.test_lifecycle import LONG, post, streaming
from tests.support.fake_engine import VARIABLE, Behaviour
from tests.support.live_server import LiveServer, fake_server, wait_for
from tests.support.running import run
from tests.support.serve_fake import PROGRAM
from tests.support.text_model import token_id

SHORT = {**LONG, "max_tokens": 2}


def health(server: LiveServer) -> httpx.Response:
    return httpx.get(f"{server.url}/health", timeout=20)


def prefixes(server: LiveServer) -> str:
    """The epoch of what it says it holds."""
    report = httpx.get(f"{server.url}/load?prefixes_since=0", timeout=20).json()["prefixes"]
    return str(report["epoch"])


def error_of(line: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(line.removeprefix("data: "))["error"]
    return error


# --- told to stop ------------------------------------------------------------------------------


def test_while_it_drains_it_says_so_and_takes_nothing_new(text_model: Path, tmp_path: Path) -> None:
    behaviour = Behaviour(step=0.02)
    with fake_server(text_model, tmp_path / "log", behaviour, shutdown_timeout=60) as server:
        with streaming(server, {**LONG, "max_tokens": 150}) as lines:
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: health(server).status_code == 503)
            assert health(server).json()["error"]["code"] == "shutting_down"
            refused = post(server, SHORT)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert server.metric("vllm:num_requests_running") == 1
            rest = [line for line in lines if line]
        assert '"finish_reason":"length"' in rest[-2]
        assert server.process.wait(10) == 0
        assert "1 requests are open and have 60 s to end" in server.log


def test_told_twice_it_ends_at_once(text_model: Path, tmp_path: Path) -> None:
    behaviour = Behaviour(step=0.05)
    with fake_server(text_model, tmp_path / "log", behaviour, shutdown_timeout=600) as server:
        with streaming(server) as lines:
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: health(server).status_code == 503)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert error_of(rest[-2])["code"] == "shutting_down"
        assert server.process.wait(15) == 0
        assert "Traceback" not in server.log


# --- engines that do not go on -----------------------------------------------------------------


def test_an_engine_that_dies_is_replaced(text_model: Path, tmp_path: Path) -> None:
    with fake_server(text_model, tmp_path / "log", Behaviour(step=0.05)) as server:
        with concurrent.futures.ThreadPoolExecutor(1) as pool, streaming(server) as lines:
            waiting = pool.submit(post, server)
            wait_for(lambda: server.open_in_engine() == 2)
            first, held = server.engine(), prefixes(server)
            first.kill()
            rest = [line for line in lines if line]
            assert error_of(rest[-2])["code"] == "engine_dead"
            assert rest[-1] == "data: [DONE]"
            answer = waiting.result()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"
        wait_for(lambda: server.open_in_engine() == 0)
        refused = post(server, SHORT)
        assert refused.status_code in (503, 200)  # 200 if the next one is there already
        wait_for(lambda: health(server).status_code == 200, 30)
        assert prefixes(server) != held
        assert post(server, SHORT).status_code == 200
        assert server.engine().pid != first.pid
        assert server.metric("millrace:engine_restarts_total") == 1
        assert server.metric("vllm:request_success_total") >= 3
        assert "Traceback" not in server.log


def test_too_many_deaths_in_a_row_end_the_server(text_model: Path, tmp_path: Path) -> None:
    behaviour = Behaviour(die_after=1)
    with fake_server(text_model, tmp_path / "log", behaviour, max_engine_restarts=1) as server:
        assert post(server, SHORT).status_code == 503
        wait_for(lambda: health(server).status_code == 200, 30)
        assert post(server, SHORT).status_code == 503
        assert server.process.wait(15) == 1


def test_a_stuck_step_is_ended_and_placed(text_model: Path, tmp_path: Path) -> None:
    behaviour = Behaviour(stuck=token_id(text_model, "two words"))
    with fake_server(text_model, tmp_path / "log", behaviour, step_timeout=1.0) as server:
        answer = post(server, {"prompt": "two words"})
        assert answer.status_code == 503
        message = answer.json()["error"]["message"]
        assert re.search(r"stuck in one step, at fake_engine\.py:\d+ in _take", message)
        assert re.search(
            r"the stacks of the engine when it was stuck:\nTimeout .*\nThread", server.log
        )
        wait_for(lambda: health(server).status_code == 200, 30)
        assert post(server, SHORT).status_code == 200


def test_a_silent_engine_is_killed(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "SILENCE_EXTRA", 0.5)
    mute = token_id(text_model, "two words")
    monkeypatch.setenv(VARIABLE, json.dumps({"mute": mute}))

    async def scenario() -> None:
        client = EngineClient(RequestMetrics())
        await client.start(EngineArgs(model=str(text_model), step_timeout=2.0), PROGRAM)
        try:
            await client.wait_ready()
            stream = client.open(AddRequest("a", [mute], SamplingParams()))
            with pytest.raises(EngineDeadError, match="silent for 4 s and was killed"):
                await stream.take()
            client.close(stream)
            assert client.open_requests == 0
        finally:
            await client.stop()

    run(scenario())


def test_an_engine_that_cannot_be_started_can_be_stopped(tmp_path: Path) -> None:
    """Whoever cleans up does not hide why it failed."""

    async def scenario() -> None:
        client = EngineClient(RequestMetrics())
        with pytest.raises(OSError):
            await client.start(EngineArgs(model="none"), [str(tmp_path / "no-such-program")])
        await client.stop()

    run(scenario())
