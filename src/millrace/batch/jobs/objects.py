"""Files and batches as OpenAI's API has them: their fields, statuses and limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from millrace.batch.journal import Counts
from millrace.batch.lines import URLS
from millrace.common.api_errors import ApiError

MAX_FILE_BYTES = 200 * 1000 * 1000
MAX_REQUESTS = 50_000
WINDOW_SECONDS = 24 * 3600
SHORTEST_KEEP, LONGEST_KEEP = 3600, 2_592_000  # seconds that a client can have a file kept

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling",
    "cancelled",
]  # fmt: skip
OPEN: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")


class ExpiresAfter(msgspec.Struct, frozen=True):
    """When a file is deleted. seconds: after its creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, msgspec.Meta(ge=SHORTEST_KEEP, le=LONGEST_KEEP)]


class FileObject(msgspec.Struct, kw_only=True):
    """A file. Times are seconds since 1970."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"
    status_details: str | None = None


class LineProblem(msgspec.Struct, frozen=True):
    """What is wrong with a line of a batch's input."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Problems(msgspec.Struct, frozen=True):
    """Why a batch was refused."""

    data: list[LineProblem]
    object: Literal["list"] = "list"


class RequestCounts(msgspec.Struct, frozen=True):
    """How far a batch is."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class BatchUsage(msgspec.Struct, frozen=True):
    """Tokens of all answers."""

    input_tokens: int = 0
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int = 0
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int = 0


class BatchObject(msgspec.Struct, kw_only=True):
    """A batch. Times are seconds since 1970."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    object: Literal["batch"] = "batch"
    status: Status = "validating"
    errors: Problems | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] | None = None
    model: str | None = None
    usage: BatchUsage | None = None

    def count(self, counts: Counts) -> None:
        """Take over how far its journal is."""
        used = counts.usage
        self.request_counts = RequestCounts(
            counts.total, counts.done - counts.failed, counts.failed
        )
        self.usage = BatchUsage(
            used.prompt, InputDetails(used.cached), used.output, OutputDetails(),
            used.prompt + used.output,
        )  # fmt: skip


class NewBatch(msgspec.Struct, frozen=True):
    """Body of POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None

    def check(self) -> None:
        """Raise ApiError (400) for what cannot work."""
        if self.endpoint not in URLS:
            message = f"endpoint {self.endpoint[:100]!r}: use one of {', '.join(URLS)}"
            raise ApiError(400, message, param="endpoint")
        if self.completion_window != "24h":
            raise ApiError(400, 'completion_window: only "24h" works', param="completion_window")
        check_metadata(self.metadata or {})


class Deleted(msgspec.Struct, frozen=True):
    """The answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class Page(msgspec.Struct, frozen=True):
    """A part of a list, newest first unless asked otherwise."""

    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise ApiError (400) unless there are at most 16 pairs of 64 and 512 characters."""
    if len(metadata) > 16:
        raise ApiError(400, f"metadata has {len(metadata)} pairs; 16 work", param="metadata")
    for key, value in metadata.items():
        if len(key) > 64 or len(value) > 512:
            message = f"metadata {key[:64]!r}: a key has at most 64 characters, a value 512"
            raise ApiError(400, message, param="metadata")
