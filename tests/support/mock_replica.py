"""A replica without a model: speaks the OpenAI API on a fixed beat, and misbehaves to order.

Every chunk carries the time it was sent (`sent_ns`, of `perf_counter_ns`), so a client's figures
can be held against the truth. As a `kind` "millrace" or "vllm" it says token ids where it is asked
to (`next_token`: output depends on the prompt and the position alone) and goes on from
`resume_token_ids`, or as vllm from a prompt that holds them. Also a
program: `python mock_replica.py --host H --port P`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

BEHAVIOURS = (
    "ok",
    "error",  # status 500 with an OpenAI-shaped body
    "unavailable",  # status 503
    "garbage",  # bytes that are not HTTP
    "bad_json",  # a stream whose chunks are not JSON
    "error_chunk",  # an error object in mid-stream
    "cut",  # the connection closes in mid-stream
    "silent",  # the connection closes before the first byte
    "hang",  # no answer at all
    "no_usage",  # a good stream without token counts
    "plain",  # one JSON body with a length instead of a stream
    "engine_died",  # an error of the server's own in mid-stream
)


def next_token(prompt: Sequence[int], position: int) -> int:
    """The output token at a position: every replica would say the same."""
    return 100 + (sum(prompt) * 31 + position * 7919) % 900


def word(token: int) -> str:
    """The text of a token."""
    return f"w{token} "


@dataclass
class MockReplica:
    """Answers completions with `max_tokens` tokens, `tokens_per_chunk` at a time.

    first_s and gap_s: seconds before the first chunk and between chunks. cut_after: output tokens
    after which the connection breaks off, whatever the behaviour. load: what /load says.
    """

    behaviour: str = "ok"
    first_s: float = 0.0
    gap_s: float = 0.0
    tokens_per_chunk: int = 1
    kind: str = "other"
    cut_after: int | None = None
    probe_status: int = 200
    load: dict[str, Any] | None = None
    model: str = "mock"
    name: str = "mock"
    healthy: bool = True
    port: int = 0
    load_questions: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    connections: int = 0
    probes: int = 0
    disconnects: int = 0

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> MockReplica:
        self._server = await asyncio.start_server(self._serve, host, port)
        self.port = self._server.sockets[0].getsockname()[1]
        self._writers: set[asyncio.StreamWriter] = set()
        return self

    async def stop(self) -> None:
        self._server.close()
        self.abort_connections()
        await asyncio.sleep(0)

    def abort_connections(self) -> None:
        """Drop every connection, in the middle of what it carries."""
        for writer in list(self._writers):
            writer.transport.abort()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.disconnects += 1
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return False
        start, *lines = head.strip().split("\r\n")
        method, path, _ = start.split(" ")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if method == "GET":
            self._get(path, writer)
        elif "x-millrace-probe" in headers:
            self.probes += 1
            self._plain(writer, self.probe_status, {"choices": []})
        else:
            self.headers.append(headers)
            self.bodies.append(json.loads(body))
            await self._complete(path, json.loads(body), writer)
        await writer.drain()
        return not writer.is_closing()

    def _get(self, path: str, writer: asyncio.StreamWriter) -> None:
        if path == "/health":
            status, answer = (200, {}) if self.healthy else (503, {"error": {"message": "warming"}})
        elif path == "/v1/models":
            card = {"id": self.model, "object": "model", "vocab_size": 500}
            card["owned_by"] = self.kind
            status, answer = 200, {"object": "list", "data": [card]}
        elif path.partition("?")[0] == "/load" and self.load is not None:
            self.load_questions.append(path)
            status, answer = 200, self.load
        elif path == "/metrics":
            self._text(writer, "# HELP mock_up Whether.\n# TYPE mock_up gauge\nmock_up 1\n")
            return
        else:
            status, answer = 404, {"error": {"message": f"no {path}"}}
        self._plain(writer, status, answer)

    def _text(self, writer: asyncio.StreamWriter, text: str) -> None:
        writer.write(f"HTTP/1.1 200 X\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())

    def _plain(self, writer: asyncio.StreamWriter, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nX-Replica: {self.name}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    async def _complete(
        self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        if self.behaviour == "error":
            error = {"message": "the model fell over", "type": "server_error"}
            self._plain(writer, 500, {"error": error})
        elif self.behaviour == "unavailable":
            self._plain(writer, 503, {"error": {"message": "draining"}})
        elif self.behaviour == "plain":
            self._plain(writer, 200, {"choices": [{"text": self.name, "finish_reason": "stop"}]})
        elif self.behaviour == "garbage":
            writer.write(b"\x00\x01 this is no HTTP \xff\r\n\r\n")
        elif self.behaviour == "silent":
            writer.transport.abort()
        elif self.behaviour == "hang":
            await asyncio.sleep(3600)
        elif self.kind != "other":
            await TokenStream(self, path, body, writer).run()
        else:
            await self._stream(path, body, writer)

    async def _stream(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"X-Replica: " + self.name.encode() + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chat = "chat" in path
        total, sent = body["max_tokens"], 0
        if chat:
            self._event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        while sent < total:
            await asyncio.sleep(self.first_s if sent == 0 else self.gap_s)
            await writer.drain()
            if self.behaviour == "cut" and sent >= total // 2:
                writer.transport.abort()
                return
            if self.behaviour == "bad_json":
                self._chunk(writer, b"data: {not json\n\n")
            if self.behaviour == "error_chunk" and sent:
                self._event(writer, {"error": {"message": "out of memory"}})
            sent = min(total, sent + self.tokens_per_chunk)
            finish = "length" if sent == total else None
            choice = {"delta": {"content": "x "}} if chat else {"text": "x "}
            self._event(writer, {"choices": [{**choice, "finish_reason": finish}]})
        if self.behaviour != "no_usage":
            prompt = body.get("prompt") or body["messages"][0]["content"].split()
            usage = {"prompt_tokens": len(prompt), "completion_tokens": sent}
            self._event(writer, {"choices": [], "usage": usage})
        self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        event = {"sent_ns": perf_counter_ns(), "replica": self.name, **event}
        self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


class TokenStream:
    """A stream that says its token ids, as those servers word it that can be resumed."""

    def __init__(
        self, replica: MockReplica, path: str, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        self._replica = replica
        self._writer = writer
        self._body = body
        self._chat = "chat" in path
        self._ids = bool(body.get("return_token_ids"))
        said = body.get("prompt") or body["messages"][0]["content"]
        prompt = [len(w) for w in said.split()] if isinstance(said, str) else list(said)
        self._done: list[int] = list(body.get("resume_token_ids") or ())
        if replica.kind == "vllm":
            self._done = []
            # Output ids are at least 100, prompt ids of tests below: so it knows where it is.
            made = next((i for i, t in enumerate(prompt) if t >= 100), len(prompt))
            self._before, self._prompt = prompt[made:], prompt[:made]
        else:
            self._before, self._prompt = self._done, prompt
        self._limit = body.get("max_tokens") or 16
        if replica.kind == "vllm":
            self._limit += len(self._before)
        self._id = f"{'chat' if self._chat else ''}cmpl-{replica.name}"

    async def run(self) -> None:
        replica, writer = self._replica, self._writer
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"X-Replica: " + replica.name.encode() + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        at, said = len(self._before), 0
        while at < self._limit:
            await asyncio.sleep(replica.first_s if not said else replica.gap_s)
            await writer.drain()
            if replica.cut_after is not None and said >= replica.cut_after:
                writer.transport.abort()
                return
            if replica.behaviour == "engine_died" and said:
                error = {"error": {"message": "gone", "type": "x", "code": "engine_dead"}}
                replica._chunk(writer, b"data: " + json.dumps(error).encode() + b"\n\n")
                replica._chunk(writer, b"data: [DONE]\n\n")
                writer.write(b"0\r\n\r\n")
                return
            count = min(replica.tokens_per_chunk, self._limit - at)
            tokens = [next_token(self._prompt, at + i) for i in range(count)]
            at += count
            self._tokens(tokens, said == 0, at == self._limit)
            said += count
        if (self._body.get("stream_options") or {}).get("include_usage"):
            prompt = len(self._prompt)
            made = at
            if replica.kind == "vllm":
                prompt, made = prompt + len(self._before), at - len(self._before)
            counts = {"prompt_tokens": prompt, "completion_tokens": made}
            self._event({"choices": [], "usage": {**counts, "total_tokens": prompt + made}})
        replica._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")

    def _tokens(self, tokens: list[int], first: bool, last: bool) -> None:
        text = "".join(map(word, tokens))
        choice: dict[str, Any] = {"index": 0}
        if self._chat:
            choice["delta"] = {**({"role": "assistant"} if first else {}), "content": text}
        else:
            choice["text"] = text
        choice["finish_reason"] = "length" if last else None
        event: dict[str, Any] = {"choices": [choice]}
        if self._ids:
            choice["token_ids"] = tokens
            if first:
                (event if self._chat else choice)["prompt_token_ids"] = self._prompt + (
                    self._before if self._replica.kind == "vllm" else []
                )
        self._event(event)

    def _event(self, event: dict[str, Any]) -> None:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        whole = {"id": self._id, "object": kind, "created": 1, "model": "mock", **event}
        data = json.dumps(whole, separators=(",", ":")).encode()
        self._replica._chunk(self._writer, b"data: " + data + b"\n\n")


class ScriptedServer:
    """Answers every request with fixed bytes, written in the given pieces, then closes if told.

    Keeps the connection open after each answer unless `close` is set.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        close: bool = False,
        pause_s: float = 0.0,
        card: dict[str, Any] | None = None,
    ):
        self.pieces, self.close, self.pause_s = list(pieces), close, pause_s
        self._models = json.dumps({"data": [card]}).encode() if card else b""
        self.requests: list[bytes] = []

    async def start(self) -> ScriptedServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        self._server.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                body = await reader.readexactly(length)
                if head.startswith(b"GET /health") or (
                    b"X-Millrace-Probe" in head and not (self._models and b"/v1/models" in head)
                ):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    continue
                if head.startswith(b"GET /v1/models") and self._models:
                    length = len(self._models)
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length)
                    writer.write(self._models)
                    continue
                self.requests.append(head + body)
                for piece in self.pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(self.pause_s)
                if self.close:
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def _chatter(kilobytes: int) -> None:
    """Write so many lines of 1 KB every 50 ms."""
    while kilobytes:
        print(("x" * 1023 + "\n") * kilobytes, end="", flush=True)
        await asyncio.sleep(0.05)


