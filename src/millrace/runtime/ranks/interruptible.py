"""Calls of libraries that wait for other ranks and cannot be told to stop.

Where one lets other threads run, it is made on a thread that can be left behind; where it does not,
all that is left is to end the process. Knows neither ranks nor tensors.
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
_GLANCE = 0.1  # seconds between looks at whether the wait still makes sense


def run_interruptibly(call: Callable[[], T], check: Callable[[], None]) -> T:
    """What `call` returns or raises. `check` is called all along; what it raises ends the wait.

    The call runs on a thread of its own, on this thread's GPU, and is left behind then.
    """
    ended: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            ended.put((call(), None))
        except BaseException as error:  # it belongs to the thread that waits
            ended.put((None, error))

    threading.Thread(target=run, name="apart", daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            found, error = ended.get(timeout=_GLANCE)
            if error is not None:
                raise error
            return found  # type: ignore[return-value]  # None only where T has it
        check()


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """End this process, its stacks written to stderr, if what is within takes longer than that.

    For calls that hold Python's lock: a clock of C's own counts.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
