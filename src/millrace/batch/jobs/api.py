"""/v1/files and /v1/batches, without a web server: requests in, replies out.

The server of a replica and the gateway answer these paths with it. Batches are noted in the
catalog here; another process runs them.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from millrace.batch.jobs.catalog import MOST_LISTED, Catalog
from millrace.batch.jobs.multipart import Upload
from millrace.batch.jobs.objects import (
    LONGEST_KEEP,
    MAX_FILE_BYTES,
    OPEN,
    SHORTEST_KEEP,
    WINDOW_SECONDS,
    BatchObject,
    NewBatch,
)
from millrace.common.api_errors import ApiError

FILES, BATCHES = "/v1/files", "/v1/batches"
PURPOSES = ("batch", "batch_output", "user_data")
_MAX_BODY = 1 << 20
_Result = TypeVar("_Result")


class Call(msgspec.Struct, frozen=True):
    """A request. query: by name. owner: whose objects it may see; empty where there are no keys.
    body: its pieces."""

    method: str
    path: str
    query: Mapping[str, str]
    content_type: str
    owner: str
    body: AsyncIterator[bytes]


class Reply(msgspec.Struct, frozen=True):
    """An answer: an object, or the content of a file."""

    value: Any = None
    content: Path | None = None


def is_batch_path(path: str) -> bool:
    """Whether a path is answered here."""
    return path in (FILES, BATCHES) or path.startswith((f"{FILES}/", f"{BATCHES}/"))


class BatchApi:
    """The API of a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def answer(self, call: Call) -> Reply:
        """The answer to a request for one of its paths. Raises ApiError."""
        base = FILES if call.path.startswith(FILES) else BATCHES
        rest = [part for part in call.path[len(base) :].split("/") if part]
        route = (call.method, base, len(rest), *rest[1:])
        match route:
            case ("POST", "/v1/files", 0):
                return await self._upload(call)
            case ("GET", "/v1/files", 0):
                return await self._list(call, "file")
            case ("GET", "/v1/files", 1):
                return Reply(await self._in_thread(self._catalog.file, rest[0], call.owner))
            case ("DELETE", "/v1/files", 1):
                return Reply(await self._in_thread(self._catalog.delete_file, rest[0], call.owner))
            case ("GET", "/v1/files", 2, "content"):
                await self._in_thread(self._catalog.file, rest[0], call.owner)
                return Reply(content=self._catalog.content(rest[0]))
            case ("POST", "/v1/batches", 0):
                return Reply(await self._create(call))
            case ("GET", "/v1/batches", 0):
                return await self._list(call, "batch")
            case ("GET", "/v1/batches", 1):
                return Reply(await self._in_thread(self._catalog.batch, rest[0], call.owner))
            case ("POST", "/v1/batches", 2, "cancel"):
                return Reply(await self._in_thread(self._cancel, rest[0], call.owner))
        raise ApiError(404, f"{call.method} {call.path[:200]} is not here", code="not_found")

    async def _in_thread(self, work: Any, *arguments: Any) -> Any:
        """The result of work that reads and writes the disk."""
        return await asyncio.to_thread(work, *arguments)

    # --- files -----------------------------------------------------------------------------------

    async def _upload(self, call: Call) -> Reply:
        path = self._catalog.new_upload()
        try:
            with path.open("xb") as file:
                upload = Upload(call.content_type, file, MAX_FILE_BYTES)
                async for piece in call.body:
                    upload.feed(piece)
            if not upload.complete or upload.filename is None:
                raise ApiError(400, "the form has no part named file", param="file")
            purpose = upload.fields.get("purpose", "")
            if purpose not in PURPOSES:
                message = f"purpose {purpose[:100]!r}: use batch"
                raise ApiError(400, message, param="purpose")
            keep = _keep_of(upload.fields)
            await self._in_thread(self._catalog.check_room, upload.size)
            made = await self._in_thread(
                self._catalog.add_file, path, call.owner, upload.filename, purpose, keep
            )
            return Reply(made)
        except OSError as error:
            raise ApiError(507, f"the file cannot be kept: {error.strerror}") from None
        finally:
            path.unlink(missing_ok=True)

    async def _list(self, call: Call, kind: Any) -> Reply:
        limit = _limit(call.query.get("limit", "20"))
        order = call.query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise ApiError(400, "order: use asc or desc", param="order")
        page = await self._in_thread(
            self._catalog.page,
            kind,
            call.owner,
            limit,
            call.query.get("after", ""),
            order == "asc",
            call.query.get("purpose", ""),
        )
        return Reply(page)

    # --- batches ---------------------------------------------------------------------------------

    async def _create(self, call: Call) -> BatchObject:
        body = bytearray()
        async for piece in call.body:
            body += piece
            if len(body) > _MAX_BODY:
                raise ApiError(413, f"the body has more than {_MAX_BODY} bytes")
        try:
            wanted = msgspec.json.decode(body, type=NewBatch)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ApiError(400, str(error)) from None
        wanted.check()
        return await self._in_thread(self._add, wanted, call.owner)  # type: ignore[no-any-return]

    def _add(self, wanted: NewBatch, owner: str) -> BatchObject:
        file = self._catalog.file(wanted.input_file_id, owner)
        if file.purpose != "batch":
            message = f"the file's purpose is {file.purpose!r}; upload it with purpose batch"
            raise ApiError(400, message, param="input_file_id")
        now = int(time.time())
        made = BatchObject(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=wanted.endpoint,
            input_file_id=file.id,
            completion_window=wanted.completion_window,
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
            metadata=wanted.metadata,
        )
        keep = wanted.output_expires_after
        self._catalog.add_batch(made, owner, None if keep is None else keep.seconds)
        return made

    def _cancel(self, batch_id: str, owner: str) -> BatchObject:
        self._catalog.batch(batch_id, owner)

        def change(batch: BatchObject) -> None:
            if batch.status in ("cancelling", "cancelled"):
                return
            if batch.status not in OPEN or batch.status == "finalizing":
                raise ApiError(
                    409, f"the batch is {batch.status}; only one that runs can be cancelled"
                )
            batch.status, batch.cancelling_at = "cancelling", int(time.time())

        return self._catalog.change(batch_id, change)


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MOST_LISTED:
        raise ApiError(400, f"limit: use 1 to {MOST_LISTED}", param="limit")
    return int(text)


def _keep_of(fields: Mapping[str, str]) -> int | None:
    """Seconds for which an upload is kept. Raises ApiError (400)."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise ApiError(400, 'expires_after[anchor]: only "created_at" works', param="expires_after")
    if not (seconds or "").isdigit() or not SHORTEST_KEEP <= int(seconds or 0) <= LONGEST_KEEP:
        message = f"expires_after[seconds]: use {SHORTEST_KEEP} to {LONGEST_KEEP}"
        raise ApiError(400, message, param="expires_after")
    return int(seconds or 0)
