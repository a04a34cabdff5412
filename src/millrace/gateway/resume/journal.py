"""What a client has been given of a stream, kept so that another replica can go on with it.

While the stream runs, bytes are only kept, and cut at the ends of events: a client never holds half
an event. They are parsed when a replica fails, not before. A stream is server-sent events in HTTP
chunks that end where events end, as every server of this kind writes them; for any other framing
the bytes pass as they are and the stream cannot be resumed.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

EVENT_END = b"\n\n\r\n"  # of an event, and of the chunk that carries it
_IDS = re.compile(rb',"(?:prompt_)?token_ids":(?:\[[\d, ]*\]|null)')
_IDS_KEY = b',"token_ids":['
_IDS_NAME = b"token_ids"
_MAX_TAIL = 4 << 20


def without_ids(chunk: bytes, line: int) -> bytes | None:
    """One HTTP chunk less the token ids in it, in a frame of the new size; None where they are not
    in one place. line: the length of its size line, less the line's end."""
    at = chunk.find(_IDS_KEY, line)
    end = chunk.find(b"]", at) + 1
    if at < 0 or not end or chunk.count(_IDS_NAME) != 1:
        return None
    return b"%x\r\n%b%b" % (len(chunk) - line - 4 - end + at, chunk[line + 2 : at], chunk[end:])


class Journal:
    """The raw body bytes that have gone to one client.

    strip: the client did not ask for token ids, so they are taken out on the way. broken: the
    framing is not the one that can be followed. note: keeps a piece of whole events that has taken
    another way to the client.
    """

    __slots__ = ("_measured", "_pieces", "_size", "_tail", "broken", "note", "strip")

    def __init__(self, strip: bool) -> None:
        self._pieces: list[bytes] = []
        self._tail = b""
        self._size = self._measured = 0
        self.note = self._pieces.append
        self.strip = strip
        self.broken = False

    @property
    def size(self) -> int:
        """Bytes kept."""
        new = self._pieces[self._measured :]
        self._measured += len(new)
        self._size += sum(map(len, new))
        return self._size

    def take(self, data: bytes) -> bytes:
        """Bytes have come: what of them, and of those held back, the client gets now."""
        if self._tail:
            data, self._tail = self._tail + data, b""
        if not data.endswith(EVENT_END):
            cut = data.rfind(EVENT_END)
            if cut < 0:
                return self._hold(data)
            self._tail = data[cut + 4 :]
            data = data[: cut + 4]
        self._pieces.append(data)
        return self._without_ids(data) if self.strip else data

    def rest(self, data: bytes) -> bytes:
        """The response is whole with this data: everything that the client has not got."""
        data, self._tail = self._tail + data, b""
        return self._without_ids(data) if self.strip else data

    def give_up(self) -> bytes:
        """Keep nothing any more; returns what was held back."""
        tail, self._tail = self._tail, b""
        self._pieces.clear()
        self._size = self._measured = 0
        return tail

    @property
    def raw(self) -> bytes:
        """All that the client has got, before anything was taken out."""
        return b"".join(self._pieces)

    def _hold(self, data: bytes) -> bytes:
        if len(data) < _MAX_TAIL:
            self._tail = data
            return b""
        self.broken = True
        return data

    def _without_ids(self, data: bytes) -> bytes:
        """The chunks less the token ids in them, in frames of the new size."""
        line = data.find(b"\r\n")
        try:
            alone = line + 4 + int(data[:line], 16) == len(data)
        except ValueError:
            self.broken = True
            return data
        # By far the most common: one chunk with one event, its ids in one place.
        passed = without_ids(data, line) if alone else None
        return self._each_without_ids(data) if passed is None else passed

    def _each_without_ids(self, data: bytes) -> bytes:
        """The same for any number of chunks, with prompts' ids too."""
        out: list[bytes] = []
        at = 0
        while at < len(data):
            line = data.find(b"\r\n", at)
            try:
                size = int(data[at:line], 16)
            except ValueError:
                self.broken = True
                return b"".join(out) + data[at:]
            if size == 0 or line + 4 + size > len(data):
                return b"".join(out) + data[at:]  # the end, with its trailers
            payload = _IDS.sub(b"", data[line + 2 : line + 2 + size])
            out.append(b"%x\r\n%b\r\n" % (len(payload), payload))
            at = line + 4 + size
        return b"".join(out)


class Progress(msgspec.Struct):
    """How far a stream has come, as its client knows it.

    first: the first event, for the id and the names that the rest must carry too. usage: the
    counts were told. finished: the choice has ended. done: the stream said so.
    """

    first: dict[str, Any] = {}
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []
    reasoned: bool = False
    usage: bool = False
    finished: bool = False
    done: bool = False
    lacking: bool = False

    @property
    def resumable(self) -> bool:
        """Whether what the client holds is known token by token."""
        return not self.lacking

    def note(self, event: dict[str, Any]) -> None:
        """One event has gone to the client."""
        if not self.first:
            self.first = event
        self.usage = self.usage or bool(event.get("usage") and not event.get("choices"))
        self.prompt_token_ids = event.get("prompt_token_ids") or self.prompt_token_ids
        for choice in event.get("choices") or ():
            self._note_choice(choice)

    def _note_choice(self, choice: dict[str, Any]) -> None:
        ids = choice.get("token_ids")
        delta = choice.get("delta") or {}
        said = choice.get("text") or delta.get("content")
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if ids is None:
            self.lacking = self.lacking or bool(said or thought or delta.get("tool_calls"))
        else:
            self.token_ids.extend(ids)
        self.reasoned = self.reasoned or bool(thought)
        self.prompt_token_ids = choice.get("prompt_token_ids") or self.prompt_token_ids
        self.finished = self.finished or choice.get("finish_reason") is not None


def read_progress(raw: bytes) -> Progress | None:
    """How far a stream of HTTP chunks has come; None when these are not whole chunks of events."""
    progress = Progress()
    try:
        for event in events(_unchunked(raw)):
            if event is None:
                progress.done = True
            elif "error" in event and "choices" not in event:
                return None
            else:
                progress.note(event)
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
            raise ValueError("a chunk is not whole")
        parts.append(raw[line + 2 : end])
        at = end + 2
    return b"".join(parts)


def events(text: bytes) -> list[dict[str, Any] | None]:
    """The JSON of whole server-sent events; None for [DONE]. Raises ValueError for anything else;
    comments are passed over."""
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
