"""Requests that once killed or froze a server: each costs its sender an error, and no one else."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.sandbox.test_pool import chain, deep_schema
from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server
from tests.support.text_model import TOOLS, token_id, write_text_model

BODY_BYTES = 40 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """With bodies as large as a server takes them, and a model that calls tools."""
    directory = tmp_path_factory.mktemp("hostile")
    model = write_text_model(directory / "model", TOOLS)
    behaviour = Behaviour(step=0.005, eos=token_id(model, "<|im_end|>"))
    with fake_server(
        model, directory / "log", behaviour, max_model_len=4096, max_body_bytes=BODY_BYTES
    ) as running:
        yield running


def post(server: LiveServer, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}


def with_tool(schema: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": schema}
    tools = [{"type": "function", "function": function}]
    return {**CHAT, "tools": tools, "tool_choice": "required"}


def with_schema(schema: Any) -> dict[str, Any]:
    json_schema = {"name": "n", "schema": schema}
    return {**CHAT, "response_format": {"type": "json_schema", "json_schema": json_schema}}


def references(count: int) -> dict[str, Any]:
    names = {f"a{at}": {"$ref": f"#/$defs/a{at + 1}"} for at in range(count)}
    return {"$defs": {**names, f"a{count}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({**CHAT, "structured_outputs": {"grammar": chain(4000)}}, "at most 1000 work"),
        (with_schema(references(4000)), "at most 1000 work"),
        (with_schema(nested(300)), "at most 100 levels work"),
        (with_schema(deep_schema().wanted.json), "limits of time, memory and stack"),
        (with_tool(references(4000)), "at most 1000 work"),
        (with_tool(deep_schema().wanted.json), "tools: the grammar cannot be compiled"),
    ],
)
def test_a_grammar_that_overflows_a_stack_costs_its_own_request(
    server: LiveServer, body: dict[str, Any], message: str
) -> None:
    pid, engine = server.process.pid, server.engine().pid
    response = post(server, "/v1/chat/completions", body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    good = {**CHAT, "structured_outputs": {"regex": f"[0-9]+{len(message)}"}}
    assert post(server, "/v1/chat/completions", good).status_code == 200
    assert (server.process.poll(), server.process.pid, server.engine().pid) == (None, pid, engine)


def test_types_that_refer_to_each_other_are_read_once(server: LiveServer) -> None:
    """Each definition names all of them: read by recursion, that would be 12 ** 16 parts."""
    all_of_them = [{"$ref": f"#/$defs/d{at}"} for at in range(12)]
    definitions = {f"d{at}": {"anyOf": all_of_them} for at in range(12)}
    definitions["d11"] = {"type": "string"}  # type: ignore[dict-item]
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/d0"}},
        "$defs": definitions,
    }
    started = time.monotonic()
    response = post(server, "/v1/chat/completions", {**with_tool(schema), "tool_choice": "auto"})
    assert response.status_code == 200
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "a" * 30_000_000}, "prompt"),
        ("/tokenize", {"prompt": " " * 30_000_000}, "prompt"),
        ("/v1/completions", {"prompt": "a" * 30_000_000}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 4096}, "prompt"),
        ("/v1/completions", {"prompt": "a", "stop": "b" * 30_000_000}, "stop"),
        ("/v1/completions", {"prompt": "a", "bad_words": ["b" * 1_000_000]}, "bad_words"),
        ("/detokenize", {"tokens": [5] * 500_000}, "tokens"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a" * 30_000_000}]},
            "messages",
        ),
        ("/v1/chat/completions", {"messages": [CHAT["messages"][0]] * 5000}, "messages"),  # type: ignore[index]
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_encoded(
    server: LiveServer, path: str, body: dict[str, Any], param: str
) -> None:
    started = time.monotonic()
    response = post(server, path, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
    assert time.monotonic() - started < 10


def test_a_body_of_too_many_parts_is_refused(server: LiveServer) -> None:
    for body in (
        b'{"tokens": [%b]}' % b",".join([b"5"] * 3_000_000),
        b'{"tokens": [], "x": [%b]}' % b",".join([b"{}"] * 1_000_000),
    ):
        response = httpx.post(f"{server.url}/detokenize", content=body, timeout=60)
        assert response.status_code == 400
        assert "too many parts" in response.json()["error"]["message"]


ATTACK = """
import pathlib, sys, httpx
bodies = [path.read_text().split("\\n", 1) for path in pathlib.Path(sys.argv[2]).iterdir()]
with httpx.Client(base_url=sys.argv[1], timeout=120) as client:
    while True:
        for path, body in bodies:
            client.post(path, content=body, headers={"Content-Type": "application/json"})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["the quick brown fox " * 100] * 1000, "max_tokens": 1}),
        ("/v1/chat/completions", with_schema(deep_schema().wanted.json)),
    ],
    ids=["prompts", "schema"],
)
def test_others_are_answered_while_a_hostile_text_is_worked_on(
    server: LiveServer, path: str, body: Any
) -> None:
    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=server.url, timeout=60) as honest,
    ):
        hostile = pool.submit(post, server, path, body)
        answered = 0
        while not hostile.done():
            assert honest.get("/health").status_code == 200
            answered += 1
        assert hostile.result().status_code in (200, 400)
    assert answered > 5  # two, if it is worked on where they are answered


@pytest.mark.sweep  # what is beside it on the machine shows
def test_other_streams_go_on_while_hostile_texts_arrive(server: LiveServer, tmp_path: Path) -> None:
    """99 of 100 gaps between the chunks of an honest stream stay under 100 ms."""
    words = "the quick brown fox "
    hostile = [
        ("/tokenize", {"prompt": words * 6000}),  # about as long as fits
        ("/tokenize", {"prompt": "a" * 30_000_000}),
        ("/v1/completions", {"prompt": [words * 100] * 1000, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a", "bad_words": ["b" * 128] * 256, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a", "stop": "b" * 30_000_000}),
        ("/detokenize", {"tokens": [5] * 900_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "b " * 60_000}]}),
        ("/v1/chat/completions", with_schema(deep_schema().wanted.json)),
        ("/v1/chat/completions", {**CHAT, "structured_outputs": {"grammar": chain(900)}}),
    ]
    for at, (path, body) in enumerate(hostile):
        (tmp_path / f"{at}").write_text(f"{path}\n{json.dumps(body)}", encoding="utf-8")
    command = [sys.executable, "-c", ATTACK, server.url, str(tmp_path)]
    attackers = [subprocess.Popen(command) for _ in range(2)]
    try:
        gaps = _gaps(server, seconds=20)
        assert [one.poll() for one in attackers] == [None, None], "the attack ended early"
    finally:
        for one in attackers:
            one.kill()
            one.wait()
    gaps.sort()
    p99 = gaps[int(len(gaps) * 0.99)]
    print(f"{len(gaps)} gaps, p50 {gaps[len(gaps) // 2]:.4f} s, p99 {p99:.4f} s, {gaps[-1]:.3f} s")
    assert p99 < 0.1


def _gaps(server: LiveServer, seconds: float) -> list[float]:
    """Seconds between the chunks of streams that follow each other."""
    gaps: list[float] = []
    end = time.monotonic() + seconds
    body = {"prompt": "hello world", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    while time.monotonic() < end:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            last = None
            for line in answer.iter_lines():
                if not line:
                    continue
                now = time.monotonic()
                if last is not None:
                    gaps.append(now - last)
                last = now
                if now > end:
                    break
    return gaps
