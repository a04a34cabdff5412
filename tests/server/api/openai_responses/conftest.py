"""A server over a fake engine whose model reasons and knows tools."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server
from tests.support.text_model import TOOLS, token_id, write_text_model


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("responses")
    model = write_text_model(folder / "model", TOOLS)
    behaviour = Behaviour(eos=token_id(model, "<|im_end|>"), step=0.002)
    with fake_server(model, folder / "log", behaviour, max_model_len=1024) as running:
        yield running


@pytest.fixture(scope="package")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="package")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as one:
        yield one
