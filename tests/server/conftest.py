"""A server over a fake engine, started once for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server
from tests.support.text_model import token_id

MAX_MODEL_LEN = 512


@pytest.fixture(scope="package")
def server(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    behaviour = Behaviour(
        eos=token_id(text_model, "<|im_end|>"), refuse=token_id(text_model, "two words")
    )
    with fake_server(text_model, log, behaviour, max_model_len=MAX_MODEL_LEN) as running:
        yield running


@pytest.fixture(scope="package")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="package")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as one:
        yield one
