"""The batches of a server: the API's catalog, and the process that runs them, kept alive."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from millrace.batch.jobs.api import BatchApi
from millrace.batch.jobs.catalog import Catalog
from millrace.batch.jobs.settings import BatchSettings
from millrace.batch.jobs.worker import KEY_VARIABLE
from millrace.common.backoff import Backoff, BackoffPolicy
from millrace.common.child_process import child_environment, end_process, python_module
from millrace.common.tasks import restarted

_RESTARTS = BackoffPolicy(first=0.5, longest=30.0)
_END_SECONDS = 5.0


class BatchService:
    """The API of a directory, and the process that runs its batches, started again when it ends.

    settings: None where there are no batches; then there is no API, and nothing runs. Raises
    ConfigError for a directory that cannot be used.
    """

    def __init__(self, settings: BatchSettings | None, log: Callable[[str], None]) -> None:
        self._settings = settings
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self.api = None if settings is None else open_api(settings)

    @property
    def pid(self) -> int | None:
        """Of the process that runs batches now."""
        return None if self._process is None else self._process.pid

    def start(self, host: str, port: int, tls: bool, key: str | None) -> None:
        """Start it. host, port, tls, key: of the server that answers requests, which this host
        reaches at a loopback address if it listens at all of them."""
        local = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
        named = f"[{local}]" if ":" in local else local
        url = f"{'https' if tls else 'http'}://{named}:{port}"
        settings = self._settings
        if settings is not None:
            self._watch = restarted(
                "the batches", lambda: self._keep_running(settings, url, key), self._log
            )

    async def _keep_running(self, settings: BatchSettings, url: str, key: str | None) -> None:
        backoff = Backoff(_RESTARTS)
        arguments = (
            settings.directory, url, str(settings.most_in_flight), str(settings.most_bytes),
            str(os.getpid()),
        )  # fmt: skip
        while True:
            began = monotonic()
            self._process = await asyncio.create_subprocess_exec(
                *python_module("millrace.batch.jobs.worker", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                env=child_environment(**({KEY_VARIABLE: key} if key else {})),
                start_new_session=True,
            )
            status = await self._process.wait()
            pause = backoff.failed(monotonic() - began)
            self._log(f"the batches' process ended with status {status}; again in {pause:g} s")
            await asyncio.sleep(pause)

    async def stop(self) -> None:
        """End it. What it has committed stays, and goes on with the next start."""
        if self._watch is not None:
            self._watch.cancel()
        if self._process is not None:
            terminated, killed = (0.0, signal.SIGTERM), (_END_SECONDS, signal.SIGKILL)
            await end_process(self._process, terminated, killed)


def open_api(settings: BatchSettings) -> BatchApi:
    """The API of a directory. Raises ConfigError."""
    return BatchApi(Catalog(Path(settings.directory), settings.most_bytes))
