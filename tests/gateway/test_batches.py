"""/v1/files and /v1/batches at a gateway: its batches use all replicas, and outlive it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from millrace.gateway.relay.access import Access
from tests.batch.counting_server import chat_line
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

COUNT = 60


async def ended(client: openai.AsyncOpenAI, id: str) -> Any:
    async with asyncio.timeout(60):
        while True:
            batch = await client.batches.retrieve(id)
            if batch.status in ("completed", "failed", "expired", "cancelled"):
                return batch
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_goes_through_the_gateway(tmp_path: Path, processes: int) -> None:
    async def main() -> None:
        replicas = [await MockReplica(behaviour="plain", name=n).start() for n in ("one", "two")]
        options = {
            "batch_dir": str(tmp_path), "access": Access(api_key=["k"]), "processes": processes,
        }  # fmt: skip
        async with gateway(*(r.url for r in replicas), **options) as (_, target):
            url = f"http://{target.host}:{target.port}/v1"
            client = openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0)
            content = "".join(json.dumps(chat_line(i)) + "\n" for i in range(COUNT)).encode()
            file = await client.files.create(file=("in.jsonl", content), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
            batch = await ended(client, batch.id)
            assert batch.request_counts.completed == COUNT
            text = (await client.files.content(batch.output_file_id)).text
            with pytest.raises(openai.AuthenticationError):
                await openai.AsyncOpenAI(base_url=url, api_key="x").batches.list()
            with pytest.raises(openai.NotFoundError):
                await client.files.content("file-0")
        found = sorted(json.loads(line)["custom_id"] for line in text.splitlines())
        assert found == sorted(f"id-{i}" for i in range(COUNT))
        assert all(len(replica.bodies) > COUNT // 10 for replica in replicas)
        assert all(h["x-service-class"] == "batch" for r in replicas for h in r.headers)
        for replica in replicas:
            await replica.stop()

    run(main())


def test_a_killed_worker_comes_back_and_goes_with_the_gateway(tmp_path: Path) -> None:
    async def main() -> None:
        replica = await MockReplica().start()
        async with gateway(replica.url, batch_dir=str(tmp_path)):
            await eventually(_workers)
            (worker,) = _workers()
            worker.kill()
            await eventually(lambda: [w for w in _workers() if w.pid != worker.pid], timeout=30)
        assert _workers() == []
        await replica.stop()

    run(main())


def _workers() -> list[psutil.Process]:
    """Processes of this one that run batches, and are not about to be reaped."""
    found = []
    for child in psutil.Process().children():
        try:
            if "millrace.batch.jobs.worker" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found
