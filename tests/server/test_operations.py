"""Keys, ids, log lines, limits, intervals, CORS, HTTPS and traces, as one who runs a server meets
them."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server, wait_for
from tests.support.observed.collector import collector

SECRET, OTHER = "sk-first", "sk-second"
ONE = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def guarded(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Two keys, one origin, small limits on heads, chunks of four tokens."""
    options = {
        "api_key": [SECRET, OTHER],
        "allowed_origins": ["https://page.example"],
        "read_timeout": 0.5,
        "max_header_bytes": 4096,
        "stream_interval": 4,
    }
    log = tmp_path_factory.mktemp("guarded") / "log"
    with fake_server(text_model, log, Behaviour(), **options) as server:
        yield server


def ask(server: LiveServer, key: str | None = SECRET, **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(
        f"{server.url}/v1/completions", json=ONE, headers={**headers, **more}, timeout=20
    )


# --- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "sk-wrong", SECRET[:-1], SECRET + "x", "ключ"])
def test_without_a_key_there_is_no_answer(guarded: LiveServer, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    for method, path in [("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/nothing")]:
        answer = httpx.request(method, guarded.url + path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize("key", [SECRET, OTHER])
def test_each_key_opens(guarded: LiveServer, key: str) -> None:
    assert ask(guarded, key).status_code == 200
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0)
    assert client.models.list().data[0].id == "fake"
    headers = {"x-api-key": key}  # Anthropic's way
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200


def test_what_only_tells_how_the_server_fares_needs_no_key(guarded: LiveServer) -> None:
    for path in ("/health", "/ping", "/metrics", "/version", "/openapi.json"):
        assert httpx.get(guarded.url + path).status_code == 200


def test_clients_know_a_refused_key_by_its_status(guarded: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="no", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="incorrect API key"):
        client.models.list()


def test_anthropics_client_is_refused_in_its_own_words(guarded: LiveServer) -> None:
    client = anthropic.Anthropic(base_url=guarded.url, api_key="no", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError, match="incorrect API key") as refused:
        client.messages.create(
            model="fake", max_tokens=1, messages=[{"role": "user", "content": "x"}]
        )
    body: Any = refused.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("variable", ["MILLRACE_API_KEY", "VLLM_API_KEY"])
def test_a_key_may_stand_in_the_environment(
    text_model: Path, tmp_path: Path, variable: str
) -> None:
    with fake_server(text_model, tmp_path / "log", environment={variable: SECRET}) as server:
        assert ask(server, None).status_code == 401
        assert ask(server).status_code == 200
        assert SECRET not in server.log


# --- ids and the log ---------------------------------------------------------------------------


def test_a_request_has_one_line_in_the_log(guarded: LiveServer) -> None:
    assert ask(guarded, **{"X-Request-Id": "line-1"}).status_code == 200
    wait_for(lambda: "id=line-1" in guarded.log)
    (line,) = [line for line in guarded.log.splitlines() if "id=line-1 " in line]
    assert re.search(
        r"POST /v1/completions 200 \d+ ms prompt=\d+ cached=\d+ output=3 end=length id=line-1 "
        r"from=127\.0\.0\.1:\d+$",
        line,
    )
    assert SECRET not in guarded.log


def test_a_refusal_has_its_line_too_and_health_has_none(guarded: LiveServer) -> None:
    ask(guarded, "no", **{"X-Request-Id": "line-2"})
    httpx.get(f"{guarded.url}/health", headers={"X-Request-Id": "line-3"})
    httpx.get(f"{guarded.url}/version?x=1", headers={"X-Request-Id": "line-4"})
    wait_for(lambda: "id=line-4" in guarded.log)
    assert re.search(r"POST /v1/completions 401 \d+ ms id=line-2 ", guarded.log)
    # Without the query, which may be secret.
    assert re.search(r"GET /version 200 \d+ ms id=line-4 ", guarded.log)
    assert "line-3" not in guarded.log


def test_nobody_writes_lines_of_their_own_into_the_log(guarded: LiveServer) -> None:
    path = "/v1/%0d%0aPOST%20/forged%20200"
    headers = {"X-Request-Id": "a b", "Authorization": f"Bearer {SECRET}"}
    answer = httpx.get(guarded.url + path, headers=headers)
    assert answer.status_code == 404
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])  # that one was no id
    assert not re.search(r"^POST /forged", guarded.log, re.MULTILINE)


def test_a_client_that_leaves_is_499(text_model: Path, tmp_path: Path) -> None:
    with fake_server(text_model, tmp_path / "log", Behaviour(step=0.05)) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={**ONE, "max_tokens": 400}, timeout=0.3)
        wait_for(lambda: re.search(r"/v1/completions 499 .* end=abort", server.log))
        page = httpx.get(f"{server.url}/metrics").text
        assert re.search(r'http_requests_total\{.*route="/v1/completions",status="499"\} 1', page)


