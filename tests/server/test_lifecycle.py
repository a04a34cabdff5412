"""Clients that leave, queues that fill, engines that die: what is open ends, and nothing stays."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from millrace.common.sockets import free_port
from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server, wait_for

LONG = {"prompt": "hello", "max_tokens": 500, "ignore_eos": True}
SLOW = Behaviour(step=0.05)


@pytest.fixture
def slow(text_model: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """A server whose engine takes 25 s for `LONG`, that waits for nothing and restarts nothing."""
    options = {"shutdown_timeout": 1, "max_engine_restarts": 0}
    with fake_server(text_model, tmp_path / "log", SLOW, **options) as server:
        yield server


@contextlib.contextmanager
def streaming(server: LiveServer, body: dict[str, Any] = LONG) -> Iterator[Iterator[str]]:
    """An open stream of which the first line has come."""
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=20) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


@contextlib.contextmanager
def sent(server: LiveServer, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection on which a request was sent, and whose answer nobody has read."""
    data = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data) + data
        )
        yield connection


def post(server: LiveServer, body: dict[str, Any] = LONG) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)


# --- clients that leave ------------------------------------------------------------------------


def test_leaving_a_stream_aborts_the_request(slow: LiveServer) -> None:
    with streaming(slow):
        assert slow.open_in_engine() == 1
    wait_for(lambda: slow.open_in_engine() == 0)
    assert slow.metric("millrace:requests_finished_total") == 1
    assert "abort" in httpx.get(f"{slow.url}/metrics").text
    assert "Traceback" not in slow.log


def test_a_stop_text_frees_the_engine_long_before_the_last_token(slow: LiveServer) -> None:
    body = {**LONG, "prompt": "hello stop world", "stop": ["stop w"]}
    answer = httpx.post(f"{slow.url}/v1/completions", json=body, timeout=20)
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    wait_for(lambda: slow.open_in_engine() == 0)


def test_leaving_before_the_answer_aborts_every_prompt(slow: LiveServer) -> None:
    with sent(slow, {**LONG, "prompt": ["hello", "world", "END"]}):
        wait_for(lambda: slow.open_in_engine() == 3)
    wait_for(lambda: slow.open_in_engine() == 0)
    assert "Traceback" not in slow.log


def test_a_client_that_does_not_read_costs_the_others_nothing(
    text_model: Path, tmp_path: Path
) -> None:
    behaviour = Behaviour(step=0.0005, tokens=50)
    with fake_server(text_model, tmp_path / "log", behaviour, max_model_len=200_000) as server:
        body = {**LONG, "max_tokens": 150_000, "stream": True, "return_token_ids": True}
        with sent(server, body) as connection:
            wait_for(lambda: server.metric("millrace:generation_tokens_total") >= 150_000, 20)
            assert post(server, {"prompt": "hello", "max_tokens": 3}).status_code == 200
            received = b""
            while b"[DONE]" not in received[-200:]:
                received += connection.recv(1 << 20)
        ids = [
            i
            for line in received.split(b"\n")
            if line.startswith(b"data: {")
            for i in json.loads(line[6:])["choices"][0]["token_ids"]
        ]
        assert len(ids) == 150_000


# --- queues that fill --------------------------------------------------------------------------


def test_a_full_queue_answers_429(text_model: Path, tmp_path: Path) -> None:
    options = {"max_num_seqs": 2, "max_queue": 3}
    with fake_server(text_model, tmp_path / "log", SLOW, **options) as server:
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(sent(server, LONG))
            wait_for(lambda: server.open_in_engine() == 5)
            assert server.metric("vllm:num_requests_running") == 2
            answer = post(server)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert "5 requests are open" in answer.json()["error"]["message"]
            assert server.metric("millrace:requests_rejected_total") == 1
        wait_for(lambda: server.open_in_engine() == 0)
        assert post(server, {**LONG, "max_tokens": 1}).status_code == 200


# --- engines that die --------------------------------------------------------------------------