async def _main(options: argparse.Namespace) -> None:
    if options.fail:
        raise SystemExit(f"error: {options.fail}")
    if options.threads_file:
        with open(options.threads_file, "a") as file:
            file.write(f"{os.environ.get('OMP_NUM_THREADS')} {os.getpid()}\n")
    await asyncio.sleep(options.start_after)
    replica = MockReplica(
        behaviour=options.behaviour,
        first_s=options.first,
        gap_s=options.gap,
        name=str(os.getpid()),
        kind=options.kind,
    )
    await replica.start(options.host, options.port)
    print(f"mock replica {os.getpid()} ready on {replica.port}", flush=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    chatter = asyncio.create_task(_chatter(options.chatter))
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    await stop.wait()
    chatter.cancel()
    os._exit(0)  # streams under way end here, without a word from asyncio


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--behaviour", choices=BEHAVIOURS, default="ok")
    parser.add_argument("--first", type=float, default=0.0)
    parser.add_argument("--gap", type=float, default=0.0)
    parser.add_argument("--kind", default="other")
    parser.add_argument("--start-after", type=float, default=0.0)
    parser.add_argument("--fail", help="exit with this message instead of serving")
    parser.add_argument("--threads-file", help="append OMP_NUM_THREADS and the pid to this file")
    parser.add_argument("--chatter", type=int, default=0, help="KB written every 50 ms")
    parser.add_argument("--ignore-sigterm", action="store_true")
    # What else `millrace serve` is told (the model, --replicas) is of no concern here.
    asyncio.run(_main(parser.parse_known_args()[0]))
