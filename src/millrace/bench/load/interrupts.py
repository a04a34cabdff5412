"""Signals that end a command early: what was measured until then is kept.

The first SIGINT, SIGTERM or SIGHUP asks for the end; a second one ends the process at once. This
holds inside of event loops and between them, so that a file is written whenever a signal comes.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import uvloop

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Result = TypeVar("Result")


class InterruptedRunError(Exception):
    """A run was ended before it had measured anything."""


class Interrupts:
    """A context in which signals are noted. number: the signal that came, None for none."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            # nohup ignores SIGHUP, which stays so. Shells ignore SIGINT for commands that they
            # start in the background, where somebody who sends it means it all the same.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._outside_loop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def status(self) -> int:
        """The exit status that a shell gives to the signal; 0 for none."""
        return 0 if self.number is None else 128 + self.number

    def run(self, main: Callable[[asyncio.Event], Coroutine[Any, Any, Result]]) -> Result:
        """Run `main` in an event loop. The event that it gets is set when a signal comes."""

        async def attached() -> Result:
            stop = asyncio.Event()
            if self.number is not None:
                stop.set()
            with self._in_loop(stop):
                return await main(stop)

        try:
            return uvloop.run(attached())
        finally:
            for number in self._before:
                signal.signal(number, self._outside_loop)

    @contextmanager
    def _in_loop(self, stop: asyncio.Event) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def handle(number: int) -> None:
            self._note(number)
            stop.set()

        for number in self._before:
            loop.add_signal_handler(number, handle, number)
        try:
            yield
        finally:
            for number in self._before:
                loop.remove_signal_handler(number)
                signal.signal(number, self._outside_loop)

    def _outside_loop(self, number: int, _: FrameType | None) -> None:
        self._note(number)

    def _note(self, number: int) -> None:
        if self.number is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number


async def unless_stopped(work: Coroutine[Any, Any, Result], stop: asyncio.Event | None) -> Result:
    """The result of `work`, which is cancelled when `stop` comes first.

    Raises InterruptedRunError then.
    """
    if stop is None:
        return await work
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise InterruptedRunError
        return working.result()
    finally:
        stopping.cancel()
        working.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
