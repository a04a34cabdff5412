"""What a sandbox process is asked to do, and what it answers.

Plain data in msgpack. Each job runs alone in its process: it may take all of its time and memory,
or end the process, and no other job is affected.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from millrace.common.framing import Framing
from millrace.text.grammar_jobs import GrammarJob, OutputGrammar, ToolCallGrammar

MAX_MESSAGE = 256 << 20  # bytes; a body is smaller, and its tokens have four bytes each


KeptTokens = Literal["all", "first", "last"]


class EncodeText(msgspec.Struct, frozen=True, tag="encode"):
    """Encode a text. most: of more token ids than that only the number is sent back, and the
    first or the last of them, if those are to be kept.
    """

    text: str
    add_special_tokens: bool
    most: int
    kept: KeptTokens = "all"


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The process has loaded what it needs."""


class Source(msgspec.Struct, frozen=True, tag="source"):
    """The source of a grammar that compiles. notes: what of its schemas binds nothing."""

    text: str
    notes: list[str] = []


class TokenIds(msgspec.Struct, frozen=True, tag="tokens"):
    """A text's tokens. ids: four bytes each, native byte order; if they are
    too many, those that are kept."""

    count: int
    ids: bytes


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The job's data is wrong: the fields of a RequestError."""

    message: str
    param: str | None = None
    code: str | None = None


Job = OutputGrammar | ToolCallGrammar | EncodeText
Answer = Ready | Source | TokenIds | Refused

job_framing: Framing[Job] = Framing(Job, MAX_MESSAGE)
answer_framing: Framing[Answer] = Framing(Answer, MAX_MESSAGE)

__all__ = [
    "Answer", "EncodeText", "GrammarJob", "Job", "KeptTokens", "Ready", "Refused", "Source",
    "TokenIds", "answer_framing", "job_framing",
]  # fmt: skip
