"""Options of vLLM's server that change what answers hold and where it listens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server

CHAT: Any = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}
TEXT: Any = {"prompt": "hello there", "max_tokens": 4}


@pytest.fixture(scope="module")
def server(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    log = tmp_path_factory.mktemp("options") / "log"
    with fake_server(
        text_model,
        log,
        Behaviour(),
        root_path="/llm",
        enable_force_include_usage=True,
        enable_per_request_metrics=True,
        return_tokens_as_token_ids=True,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as one:
        yield one


def chunks(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_paths_work_with_and_without_the_root_path(http: httpx.Client) -> None:
    for path in ("/health", "/llm/health", "/llm/v1/models"):
        assert http.get(path).status_code == 200
    assert http.post("/llm/v1/completions", json=TEXT).status_code == 200
    assert http.get("/llmx/health").status_code == 404


@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", TEXT)])
def test_every_stream_ends_with_the_usage_and_the_times(
    http: httpx.Client, path: str, body: Any
) -> None:
    *others, last = chunks(http.post(f"/v1/{path}", json={**body, "stream": True}))
    assert last["usage"]["completion_tokens"] == 4
    assert last["choices"] == []
    assert set(last["metrics"]) == {
        "time_to_first_token_ms",
        "generation_time_ms",
        "queue_time_ms",
        "mean_itl_ms",
        "tokens_per_second",
    }
    assert not any("metrics" in one for one in others)
    assert all(one["usage"]["completion_tokens"] > 0 for one in others)
    whole = http.post(f"/v1/{path}", json=body).json()
    assert whole["metrics"]["generation_time_ms"] >= 0
    assert "mean_itl_ms" not in http.post(f"/v1/{path}", json={**body, "max_tokens": 1}).text
    assert "metrics" not in http.post(f"/v1/{path}", json={**body, "n": 2}).json()


def test_tokens_are_written_as_ids_unless_the_request_says_no(http: httpx.Client) -> None:
    def first(**more: Any) -> str:
        answer = http.post("/v1/completions", json={**TEXT, "logprobs": 0, **more}).json()
        found: str = answer["choices"][0]["logprobs"]["tokens"][0]
        return found

    assert first().startswith("token_id:")
    assert not first(return_tokens_as_token_ids=False).startswith("token_id:")


@pytest.mark.parametrize(
    ("wanted", "report"),
    [
        ("TEXT", "TEXT named_metrics.kv_cache_usage_perc="),
        ("json", 'JSON {"named_metrics":{"kv_cache_usage_perc":'),
        ("protobuf", None),
    ],
)
def test_the_load_is_reported_to_who_asks(
    http: httpx.Client, wanted: str, report: str | None
) -> None:
    headers = {"endpoint-load-metrics-format": wanted}
    for answer in (
        http.post("/v1/completions", json=TEXT, headers=headers),
        http.post("/v1/completions", json={**TEXT, "stream": True}, headers=headers),
    ):
        found = answer.headers.get("endpoint-load-metrics")
        assert (found is None) if report is None else (found or "").startswith(report)
    assert "endpoint-load-metrics" not in http.post("/v1/completions", json=TEXT).headers


def test_a_unix_socket_serves(text_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with fake_server(text_model, tmp_path / "log", uds=str(path)) as server:
        assert f"--unix-socket {path}" in server.log
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=20) as http:
            assert http.get("/health").status_code == 200
            assert http.post("/v1/completions", json=TEXT).status_code == 200
    assert path.stat().st_mode & 0o777 == 0o600
