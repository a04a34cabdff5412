"""Ends a process whose ranks have failed while it is in a call that never returns.

A kernel that waits for a failed rank, or a driver call that waits for such a kernel, cannot be
cancelled. Waits that notice the failure themselves get time to raise first.
"""

from __future__ import annotations

import atexit
import logging
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType

from millrace.common.safe_log import exit_at_once

log = logging.getLogger("millrace.engine")

STUCK_LIMIT = 5.0  # seconds for a wait to notice by itself that the ranks have failed
EXIT_LIMIT = 10.0  # seconds for interpreter exit, once the ranks have failed
RANK_FAILED = 3  # exit status of a process whose group has failed
_POLL_SECONDS = 0.1


def end(why: str) -> None:
    """End this process, with the reason as its last log line."""
    log.error("%s", why)
    exit_at_once(RANK_FAILED)


def limit_exit() -> None:
    """Limit the time of interpreter exit: what is freed then may wait for the GPU."""
    atexit.unregister(_set_exit_alarm)
    atexit.register(_set_exit_alarm)


def _set_exit_alarm() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, EXIT_LIMIT)


class HangGuard:
    """A context manager around calls that may wait for other ranks; one thread at a time.

    end: called with the reason if that thread is still in the same `with` block STUCK_LIMIT seconds
    after the group has failed. Otherwise nothing happens: the next call raises.
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
        threading.Thread(target=self._end_if_stuck, args=[why], daemon=True).start()

    def _end_if_stuck(self, why: str) -> None:
        deadline, entered = time.monotonic() + STUCK_LIMIT, self._entered
        while entered is not None and self._entered is entered:
            if time.monotonic() > deadline:
                self._end(why)
                return
            time.sleep(_POLL_SECONDS)
