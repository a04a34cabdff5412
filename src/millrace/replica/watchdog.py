"""Ends an engine that hangs in one step, after it has written down the stacks of all threads.

The timer is a C thread that needs no interpreter lock. So it also notices a kernel, a collective or
a driver call that never returns. It knows nothing of what a step does.
"""

from __future__ import annotations

import faulthandler
import re
from pathlib import Path

REPORT = "stuck"  # name of the file in the directory that engine and server share


class Watchdog:
    """limit: most seconds between two beats; 0: no limit. report: the file for the stacks."""

    def __init__(self, limit: float, report: Path) -> None:
        self._limit = limit
        self._file = report.open("w", encoding="utf-8")
        self._due = 0.0

    def beat(self, now: float) -> None:
        """Restart the timer. now: seconds on the monotonic clock. Cheap enough for every step."""
        if self._limit and now >= self._due:
            faulthandler.dump_traceback_later(self._limit, exit=True, file=self._file)
            self._due = now + min(1.0, self._limit / 10)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()


def where(report: str) -> str:
    """Where the main thread was, in a few words. faulthandler writes that thread last."""
    main = report.rpartition("Thread ")[2]
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', main)
    if not frames:
        return "at an unknown place"
    file, line, function = frames[0]
    place = f"at {Path(file).name}:{line} in {function}"
    ours = next((f for f in frames if "/millrace/" in f[0]), frames[0])
    if ours == frames[0]:
        return place
    return f"{place}, called from {Path(ours[0]).name}:{ours[1]} in {ours[2]}"
