"""Batches of a catalog: how they end, whatever was done already."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from millrace.batch.endpoint import Answer
from millrace.batch.jobs.catalog import Catalog
from millrace.batch.jobs.job_runner import JobRunner
from millrace.batch.jobs.objects import BatchObject
from tests.batch.counting_server import answer, chat_line
from tests.support.running import run

DAY = 24 * 3600


class Instant:
    """An endpoint that answers at once, or never."""

    name = "instant"

    def __init__(self, answers: bool = True) -> None:
        self._answers = answers

    async def send(self, path: str, body: bytes, key: str, timeout: float) -> Answer:
        if not self._answers:
            await asyncio.Event().wait()
        return Answer(200, json.dumps(answer("x")).encode())

    async def close(self) -> None: ...


def new_batch(catalog: Catalog, folder: Path, count: int = 5, left: float = DAY) -> BatchObject:
    content = folder / "upload"
    content.write_text("".join(json.dumps(chat_line(i)) + "\n" for i in range(count)))
    file = catalog.add_file(content, "me", "in.jsonl", "batch", None)
    now = int(time.time())
    batch = BatchObject(
        id="batch_1", endpoint="/v1/chat/completions", input_file_id=file.id,
        completion_window="24h", created_at=now, expires_at=int(now + left),
    )  # fmt: skip
    catalog.add_batch(batch, "me", 3600)
    return batch


def run_until_ended(catalog: Catalog, answers: bool = True) -> BatchObject:
    logged: list[str] = []

    async def main() -> BatchObject:
        runner = JobRunner(catalog, lambda: Instant(answers), 4, logged.append)
        running = asyncio.create_task(runner.run())
        while catalog.open_batches():
            assert not logged
            await asyncio.sleep(0.05)
        running.cancel()
        return catalog.batch("batch_1", "me")

    found: BatchObject = run(main())
    return found


def ids(catalog: Catalog, file_id: str | None) -> set[str]:
    assert file_id is not None
    lines = catalog.content(file_id).read_text().splitlines()
    return {json.loads(line)["custom_id"] for line in lines}


def test_a_batch_that_expires_keeps_what_is_done(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "batches", 10**9)
    new_batch(catalog, tmp_path, left=-1)
    batch = run_until_ended(catalog, answers=False)
    assert batch.status == "expired"
    assert batch.expired_at is not None
    assert batch.output_file_id is None
    assert ids(catalog, batch.error_file_id) == {f"id-{i}" for i in range(5)}
    (line, *_) = catalog.content(str(batch.error_file_id)).read_text().splitlines()
    assert json.loads(line)["error"]["code"] == "batch_expired"


def test_a_batch_whose_input_is_gone_fails(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "batches", 10**9)
    catalog.delete_file(new_batch(catalog, tmp_path).input_file_id, "me")
    batch = run_until_ended(catalog)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data[0].code == "input_file_deleted"


def test_the_end_of_a_batch_can_be_done_twice(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "batches", 10**9)
    new_batch(catalog, tmp_path)
    first = run_until_ended(catalog)
    assert first.status == "completed"

    def back(batch: BatchObject) -> None:
        batch.status = "finalizing"

    catalog.change("batch_1", back)  # as if it had been killed before the last step
    second = run_until_ended(catalog)
    assert second.output_file_id == first.output_file_id
    assert ids(catalog, second.output_file_id) == {f"id-{i}" for i in range(5)}
    written = catalog.file(str(second.output_file_id), "me")
    assert written.expires_at == written.created_at + 3600


def test_files_are_removed_when_their_time_is_over(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "batches", 10**9)
    content = tmp_path / "upload"
    content.write_text("x")
    file = catalog.add_file(content, "me", "a", "batch", 3600)
    catalog.remove_expired(time.time())
    assert catalog.file(file.id, "me") == file
    catalog.remove_expired(time.time() + 3601)
    assert not catalog.content(file.id).exists()
    assert catalog.page("file", "me", 10, "", True).data == []
