"""Library calls that wait for other ranks and cannot be cancelled.

A call that releases the interpreter lock runs on a thread that can be left behind. For a call that
does not, the only way out is to end the process. This module knows neither ranks nor tensors.
"""

from __future__ import annotations

import contextlib
import faulthandler
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
_POLL_SECONDS = 0.1  # seconds between calls of `check`


def run_interruptibly(call: Callable[[], T], check: Callable[[], None]) -> T:
    """Return or raise what `call` does. `check` is called meanwhile; if it raises, the wait ends.

    The call runs on another thread with this thread's GPU. If the wait ends, that thread stays
    behind.
    """
    ended: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            ended.put((call(), None))
        except BaseException as error:  # raised on the waiting thread
            ended.put((None, error))

    threading.Thread(target=run, name="interruptible-call", daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            found, error = ended.get(timeout=_POLL_SECONDS)
            if error is not None:
                raise error
            return found  # type: ignore[return-value]  # None only if T allows it
        check()


@contextmanager
def kill_process_after(seconds: float) -> Iterator[None]:
    """End this process, with its stacks on stderr, if the `with` block takes longer.

    For calls that hold the interpreter lock: the timer is a C thread, which does not need it.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
