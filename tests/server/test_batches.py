"""/v1/files and /v1/batches at a server, as the official client uses them, through restarts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.batch.counting_server import chat_line
from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server, wait_for

ENDED = {"completed", "failed", "expired", "cancelled"}


@contextmanager
def served(
    model: Path, folder: Path, step: float = 0.001
) -> Iterator[tuple[LiveServer, openai.OpenAI]]:
    with fake_server(
        model,
        folder / "log",
        Behaviour(step=step),
        max_model_len=512,
        batch_dir=str(folder / "batches"),
        api_key=["secret", "another"],
        environment={"MILLRACE_API_KEY": ""},
        max_server_restarts=0,
    ) as server:
        yield server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def lines(count: int, **body: Any) -> bytes:
    fields = {"model": "fake", "max_tokens": 8, **body}
    return "".join(json.dumps(chat_line(i, **fields)) + "\n" for i in range(count)).encode()


def create(client: openai.OpenAI, content: bytes, **more: Any) -> Any:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        **more,
    )


def until(client: openai.OpenAI, id: str, holds: Callable[[Any], bool]) -> Any:
    found: list[Any] = []

    def look() -> bool:
        found[:] = [client.batches.retrieve(id)]
        return holds(found[0])

    wait_for(look, timeout=60)
    return found[0]


def ended(client: openai.OpenAI, id: str) -> Any:
    return until(client, id, lambda batch: batch.status in ENDED)


def rows(client: openai.OpenAI, file_id: str) -> dict[str, Any]:
    content = client.files.content(file_id).text
    found = [json.loads(line) for line in content.splitlines()]
    assert len({row["custom_id"] for row in found}) == len(found)
    return {row["custom_id"]: row for row in found}


def test_the_official_client_runs_the_whole_cycle(text_model: Path, tmp_path: Path) -> None:
    with served(text_model, tmp_path) as (server, client):
        content = lines(10) + json.dumps(chat_line(10, model="fake", temperature=-1)).encode()
        batch = create(
            client, content, metadata={"who": "me"},
            output_expires_after={"anchor": "created_at", "seconds": 3600},
        )  # fmt: skip
        assert batch.status == "validating"
        batch = ended(client, batch.id)
        assert batch.status == "completed", server.log
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (11, 10, 1)
        assert batch.metadata == {"who": "me"}
        assert batch.usage.output_tokens == 80
        output = rows(client, batch.output_file_id)
        assert set(output) == {f"id-{i}" for i in range(10)}
        assert output["id-3"]["response"]["body"]["choices"][0]["message"]["content"]
        errors = rows(client, batch.error_file_id)
        assert errors["id-10"]["response"]["status_code"] == 400
        written = client.files.retrieve(batch.output_file_id)
        assert (written.purpose, written.expires_at) == ("batch_output", written.created_at + 3600)
        check_lists(client, batch)
        check_refusals(client, batch)
        check_owners(server, batch)
        check_bad_input(client)


def check_lists(client: openai.OpenAI, batch: Any) -> None:
    ids = [one.id for one in client.files.list(limit=1)]  # page by page
    assert set(ids) == {batch.input_file_id, batch.output_file_id, batch.error_file_id}
    oldest = client.files.list(order="asc", purpose="batch").data[0]
    assert oldest.id == batch.input_file_id
    assert [one.id for one in client.batches.list()] == [batch.id]
    assert client.files.delete(batch.error_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(batch.error_file_id)


def check_refusals(client: openai.OpenAI, batch: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="No such batch"):
        client.batches.retrieve("batch_0")
    with pytest.raises(openai.ConflictError, match="is completed"):
        client.batches.cancel(batch.id)
    wrong: list[dict[str, Any]] = [
        {"completion_window": "1h"},
        {"endpoint": "/v1/embeddings"},
        {"input_file_id": batch.output_file_id},
        {"metadata": {"k": "v" * 513}},
        {"output_expires_after": {"anchor": "created_at", "seconds": 10}},
    ]
    right = {
        "input_file_id": batch.input_file_id, "endpoint": batch.endpoint,
        "completion_window": "24h",
    }  # fmt: skip
    for fields in wrong:
        with pytest.raises(openai.BadRequestError):
            client.batches.create(**{**right, **fields})
    with pytest.raises(openai.BadRequestError, match="use batch"):
        client.files.create(file=("a", b"x"), purpose="fine-tune")


def check_owners(server: LiveServer, batch: Any) -> None:
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0)
    assert list(other.batches.list()) == []
    for ask in (other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(batch.output_file_id)
    assert httpx.get(f"{server.url}/v1/batches").status_code == 401


def check_bad_input(client: openai.OpenAI) -> None:
    failed = ended(client, create(client, lines(2) + b"{}\n" + lines(1)).id)
    assert failed.status == "failed"
    assert [(one.line, one.code) for one in failed.errors.data] == [
        (3, "invalid_json_line"), (4, "invalid_json_line"),
    ]  # fmt: skip
    assert failed.output_file_id is None


def test_batches_outlive_a_kill_and_can_be_cancelled(text_model: Path, tmp_path: Path) -> None:
    with served(text_model, tmp_path, step=0.05) as (server, client):
        killed = create(client, lines(40))
        until(client, killed.id, lambda batch: batch.request_counts.completed > 0)
        server.process.kill()
        server.process.wait()
    with served(text_model, tmp_path, step=0.01) as (_, client):
        cancelled = create(client, lines(2000, max_tokens=50))
        until(client, cancelled.id, lambda batch: batch.request_counts.completed > 0)
        client.batches.cancel(cancelled.id)
        batch = ended(client, killed.id)
        assert batch.status == "completed"
        assert set(rows(client, batch.output_file_id)) == {f"id-{i}" for i in range(40)}
        batch = ended(client, cancelled.id)
        assert batch.status == "cancelled"
        assert batch.cancelling_at <= batch.cancelled_at <= time.time()
        output, errors = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
        assert 0 < len(output) < 2000
        assert set(output) | set(errors) == {f"id-{i}" for i in range(2000)}
        assert not set(output) & set(errors)
        assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}
        wait_for(lambda: not list((tmp_path / "batches" / "jobs").iterdir()))


def test_without_a_directory_there_are_none(http: httpx.Client) -> None:
    answer = http.get("/v1/batches")
    assert answer.status_code == 404
    assert "--batch-dir" in answer.json()["error"]["message"]
