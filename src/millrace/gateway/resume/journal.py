"""The bytes of a stream that a client has received, kept so that another replica can resume it.

While the stream runs, bytes are only kept, and cut at the ends of events: a client never has half
an event. They are parsed when a replica fails, not before. The framing must be server-sent events
in HTTP chunks that end where events end; with any other framing the bytes pass unchanged and the
stream cannot be resumed.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

EVENT_END = b"\n\n\r\n"  # the end of an event and of its HTTP chunk
_IDS = re.compile(rb',"(?:prompt_)?token_ids":(?:\[[\d, ]*\]|null)')
_IDS_KEY = b',"token_ids":['
_IDS_NAME = b"token_ids"
_SIZE_LINE = re.compile(rb"[0-9A-Fa-f]{1,8}\r?")
_MAX_TAIL = 256 << 10  # bytes of a chunk that may be held back


def strip_token_ids(chunk: bytes, line: int) -> bytes | None:
    """One HTTP chunk without its token ids, reframed; None unless they are in exactly one place.

    line: length of its size line, without the line end.
    """
    at = chunk.find(_IDS_KEY, line)
    end = chunk.find(b"]", at) + 1
    if at < 0 or not end or chunk.count(_IDS_NAME) != 1:
        return None
    return b"%x\r\n%b%b" % (len(chunk) - line - 4 - end + at, chunk[line + 2 : at], chunk[end:])


class Journal:
    """The raw body bytes that have gone to one client.

    strip: the client did not ask for token ids, so they are removed. unsupported_framing: the
    stream cannot be resumed. append: keeps a piece that the fast path has sent.
    """

    __slots__ = ("_measured", "_pieces", "_size", "_tail", "append", "strip", "unsupported_framing")

    def __init__(self, strip: bool) -> None:
        self._pieces: list[bytes] = []
        self._tail = b""
        self._size = self._measured = 0
        self.append = self._pieces.append
        self.strip = strip
        self.unsupported_framing = False

    @property
    def size(self) -> int:
        """Bytes kept."""
        new = self._pieces[self._measured :]
        self._measured += len(new)
        self._size += sum(map(len, new))
        return self._size

    def feed(self, data: bytes) -> bytes:
        """Bytes have come: returns the bytes for the client now. That is all of them, but for the
        beginning of a chunk whose rest is on its way."""
        if self.unsupported_framing:
            return data
        if self._tail:
            data, self._tail = self._tail + data, b""
        if not data.endswith(EVENT_END):
            cut = data.rfind(EVENT_END) + len(EVENT_END)
            cut = cut if cut >= len(EVENT_END) else 0
            rest = data[cut:]
            if not _is_cut_chunk(rest):
                self.unsupported_framing = True
                return self._accept(data[:cut]) + rest
            self._tail, data = rest, data[:cut]
        return self._accept(data)

    @property
    def holds_back(self) -> bool:
        """Whether the client has not got all bytes that have come."""
        return bool(self._tail)

    def _accept(self, data: bytes) -> bytes:
        """Keep complete events; returns them for the client."""
        if not data:
            return b""
        self._pieces.append(data)
        return self._strip_token_ids(data) if self.strip else data

    def finish(self, data: bytes) -> bytes:
        """The response is complete: returns all bytes that the client has not got."""
        data, self._tail = self._tail + data, b""
        return self._strip_token_ids(data) if self.strip else data

    def discard(self) -> bytes:
        """Drop everything; returns the bytes that the client has not got."""
        tail, self._tail = self._tail, b""
        self._pieces.clear()
        self._size = self._measured = 0
        return tail

    @property
    def raw(self) -> bytes:
        """All that the client has received, with the token ids that were removed."""
        return b"".join(self._pieces)

    def _strip_token_ids(self, data: bytes) -> bytes:
        """The chunks without their token ids, reframed."""
        line = data.find(b"\r\n")
        try:
            alone = line + 4 + int(data[:line], 16) == len(data)
        except ValueError:
            self.unsupported_framing = True
            return data
        # The common case: one chunk with one event, its ids in one place.
        passed = strip_token_ids(data, line) if alone else None
        return self._strip_each_chunk(data) if passed is None else passed

    def _strip_each_chunk(self, data: bytes) -> bytes:
        """The same for any number of chunks, and for the prompt's ids."""
        out: list[bytes] = []
        at = 0
        while at < len(data):
            line = data.find(b"\r\n", at)
            try:
                size = int(data[at:line], 16)
            except ValueError:
                self.unsupported_framing = True
                return b"".join(out) + data[at:]
            if size == 0 or line + 4 + size > len(data):
                return b"".join(out) + data[at:]  # the end, with its trailers
            payload = _IDS.sub(b"", data[line + 2 : line + 2 + size])
            out.append(b"%x\r\n%b\r\n" % (len(payload), payload))
            at = line + 4 + size
        return b"".join(out)


