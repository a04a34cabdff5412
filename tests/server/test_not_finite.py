"""A server whose model computes NaN: it does not start, or answers those requests with an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.support.damaged_model import damaged, untied_model
from tests.support.engines import run
from tests.support.live_server import LiveServer, started

FLAGS = (
    *("--port=0", "--dtype=float32", "--max-model-len=128", "--max-num-seqs=4"),
    *("--kv-cache-memory-bytes=16777216", "--served-model-name=small"),
)
PROMPT = [5, 6, 9, 11, 200, 3]


def command(model: Path) -> list[str]:
    return [sys.executable, "-m", "millrace.cli", "serve", str(model), *FLAGS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return untied_model(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def greedy(model: Path) -> list[int]:
    """What follows PROMPT."""
    (tokens,), _ = run(model, [PROMPT])
    return tokens


@pytest.fixture(scope="module")
def bad_token(greedy: list[int]) -> int:
    """A token behind which the model computes NaN; it is not the first of `greedy`."""
    known = (0, *PROMPT)
    return next(
        token for at, token in enumerate(greedy) if at > 1 and token not in (*greedy[:at], *known)
    )


@pytest.fixture(scope="module")
def server(
    model: Path, bad_token: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("half-good")
    half_good = damaged(model, folder, "embed_tokens.weight", bad_token, torch.nan)
    with started(command(half_good), folder / "log") as running:
        running.wait_ready(120)
        yield running


def ask(server: LiveServer, prompt: list[int], **more: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **more}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


@pytest.mark.parametrize("stream", [False, True])
def test_before_the_first_token_it_is_a_500(
    server: LiveServer, bad_token: int, stream: bool
) -> None:
    before = server.metric("millrace:rows_not_finite_total")
    answer = ask(server, [5, bad_token], stream=stream)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "model_failed")
    assert "NaN or infinite" in error["message"]
    assert server.metric("millrace:rows_not_finite_total") == before + 1
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert ask(server, [5, 6], max_tokens=1).status_code == 200
    assert "NaN or infinite" in server.log


def test_later_the_stream_ends_with_the_error(server: LiveServer, bad_token: int) -> None:
    answer = ask(server, PROMPT, stream=True, return_token_ids=True)
    assert answer.status_code == 200, answer.text + server.log
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    last = json.loads(events[-2] if events[-1] == "[DONE]" else events[-1])
    assert last["error"]["code"] == "model_failed"
    pieces = [json.loads(event) for event in events if '"choices"' in event]
    sent = [token for piece in pieces for token in piece["choices"][0]["token_ids"]]
    assert sent[-1] == bad_token
    assert all(piece["choices"][0]["finish_reason"] is None for piece in pieces)


def test_a_model_that_computes_nothing_else_does_not_start(model: Path, tmp_path: Path) -> None:
    bad = damaged(model, tmp_path, "down_proj.weight", None, torch.nan)
    with started(command(bad), tmp_path / "log") as refused:
        assert refused.process.wait(120) == 2
        said = [line for line in refused.log.splitlines() if "NaN or infinite" in line]
        assert len(said) == 1
        assert str(bad) in said[0]
        assert "Traceback" not in refused.log