def test_an_engine_that_is_killed_ends_everything_cleanly(slow: LiveServer) -> None:
    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        streaming(slow) as lines,
    ):
        waiting = pool.submit(post, slow)
        wait_for(lambda: slow.open_in_engine() == 2)
        began = time.monotonic()
        slow.engine().kill()
        rest = [line for line in lines if line]
        assert time.monotonic() - began < 10
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert error["code"] == "engine_dead"
        assert "signal 9" in error["message"]
        assert rest[-1] == "data: [DONE]"
        answer = waiting.result()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"
    assert slow.process.wait(20) == 1
    assert "Traceback" not in slow.log


def test_an_engine_that_dies_by_itself(text_model: Path, tmp_path: Path) -> None:
    behaviour = Behaviour(die_after=2)
    with fake_server(text_model, tmp_path / "log", behaviour, max_engine_restarts=0) as server:
        assert post(server).status_code == 200
        answer = post(server)
        assert answer.status_code == 503
        assert "status 17" in answer.json()["error"]["message"]
        assert server.process.wait(20) == 1


@pytest.mark.parametrize(("user_error", "status"), [(True, 2), (False, 1)])
def test_an_engine_that_cannot_load(
    text_model: Path, tmp_path: Path, user_error: bool, status: int
) -> None:
    behaviour = Behaviour(fail="too little memory; 3 pages would fit", user_error=user_error)
    with fake_server(text_model, tmp_path / "log", behaviour, ready=False) as server:
        assert server.process.wait(10) == status
        loading, line = server.log.splitlines()
        assert "/health says 503 until it is ready" in loading
        assert "too little memory; 3 pages would fit" in line


def test_while_the_engine_loads_nothing_is_served(text_model: Path, tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    behaviour = Behaviour(load=1.5)
    with fake_server(text_model, tmp_path / "log", behaviour, ready=False, port=port) as server:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(url))
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503
        assert health.json()["error"]["code"] == "engine_loading"
        assert health.headers["retry-after"]
        assert httpx.post(f"{url}/v1/completions", json=LONG).status_code == 503
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] is None
        server.wait_ready()
        assert httpx.get(f"{url}/health").status_code == 200


# --- servers that stop -------------------------------------------------------------------------


def test_open_requests_may_end_after_sigterm(text_model: Path, tmp_path: Path) -> None:
    with fake_server(text_model, tmp_path / "log", Behaviour(step=0.02)) as server:
        with streaming(server, {**LONG, "max_tokens": 50}) as lines:
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"finish_reason":"length"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(20) == 0


def test_requests_that_take_too_long_are_told(slow: LiveServer) -> None:
    with streaming(slow) as lines:
        engine = slow.engine()
        began = time.monotonic()
        slow.process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert slow.process.wait(20) == 0
    assert time.monotonic() - began < 15
    assert not engine.is_running()
    assert "Traceback" not in slow.log


def test_an_engine_that_will_not_end_is_killed(text_model: Path, tmp_path: Path) -> None:
    module, deaf = "millrace.server.engine_link.process", Behaviour(deaf=True)
    constants = {f"{module}:ASKED_SECONDS": 0.5, f"{module}:TERMINATED_SECONDS": 0.5}
    with fake_server(text_model, tmp_path / "log", deaf, constants=constants) as server:
        engine = server.engine()
        server.process.terminate()
        server.process.wait(20)
        assert not engine.is_running()


def test_the_engine_ends_with_a_front_that_is_killed(text_model: Path, tmp_path: Path) -> None:
    with fake_server(text_model, tmp_path / "log") as server:
        engine = server.engine()
        server.process.kill()
        psutil.wait_procs([engine], timeout=5)
        assert not engine.is_running()


def test_nothing_is_left_in_the_temporary_directory(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Path("/tmp") / f"m{os.getpid()}"
    short.mkdir()
    monkeypatch.setenv("TMPDIR", str(short))
    try:
        with fake_server(text_model, tmp_path / "log") as server:
            assert len(list(short.iterdir())) == 1
            server.process.terminate()
            assert server.process.wait(20) == 0
        assert list(short.iterdir()) == []
    finally:
        short.rmdir()


def test_a_port_in_use_is_refused_at_once(text_model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with fake_server(text_model, tmp_path / "log", ready=False, port=port) as server:
            assert server.process.wait(10) == 2
            assert f"cannot listen on 127.0.0.1 port {port}" in server.log
            assert len(server.log.splitlines()) == 1


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        httpx.get(f"{url}/version")
        return True
    return False
