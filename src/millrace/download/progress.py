"""How far a download is, for people: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from contextlib import AbstractContextManager
from types import TracebackType

LINE_SECONDS = 10.0
SPEED_SECONDS = 20.0


class Progress(AbstractContextManager["Progress"]):
    """total: bytes of all files. done: how many were there at the start. Counts come from any
    thread; a thread of its own shows them on stderr."""

    def __init__(self, total: int, done: int, files: int, quiet: bool) -> None:
        self.arrived = 0
        self._total = total
        self._done = done
        self._files = files
        self._files_done = 0
        self._quiet = quiet
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._thread = threading.Thread(target=self._show, name="download-progress", daemon=True)

    def __enter__(self) -> Progress:
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if not self._quiet:
            self._thread.join(timeout=2.0)

    def add(self, count: int) -> None:
        """count: bytes that arrived; below 0, bytes that must come again."""
        with self._lock:
            self._done += count
            self.arrived += max(count, 0)

    def finished(self) -> None:
        with self._lock:
            self._files_done += 1

    def speed(self) -> float:
        """Bytes per second of the last seconds."""
        now = time.monotonic()
        with self._lock:
            self._samples.append((now, self.arrived))
            while len(self._samples) > 2 and now - self._samples[0][0] > SPEED_SECONDS:
                self._samples.popleft()
            then, count = self._samples[0]
            return (self.arrived - count) / max(now - then, 1e-3)

    def line(self) -> str:
        speed = self.speed()
        left = self._total - self._done
        eta = f", {clock(left / speed)} left" if speed > 0 and left else ""
        return (
            f"{size(self._done)} of {size(self._total)} ({self._done / max(self._total, 1):.0%}), "
            f"{self._files_done} of {self._files} files, {size(speed)}/s{eta}"
        )

    def _show(self) -> None:
        if not sys.stderr.isatty():
            while not self._ended.wait(LINE_SECONDS):
                print(self.line(), file=sys.stderr, flush=True)
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), TextColumn("{task.description}"))
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(self.line(), total=max(self._total, 1))
            while not self._ended.wait(0.25):
                bar.update(task, completed=self._done, description=self.line())


def size(count: float) -> str:
    """Bytes in decimal units, as disks and networks count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
