"""Pause, sleep and wake-up of a server, and who may ask for them. No model runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from millrace.server.routes import ABSENT
from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server, wait_for

ADMIN = {"Authorization": "Bearer manager"}
LONG = {"prompt": "hello", "max_tokens": 100}


@pytest.fixture(scope="module")
def server(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    log = tmp_path_factory.mktemp("management") / "log"
    behaviour = Behaviour(step=0.01)
    with fake_server(
        text_model, log, behaviour, admin_key="manager", api_key=["client"]
    ) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    headers = {"Authorization": "Bearer client"}
    with httpx.Client(base_url=server.url, timeout=20, headers=headers) as one:
        yield one


@pytest.fixture(autouse=True)
def awake(http: httpx.Client) -> Iterator[None]:
    yield
    assert manage(http, "/wake_up").status_code == 200
    assert manage(http, "/resume").status_code == 200


def manage(http: httpx.Client, path: str, method: str = "POST", **query: Any) -> httpx.Response:
    return http.request(method, path, params=query, headers=ADMIN)


class Answer:
    """An answer, here of a completion, that is asked for on a thread."""

    def __init__(
        self, http: httpx.Client, path: str = "/v1/completions", asked: Any = LONG
    ) -> None:
        self.body: Any = None
        self._thread = threading.Thread(target=self._ask, args=[http, path, asked])
        self._thread.start()

    def _ask(self, http: httpx.Client, path: str, asked: Any) -> None:
        self.body = http.post(path, json=asked).json()

    def wait(self) -> Any:
        self._thread.join(20)
        assert self.body is not None, "the answer did not end"
        return self.body


def started(server: LiveServer, http: httpx.Client, *asked: Any) -> Answer:
    """An answer that the engine works on. Its own figures may still be of the request before."""
    answer = Answer(http, *asked)
    wait_for(lambda: http.get("/load").json()["requests"] == 1)
    wait_for(lambda: server.metric("millrace:num_requests_running") == 1)
    return answer


@pytest.mark.parametrize("key", [None, "client", "other"])
def test_only_the_admin_key_opens_the_management(server: LiveServer, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    for path in ("/pause", "/sleep", "/reset_prefix_cache"):
        assert httpx.post(server.url + path, headers=headers).status_code == 401
    assert httpx.post(server.url + "/v1/completions", json=LONG, headers=ADMIN).status_code == 401


def test_abort_ends_requests_and_refuses_new_ones(server: LiveServer, http: httpx.Client) -> None:
    answer = started(server, http)
    for _ in range(2):  # once more changes nothing
        assert manage(http, "/pause").json() == {"status": "paused"}
        assert manage(http, "/is_paused", "GET").json() == {"is_paused": True}
    assert answer.wait()["choices"][0]["finish_reason"] == "abort"
    refused = http.post("/v1/completions", json=LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "paused")
    assert http.get("/health").status_code == 503
    assert manage(http, "/resume").json() == {"status": "resumed"}
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert http.get("/health").status_code == 200
    wait_for(lambda: server.open_in_engine() == 0)


MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("path", "asked", "key", "value"),
    [
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 100}, "stop_reason", "pause_turn"),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 100}, "status", "cancelled"),
    ],
)
def test_every_api_says_that_an_answer_was_cut_by_a_pause(
    server: LiveServer, http: httpx.Client, path: str, asked: Any, key: str, value: str
) -> None:
    answer = started(server, http, path, asked)
    assert manage(http, "/pause").status_code == 200
    assert answer.wait()[key] == value


def test_wait_lets_requests_end(server: LiveServer, http: httpx.Client) -> None:
    answer = started(server, http)
    assert manage(http, "/pause", mode="wait").status_code == 200
    assert answer.wait()["choices"][0]["finish_reason"] == "length"
    assert http.post("/v1/completions", json=LONG).status_code == 503


def test_keep_freezes_requests_and_lets_new_ones_wait(
    server: LiveServer, http: httpx.Client
) -> None:
    answer = started(server, http)
    assert manage(http, "/pause", mode="keep").status_code == 200
    before = server.metric("millrace:generation_tokens_total")
    later = Answer(http)
    time.sleep(0.3)
    assert server.metric("millrace:generation_tokens_total") == before
    assert answer.body is None
    assert later.body is None
    assert manage(http, "/resume").status_code == 200
    for one in (answer, later):
        assert one.wait()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("query", "cleared"), [({}, 1), ({"clear_cache": "False"}, 0)])
def test_a_pause_forgets_cached_prefixes_unless_told_not_to(
    server: LiveServer, http: httpx.Client, query: dict[str, str], cleared: int
) -> None:
    def resets() -> float:  # the fake engine counts them here
        return server.metric("millrace:snapshots_used")

    before = resets()
    assert manage(http, "/pause", **query).status_code == 200
    assert manage(http, "/reset_prefix_cache").json() == {"success": True}
    wait_for(lambda: resets() == before + cleared + 1)


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_sleeps_is_gone(server: LiveServer, http: httpx.Client, level: int) -> None:
    engine = server.engine()
    answer = started(server, http)
    state = {"status": "sleeping", "level": level}
    assert manage(http, "/sleep", level=level).json() == state
    assert answer.wait()["choices"][0]["finish_reason"] == "abort"
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    assert manage(http, "/is_sleeping", "GET").json() == {"is_sleeping": True}
    refused = http.post("/v1/completions", json=LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "asleep")
    page = http.get("/metrics").text
    name = {1: "weights_offloaded", 2: "discard_all"}[level]
    assert f'sleep_state="{name}"}} 1.0' in page
    assert manage(http, "/resume").status_code == 200  # does not wake it
    assert manage(http, "/wake_up", tags="weights").json() == {
        "status": "sleeping",
        "tags": ["weights"],
    }
    assert manage(http, "/wake_up", tags="kv_cache").json()["status"] == "awake"
    assert manage(http, "/is_sleeping", "GET").json() == {"is_sleeping": False}
    assert server.engine().pid != engine.pid
    assert server.metric("millrace:engine_restarts_total") == 0
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_level_0_keeps_the_engine(server: LiveServer, http: httpx.Client) -> None:
    engine = server.engine().pid
    assert manage(http, "/sleep", level=0).json() == {"status": "sleeping", "level": 0}
    assert manage(http, "/is_sleeping", "GET").json() == {"is_sleeping": True}
    assert http.post("/v1/completions", json=LONG).status_code == 503
    assert manage(http, "/wake_up").json() == {"status": "awake", "tags": None}
    assert server.engine().pid == engine


def test_an_engine_that_cannot_wake_is_reported(text_model: Path, tmp_path: Path) -> None:
    """Its death after that is the restarter's business."""
    behaviour = Behaviour(die_after=1)
    with fake_server(
        text_model, tmp_path / "log", behaviour, admin_key="manager", max_engine_restarts=3
    ) as server, httpx.Client(base_url=server.url, timeout=20) as http:  # fmt: skip
        assert manage(http, "/sleep").status_code == 200
        assert manage(http, "/wake_up").status_code == 200
        assert http.post("/v1/completions", json=LONG).status_code == 503
        wait_for(lambda: http.get("/health").status_code == 200)


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        ("/pause", {"mode": "now"}, "query.mode"),
        ("/pause", {"clear_cache": "perhaps"}, "query.clear_cache"),
        ("/sleep", {"level": 3}, "query.level"),
        ("/sleep", {"mode": "keep"}, "query.mode"),
        ("/wake_up", {"tags": "dreams"}, "query.tags"),
    ],
)
def test_a_wrong_query_changes_nothing(
    http: httpx.Client, path: str, query: dict[str, Any], param: str
) -> None:
    refused = manage(http, path, **query)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert manage(http, "/is_paused", "GET").json() == {"is_paused": False}


def test_without_an_admin_key_there_is_no_management(text_model: Path, tmp_path: Path) -> None:
    with fake_server(text_model, tmp_path / "log") as server:
        answer = httpx.post(f"{server.url}/sleep")
        assert answer.status_code == 404
        assert "--admin-key" in answer.json()["error"]["message"]
        paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
        assert "/sleep" not in paths


def test_what_other_servers_have_is_refused_with_the_reason(http: httpx.Client) -> None:
    for path in ABSENT:
        error = http.post(path, json={}).json()["error"]
        assert error["code"] == "endpoint_not_found"
        assert error["message"].startswith(f"{path} is not here: ")
    assert "embedding" in http.post("/v1/embeddings", json={}).json()["error"]["message"]


def test_the_tokenizer_is_described(http: httpx.Client) -> None:
    info = http.get("/tokenizer_info").json()
    assert info["tokenizer_class"]
    assert "<|im_start|>" in info["chat_template"]