def test_ids_and_lines_can_be_left_out(text_model: Path, tmp_path: Path) -> None:
    options = {"enable_request_id_headers": False, "disable_uvicorn_access_log": True}
    with fake_server(text_model, tmp_path / "log", **options) as server:
        answer = ask(server, None, **{"X-Request-Id": "line-5"})
        assert "x-request-id" not in answer.headers
        assert "line-5" not in server.log


# --- what a client may cost --------------------------------------------------------------------


def talk(server: LiveServer, data: bytes) -> bytes:
    """Send bytes on a new connection; everything that comes until the server closes it."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(1 << 16):
            received += part
    return received


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-first\r\n"


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (HEAD[:20], 408, "request_timeout"),
        (HEAD + b"X: y\r\n", 408, "request_timeout"),
        (HEAD + b"Content-Length: 10\r\n\r\n{", 408, "request_timeout"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", 408, "request_timeout"),
        (HEAD + b"X-Flood: yes\r\n" * 1000, 431, "headers_too_large"),
        (HEAD + b"X: " + b"y" * 100_000, 431, "headers_too_large"),
        (b"\x00\x01\x02\x03 rubbish\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/9.9\r\n\r\n", 400, "invalid_http"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "invalid_http"),
        (HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "invalid_http"),
    ],
)
def test_a_slow_or_broken_request_ends_with_an_error(
    guarded: LiveServer, data: bytes, status: int, code: str
) -> None:
    head, _, body = talk(guarded, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == code


def test_a_connection_without_a_word_is_closed_without_one(guarded: LiveServer) -> None:
    assert talk(guarded, b"") == b""


def test_pipelined_requests_are_answered_in_order(guarded: LiveServer) -> None:
    one = b"GET /version HTTP/1.1\r\nHost: x\r\nX-Request-Id: %d\r\n%b\r\n"
    data = b"".join(one % (i, b"Connection: close\r\n" if i == 49 else b"") for i in range(50))
    received = talk(guarded, data)
    ids = re.findall(rb"x-request-id: (\d+)", received)
    assert ids == [b"%d" % i for i in range(50)]


def test_rubbish_behind_a_request_leaves_its_answer_whole(text_model: Path, tmp_path: Path) -> None:
    """The clock on a request's head does not run while another is answered."""
    with fake_server(
        text_model, tmp_path / "log", Behaviour(step=0.05), read_timeout=0.2
    ) as server:
        body = json.dumps({**ONE, "max_tokens": 20, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        received = talk(server, head + b"Content-Length: %d\r\n\r\n%b\r\nGE" % (len(body), body))
        assert b"data: [DONE]" in received
        assert received.count(b"data: {") == 20


def test_chunks_hold_as_many_tokens_as_was_said(guarded: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=SECRET, max_retries=0)
    create: Any = client.completions.create
    extra = {"ignore_eos": True, "return_token_ids": True}
    chunks = create(model="fake", prompt="hello", max_tokens=14, stream=True, extra_body=extra)
    sizes = [len(chunk.choices[0].token_ids) for chunk in chunks]
    assert sum(sizes) == 14
    assert sizes[0] >= 1
    assert all(size >= 4 for size in sizes[1:-1])


# --- browsers, certificates, traces ------------------------------------------------------------


def test_scripts_of_an_allowed_page_may_call(guarded: LiveServer) -> None:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-y"}
    for origin, allowed in [("https://page.example", True), ("https://other.example", False)]:
        headers = {"Origin": origin, **wanted}
        answer = httpx.options(f"{guarded.url}/v1/chat/completions", headers=headers)
        assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
        answer = ask(guarded, SECRET, Origin=origin)
        assert (answer.headers.get("access-control-allow-origin") == origin) is allowed


def test_by_default_no_page_may_call(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers={"Origin": "https://page.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_https(text_model: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    options = {"ssl_keyfile": str(key), "ssl_certfile": str(certificate)}
    with fake_server(text_model, tmp_path / "log", **options) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        answer = httpx.post(f"{server.url}/v1/completions", json=ONE, verify=context)
        assert answer.status_code == 200


def test_a_request_becomes_a_span_of_the_callers_trace(text_model: Path, tmp_path: Path) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with (
        collector() as spans,
        fake_server(text_model, tmp_path / "log", otlp_traces_endpoint=spans.endpoint) as server,
    ):
        ask(server, None, traceparent=f"00-{trace}-{parent}-01")
        server.process.terminate()  # what waits is sent before the end
        assert server.process.wait(20) == 0
    (request,) = spans.named("llm_request")
    assert (request.trace, request.parent) == (trace, parent)
    assert request.attributes["gen_ai.usage.completion_tokens"] == 3
    assert 0 < request.attributes["gen_ai.latency.time_to_first_token"] < 20
    queue, prefill, decode = phases = spans.below(request)
    assert [one.name for one in phases] == ["queue", "prefill", "decode"]
    assert request.start <= queue.start <= queue.end == prefill.start
    assert prefill.end == decode.start <= decode.end <= request.end
    assert decode.attributes["gen_ai.usage.completion_tokens"] == 3
