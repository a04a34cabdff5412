"""Serves the live page with figures that a test makes up, for any number of replicas."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from millrace.dashboard.files import EVENTS_PATH, HEADERS, HISTORY_PATH, file_at
from millrace.dashboard.history import History, json_list
from millrace.dashboard.sample import Sample, of_replicas
from millrace.dashboard.stream import Cursor, Event, Feed, ReplicaRow

PAST = 600  # seconds that are known already
EVERY = 0.25  # seconds between two messages


def made_up(at: int, index: int) -> Sample:
    """A second of a replica that is busy in waves."""
    wave = 0.5 + 0.5 * math.sin(at / 40 + index)
    return Sample(
        at=at, tokens_in=round(4000 * wave), tokens_out=round(900 * wave + 100),
        running=round(40 * wave), waiting=max(0, round(20 * wave - 15)),
        pages=(round(900 * wave), 1000), states=(20 + index % 40, 64),
        queries=4000, hits=round(2600 * wave), drafts=400, draft_tokens=1200,
        accepted=[round(300 + 40 * wave), 180, 90],
        steps=[30, 0.6, 0.1 * wave, 1, 0.05, 0, 6, 0.3, 0.02],
        ttft=[(8, 2), (11, round(3 + 9 * wave)), (15, 1)], itl=[(6, 300), (8, 80), (12, 4)],
        tpot=[(5, 4), (7, 9)], power=round(400 + 280 * wave), clock=1755, ended=4,
    )  # fmt: skip


class PageServer:
    """replicas: their states by id, which a test may change. rejected: keys are needed, and this
    one is right."""

    def __init__(self, replicas: int, key: str = "") -> None:
        self.states = ["up"] * replicas
        self.key = key
        self.events: list[Event] = []
        self.history = History()
        about = {"kind": "gateway", "name": "gateway, prefix_aware", "version": "0"}
        self._feed = Feed("life", about, self.history)
        self._now = int(time.time())
        for at in range(self._now - PAST, self._now):
            self.history.add(of_replicas(at, [made_up(at, index) for index in range(8)]))

    def change(self, id: int, state: str, text: str = "") -> None:
        """A replica changes its state."""
        self.states[id] = state
        self.events.append(Event(len(self.events) + 1, time.time(), state, str(id), text))

    def rows(self) -> list[ReplicaRow]:
        now = int(time.time())
        return [
            ReplicaRow(
                id, str(id), state, "connection refused" if state == "down" else "",
                None if state == "down" else msgspec.Raw(msgspec.json.encode(made_up(now, id))),
            )
            for id, state in enumerate(self.states)
        ]  # fmt: skip

    def message(self, cursor: Cursor) -> tuple[bytes, Cursor]:
        return self._feed.message(cursor, self.events, self.rows())

    def one(self, id: int) -> bytes:
        """The history of one replica, in samples of five seconds."""
        times = range(self._now - PAST, self._now, 5)
        rows = [msgspec.json.encode(made_up(at, id)) for at in times]
        return bytes(json_list(rows))


@contextlib.contextmanager
def page_server(replicas: int, key: str = "") -> Iterator[tuple[PageServer, str]]:
    """The page, and its URL."""
    made, ended = PageServer(replicas, key), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            found = file_at(path)
            if found is not None:
                self._send(200, found.body, found.media_type)
            elif key and self.headers.get("Authorization") != f"Bearer {key}":
                self._send(401, b"", "text/plain")
            elif path == HISTORY_PATH:
                body = made.one(int(query.removeprefix("id=")))
                self._send(200, body, "application/json")
            elif path == "/cache/explain":
                self._send(200, b'{"requests": []}', "application/json")
            elif path == EVENTS_PATH:
                self._stream()
            else:
                self._send(404, b"", "text/plain")

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            for name, value in (*HEADERS, ("Content-Type", kind)):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def _stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            cursor = Cursor()
            with contextlib.suppress(OSError):
                while not ended.is_set():
                    message, cursor = made.message(cursor)
                    self.wfile.write(message)
                    ended.wait(EVERY)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
