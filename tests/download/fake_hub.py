"""A model hub that misbehaves on request, on a port of its own, in threads of this process.

It speaks as much of the Hugging Face hub's API as a download needs: the list of a revision's files,
and `resolve`, which redirects large files to signed urls that expire.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

COMMIT = "c" * 40
MODEL = "maker/model"
PIECE = 64 << 10


@dataclass
class Faults:
    """What goes wrong. Counts go down as the faults happen.

    cut_every: a connection closes after so many bytes. no_ranges: 200 instead of 206. etags: each
    answer has another ETag for so many answers. stall: so many answers stop after a piece. drip: so
    many answers send ten bytes a second. corrupt: so many answers carry a wrong byte. expire:
    signed urls are good for so many uses. refuse: (status, headers) of the next answers. rate:
    bytes per second of each connection. wrong_range: so many answers are of another range.
    """

    cut_every: int = 0
    no_ranges: bool = False
    etags: int = 0
    stall: int = 0
    drip: int = 0
    corrupt: int = 0
    expire: int = 0
    refuse: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    rate: float = 0
    wrong_range: int = 0


@dataclass
class FakeHub:
    """url: for HF_ENDPOINT. sent: bytes of bodies by file. requests: (path, headers) of all."""

    files: dict[str, bytes]
    faults: Faults = field(default_factory=Faults)
    url: str = ""
    token: str = ""
    sent: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    uses: dict[str, int] = field(default_factory=dict)
    closing: threading.Event = field(default_factory=threading.Event)

    def take(self, name: str) -> bool:
        """Whether a counted fault happens now."""
        with self.lock:
            left = getattr(self.faults, name)
            setattr(self.faults, name, max(left - 1, 0))
            return bool(left)

    def listing(self) -> dict[str, Any]:
        return {
            "id": MODEL,
            "sha": COMMIT,
            "siblings": [_sibling(name, data) for name, data in self.files.items()],
        }


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
    if is_large(name):
        sha = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 1}
    return entry


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def large_file(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@contextmanager
def fake_hub(files: dict[str, bytes], faults: Faults | None = None) -> Iterator[FakeHub]:
    hub = FakeHub(files, faults or Faults())

    class Bound(Handler):
        shared = hub

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shared: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        with suppress(OSError):  # of a client that was killed
            self._get()

    def _get(self) -> None:
        hub = self.shared
        with hub.lock:
            hub.requests.append((self.path, dict(self.headers)))
        path = urlsplit(self.path).path  # a proxy is asked for whole urls
        if path.startswith("/api/models/"):
            self._list(path)
        elif path.startswith("/signed/"):
            self._signed(path.removeprefix("/signed/"))
        else:
            self._resolve(path)

    def _list(self, path: str) -> None:
        hub = self.shared
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, {"X-Error-Message": "a token is needed"})
        if not re.fullmatch(rf"/api/models/{MODEL}(/revision/(main|{COMMIT}))?", path):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        body = json.dumps(hub.listing()).encode()
        return self.answer(200, {"Content-Type": "application/json"}, body)

    def _resolve(self, path: str) -> None:
        hub = self.shared
        name = path.removeprefix(f"/{MODEL}/resolve/{COMMIT}/")
        if name not in hub.files:
            return self.answer(404, {})
        with hub.lock:
            refused = hub.faults.refuse.pop(0) if hub.faults.refuse else None
        if refused is not None:
            return self.answer(*refused)
        if not is_large(name):
            return self._send(name)
        with hub.lock:
            signature = f"{len(hub.uses)}"
            hub.uses[signature] = 0
        return self.answer(302, {"Location": f"/signed/{name}?signature={signature}"})

    def _signed(self, name: str) -> None:
        hub = self.shared
        signature = self.path.partition("signature=")[2]
        with hub.lock:
            hub.uses[signature] += 1
            expired = hub.faults.expire and hub.uses[signature] > hub.faults.expire
        return self.answer(403, {}) if expired else self._send(name)

    def _send(self, name: str) -> None:
        hub = self.shared
        data = hub.files[name]
        etag = f'"{random.random()}"' if hub.take("etags") else '"first"'
        start, end, status = 0, len(data), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", etag) == etag
        if wanted and same and not hub.faults.no_ranges:
            start, end, status = int(wanted[1]), int(wanted[2]) + 1, 206
        self.send_response(status)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(end - start))
        if status == 206:
            shift = 1 if hub.take("wrong_range") else 0
            self.send_header("Content-Range", f"bytes {start + shift}-{end - 1}/{len(data)}")
        self.end_headers()
        with suppress(OSError):
            self._body(name, self._damaged(data[start:end]))

    def _damaged(self, data: bytes) -> bytes:
        if len(data) > 1 and self.shared.take("corrupt"):
            middle = len(data) // 2
            return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        return data

    def _body(self, name: str, data: bytes) -> None:
        hub, sent = self.shared, 0
        stalls, drips = hub.take("stall"), hub.take("drip")
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            if drips:
                piece = piece[:1]
            self.wfile.write(piece)
            with hub.lock:
                hub.sent[name] = hub.sent.get(name, 0) + len(piece)
            sent += len(piece)
            pause = 3600 if stalls else 0.1 if drips else 0
            pause = pause or (len(piece) / hub.faults.rate if hub.faults.rate else 0)
            if pause and hub.closing.wait(pause):
                return
            if hub.faults.cut_every and sent >= hub.faults.cut_every:
                self.close_connection = True
                return

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve one model to other processes: python -m tests.download.fake_hub MEGABYTES RATE."""
    import sys

    megabytes, rate = int(sys.argv[1]), float(sys.argv[2])
    files = {"config.json": b"{}", "model.safetensors": large_file(megabytes << 20)}
    with fake_hub(files, Faults(rate=rate)) as hub:
        print(hub.url, flush=True)
        while sys.stdin.readline():
            print(json.dumps(hub.sent), flush=True)
            time.sleep(0)


if __name__ == "__main__":
    main()
