"""A server that is started for the chat and stopped with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType

from millrace.common.child_process import end_with_parent, python_module, reap
from millrace.errors import UserError

START_SECONDS = 900.0
END_SECONDS = 20.0


class OwnServer:
    """`millrace serve` with these arguments, on a free port, as a context. url: its address."""

    url: str

    def __init__(self, arguments: Sequence[str]) -> None:
        own = (
            *("--port=0", "--disable-uvicorn-access-log", "--shutdown-timeout=1"),
            *("--log-level=info", "--log-format=text"),  # _wait_ready reads it
        )
        self._command = python_module("millrace.cli", "serve", *arguments, *own)

    def __enter__(self) -> OwnServer:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        # In a session of its own, so that a Ctrl-C at the terminal reaches the chat alone.
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
        try:
            self.url = self._wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        reap([self._process], END_SECONDS)
        self._log.close()

    def _wait_ready(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            ended = self._process.poll() is not None
            self._log.seek(0)
            text = self._log.read()
            if found := re.search(r"^Millrace serves .* at (\S+)\. Try:$", text, re.MULTILINE):
                return found.group(1)
            if ended:
                last = text.strip().splitlines()[-1:] or ["it printed nothing"]
                raise UserError(f"the server did not start: {last[0]}")
            time.sleep(0.05)
        raise UserError(f"the server was not ready within {START_SECONDS:g} s")
