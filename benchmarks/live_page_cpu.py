"""CPU time of the API server with one viewer of the live page, and with none.

The engine is the echo engine of the tests; the server takes its sample each second either way. Its
own process time is read over turns of both. Run from the checkout:
`python benchmarks/live_page_cpu.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.live_server import fake_server
from tests.support.text_model import write_text_model


def listener(port: int) -> psutil.Process:
    """The process that listens on a port."""
    found = [
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]
    return psutil.Process(found[0])


def share(process: psutil.Process, seconds: float) -> float:
    """Percent of a core that a process uses."""
    before, began = process.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after, took = process.cpu_times(), time.monotonic() - began
    return 100 * (after.user + after.system - before.user - before.system) / took


@contextmanager
def viewer(url: str) -> Iterator[None]:
    """Follow the stream of the page, once the hour that is known has been read."""
    ended = threading.Event()

    def follow() -> None:
        with httpx.stream("GET", f"{url}/dashboard/events", timeout=10) as answer:
            for _ in answer.iter_bytes():
                if ended.is_set():
                    return

    thread = threading.Thread(target=follow)
    thread.start()
    time.sleep(1.5)
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


def main() -> None:
    """Print percent of a core, turn by turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_text_model(Path(folder))
        with fake_server(model, Path(folder) / "log") as server:
            process = listener(int(server.url.rpartition(":")[2]))
            time.sleep(3.0)
            for _ in range(args.turns):
                without = share(process, args.seconds)
                with viewer(server.url):
                    watched = share(process, args.seconds)
                print(f"no viewer {without:.2f}%, one viewer {watched:.2f}% of a core", flush=True)


if __name__ == "__main__":
    main()
