"""The stage of Ray Data: by itself, and in a local Ray whose driver is killed in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from millrace.batch.options import BatchOptions
from millrace.errors import ConfigError
from millrace.offline.ray_data import AnswerStage, answer
from tests.batch.counting_server import CountingServer, chat_line

MODEL = Path(__file__).parents[2] / "models" / "millrace-mini"


def batch_of(count: int) -> dict[str, list[Any]]:
    lines = [chat_line(number) for number in range(count)]
    return {
        "custom_id": [line["custom_id"] for line in lines],
        "body": [json.dumps(line["body"]) for line in lines],
        "origin": [f"file {number}" for number in range(count)],
    }


async def _through(stage: AnswerStage, *batches: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """What the stage makes of batches that it gets at once, as Ray does it."""

    async def one(batch: dict[str, list[Any]]) -> dict[str, Any]:
        (out,) = [got async for got in stage(batch)]
        return out

    try:
        return await asyncio.gather(*map(one, batches))
    finally:
        await stage.close()


def test_the_stage_adds_answers_to_the_rows() -> None:
    with CountingServer().running() as server:
        stage = AnswerStage(BatchOptions(base_url=[server.url]))
        first, second = asyncio.run(_through(stage, batch_of(5), batch_of(3)))
    assert first["origin"] == [f"file {number}" for number in range(5)]
    assert second["status_code"] == [200] * 3
    texts = [json.loads(one)["choices"][0]["message"]["content"] for one in first["response"]]
    assert texts == [f"about document {number}" for number in range(5)]


def test_the_stage_runs_an_engine_of_its_own() -> None:
    """Blocks that come at once share it."""
    options = BatchOptions(model=str(MODEL))
    stage = AnswerStage(options, {"max_num_seqs": 4, "max_model_len": 256})
    batch = batch_of(3)
    batch["body"] = [
        json.dumps(
            {"model": "any", "max_tokens": 3, "messages": [{"role": "user", "content": "2+2"}]}
        )
    ] * 3
    for out in asyncio.run(_through(stage, batch, batch)):
        assert out["status_code"] == [200] * 3, out["error"]
        assert len(set(map(str, out["output_tokens"]))) == 1
        assert out["output_tokens"][0] in (1, 2, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give servers with base_url"),
        ({"base_url": "http://a:1", "model": "m"}, "give servers with base_url"),
        ({"base_url": "http://a:1", "engine": {"max_num_seqs": 1}}, "the servers have engines"),
        ({"base_url": "http://a:1", "max_in_fligth": 3}, "no option 'max_in_fligth'"),
        ({"base_url": "http://a:1", "max_in_flight": 0}, "max_in_flight 0"),
        ({"base_url": "http://a:1", "max_in_flight": "many"}, "max_in_flight"),
        ({"base_url": "http://a:1", "actors": 0}, "actors 0"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        answer(None, **options)  # type: ignore[arg-type]


EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_batch.py"


def end(processes: list[psutil.Process]) -> None:
    """Ray's own processes stay for a while when their driver is killed."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, 10)


@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: millrace[ray]")
def test_a_killed_driver_goes_on_from_rays_checkpoints(tmp_path: Path) -> None:
    """Each request has one row at the end; what Ray had written is not sent again."""
    count = 400
    (tmp_path / "in").mkdir()
    for part in range(8):
        lines = [chat_line(n) for n in range(part, count, 8)]
        texts = [json.dumps({**one, "body": json.dumps(one["body"])}) for one in lines]
        (tmp_path / "in" / f"{part}.jsonl").write_text("\n".join(texts))
    server = CountingServer(seconds=0.2)
    kills = 0
    with server.running():
        places = [str(tmp_path / "in"), str(tmp_path / "out")]
        sizes = ["--rows-at-once=20", "--max-in-flight=8", "--num-cpus=8"]
        command = [sys.executable, str(EXAMPLE), *places, "--base-url", server.url, *sizes]
        for wanted in (count // 4, count // 2, 10 * count):
            driver = subprocess.Popen(command)
            before = time.monotonic()
            while driver.poll() is None and len(server.asked) < wanted:
                assert time.monotonic() - before < 300
                time.sleep(0.05)
            if driver.poll() is None and wanted < count:
                cluster = psutil.Process(driver.pid).children(recursive=True)
                driver.kill()
                end(cluster)
                kills += 1
            driver.wait(300)
    assert kills == 2
    assert driver.returncode == 0
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    found = Counter(row["custom_id"] for row in rows)
    assert set(found) == {f"id-{number}" for number in range(count)}
    assert all(row["status_code"] == 200 for row in rows)
    assert max(found.values()) == 1, f"{sum(n > 1 for n in found.values())} rows are twice"
