"""The last resort for a process whose ranks have failed while it is in a call that never returns.

A kernel that waits for a rank that is gone, or a driver that waits for that kernel, cannot be told
to stop from here. Waits that can notice by themselves do, and are given time to.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType

log = logging.getLogger("millrace.engine")

STUCK_LIMIT = 5.0  # seconds to notice by oneself that the ranks have failed
EXIT_LIMIT = 10.0  # seconds for Python's own end, once the ranks have failed
RANK_FAILED = 3  # exit status of a process whose group has failed
_GLANCE = 0.1


def end(why: str) -> None:
    """End this process with the reason as its last line."""
    log.error("%s", why)
    os._exit(RANK_FAILED)


def limit_exit() -> None:
    """Have this process end soon after its program: what it frees then may wait for the GPU."""
    atexit.unregister(_end_soon)
    atexit.register(_end_soon)


def _end_soon() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, EXIT_LIMIT)


class HangGuard:
    """What is within it may wait for other ranks, by one thread at a time.

    end: is told the reason if that thread is still within the same `with` STUCK_LIMIT seconds after
    the group has failed. Work that is elsewhere then is left alone: it learns at its next call.
    """

    def __init__(self, end: Callable[[str], None] = end) -> None:
        self._end = end
        self._entered: object | None = None

    def __enter__(self) -> None:
        self._entered = object()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered = None

    def failed(self, why: str) -> None:
        """The group has failed; returns at once."""
        limit_exit()
        threading.Thread(target=self._see_out, args=[why], daemon=True).start()

    def _see_out(self, why: str) -> None:
        deadline, entered = time.monotonic() + STUCK_LIMIT, self._entered
        while entered is not None and self._entered is entered:
            if time.monotonic() > deadline:
                self._end(why)
                return
            time.sleep(_GLANCE)