def _is_cut_chunk(data: bytes) -> bool:
    """Whether this is the beginning of one chunk, without a complete event in it: TCP has cut it,
    and the rest is on its way. Anything else is a framing that cannot be followed."""
    line = data.find(b"\r\n")
    if line < 0:
        return _SIZE_LINE.fullmatch(data) is not None
    if not _SIZE_LINE.fullmatch(data, 0, line):
        return False
    size = int(data[:line], 16)
    if size == 0:  # the last chunk, perhaps with trailers
        return len(data) <= _MAX_TAIL
    return len(data) < line + 4 + size <= _MAX_TAIL and b"\n\n" not in data[line + 2 : -2]


class Progress(msgspec.Struct):
    """How far a stream has come, as its client knows it.

    first_event: for the id and the names that later events repeat. usage: whether the usage was
    sent. finished: the choice has ended. done: [DONE] was sent. missing_ids: text came without
    token ids.
    """

    first_event: dict[str, Any] = {}
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []
    has_reasoning: bool = False
    usage: bool = False
    finished: bool = False
    done: bool = False
    missing_ids: bool = False

    @property
    def resumable(self) -> bool:
        """Whether all text that the client has is known by its token ids."""
        return not self.missing_ids

    def record(self, event: dict[str, Any]) -> None:
        """An event has been sent to the client."""
        if not self.first_event:
            self.first_event = event
        self.usage = self.usage or bool(event.get("usage") and not event.get("choices"))
        self.prompt_token_ids = event.get("prompt_token_ids") or self.prompt_token_ids
        for choice in event.get("choices") or ():
            self._record_choice(choice)

    def _record_choice(self, choice: dict[str, Any]) -> None:
        ids = choice.get("token_ids")
        delta = choice.get("delta") or {}
        said = choice.get("text") or delta.get("content")
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if ids is None:
            self.missing_ids = self.missing_ids or bool(said or thought or delta.get("tool_calls"))
        else:
            self.token_ids.extend(ids)
        self.has_reasoning = self.has_reasoning or bool(thought)
        self.prompt_token_ids = choice.get("prompt_token_ids") or self.prompt_token_ids
        self.finished = self.finished or choice.get("finish_reason") is not None


def parse_progress(raw: bytes) -> Progress | None:
    """How far a stream of HTTP chunks has come; None if these are not complete chunks of events."""
    progress = Progress()
    try:
        for event in parse_events(_unchunked(raw)):
            if event is None:
                progress.done = True
            elif "error" in event and "choices" not in event:
                return None
            else:
                progress.record(event)
    except ValueError:  # msgspec's errors are such
        return None
    return progress


def _unchunked(raw: bytes) -> bytes:
    parts, at = [], 0
    while at < len(raw):
        line = raw.index(b"\r\n", at)
        size = int(raw[at:line].partition(b";")[0], 16)
        end = line + 2 + size
        if raw[end : end + 2] != b"\r\n":
            raise ValueError("a chunk is incomplete")
        parts.append(raw[line + 2 : end])
        at = end + 2
    return b"".join(parts)


def parse_events(text: bytes) -> list[dict[str, Any] | None]:
    """The JSON of complete server-sent events; None for [DONE]. Comments are skipped. Raises
    ValueError for anything else."""
    found: list[dict[str, Any] | None] = []
    for block in text.split(b"\n\n"):
        for line in block.split(b"\n"):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                found.append(None)
            else:
                found.append(msgspec.json.decode(data, type=dict[str, Any]))
    return found
