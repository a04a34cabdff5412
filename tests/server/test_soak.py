"""The soak in small, and what a fuzzer makes of the OpenAPI document: no fault, and nothing stays.

`benchmarks/soak.py` is the long form.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live_server import LiveServer, started, wait_for
from tests.support.soak import holdings, soak

FLAGS = (
    "--debug", "--port=0", "--dtype=float32", "--max-model-len=1024", "--max-num-seqs=6",
    "--max-num-batched-tokens=64", "--kv-cache-memory-bytes=4000000", "--read-timeout=1",
    '--speculative-config={"method": "mtp", "num_speculative_tokens": 2}',
)  # fmt: skip


@pytest.fixture(scope="module")
def server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    command = [sys.executable, "-m", "millrace.cli", "serve", str(small_model), *FLAGS]
    with started(command, tmp_path_factory.mktemp("soak") / "log") as running:
        running.wait_ready(120)
        yield running


def test_nothing_stays_and_nothing_fails(server: LiveServer) -> None:
    asyncio.run(soak(server.url, 40, seed=1))  # what is made once is made now
    wait_for(lambda: server.open_in_engine() == 0, 30)
    before = holdings(server.url, server.process.pid)
    report = asyncio.run(soak(server.url, 120, seed=2))
    assert report.problems == []
    assert sum(report.answers.values()) == 120
    assert report.answers["good", 200] > 25
    wait_for(lambda: holdings(server.url, server.process.pid) == before, 30)
    assert "Traceback" not in server.log
