"""The soak in small, and what a fuzzer makes of the OpenAPI document: no fault, and nothing stays.

`benchmarks/soak.py` is the long form.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.live_server import LiveServer, started, wait_for
from tests.support.soak import holdings, soak

FLAGS = (
    "--debug", "--port=0", "--max-server-restarts=0", "--dtype=float32",
    "--max-model-len=1024", "--max-num-seqs=6",
    "--max-num-batched-tokens=64", "--kv-cache-memory-bytes=4000000", "--read-timeout=1",
    '--speculative-config={"method": "mtp", "num_speculative_tokens": 2}',
)  # fmt: skip
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
]
SHAPE = response_schema_conformance  # of what is JSON
EXAMPLES = settings(
    max_examples=2, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    command = [sys.executable, "-m", "millrace.cli", "serve", str(small_model), *FLAGS]
    with started(command, tmp_path_factory.mktemp("soak") / "log") as running:
        running.wait_ready(120)
        yield running


def test_nothing_stays_and_nothing_fails(whole: LiveServer) -> None:
    asyncio.run(soak(whole.url, 40, seed=1))  # what is made once is made now
    wait_for(lambda: holdings(whole.url, whole.process.pid).at_rest, 30)
    before = holdings(whole.url, whole.process.pid)
    report = asyncio.run(soak(whole.url, 100, seed=2))
    assert report.problems == []
    assert sum(report.answers.values()) == 100
    assert report.answers["good", 200] > 25
    wait_for(lambda: holdings(whole.url, whole.process.pid) == before, 30)
    assert "Traceback" not in whole.log


def test_the_openapi_document_holds_under_generated_requests(http: httpx.Client) -> None:
    """Whatever the document allows or forbids, no answer is a 5xx, and each is as documented."""
    schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    answers = []
    for found in schema.get_all_operations():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            cases = found.ok().as_strategy(generation_mode=mode)

            @EXAMPLES
            @given(case=cases)
            def ask(case: schemathesis.Case) -> None:
                answer = case.call(base_url=str(http.base_url), timeout=20)
                stream = "event-stream" in answer.headers["content-type"][0]
                case.validate_response(answer, checks=CHECKS if stream else [*CHECKS, SHAPE])
                answers.append(answer.status_code)

            with contextlib.suppress(Unsatisfiable):  # nothing of this kind to send
                ask()
    assert 200 in answers
    assert 400 in answers
