"""`millrace observe` beside a run, as a process of its own, so that the load is not disturbed."""

from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path

import click
import msgspec

from millrace.bench.load.options import BenchOptions
from millrace.bench.measure.telemetry import find_replicas
from millrace.common.child_process import python_module, reap
from millrace.errors import UserError
from millrace.observe.samples.store import mark, read_meta

START_LIMIT = 60.0
STOP_LIMIT = 60.0  # seconds to write what was sampled, and its report
LOG, REPORT = "observe.log", "report.html"


class AttachedObserver:
    """A context that keeps samples in the directory of --observe, and their report behind it;
    without that option it does nothing. Raises UserError for a directory that cannot be made."""

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self._directory = Path(options.observe) if options.observe else None
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0

    async def __aenter__(self) -> AttachedObserver:
        if self._directory is None:
            return self
        self._began = time.time()
        options = self._options
        root = msgspec.structs.replace(options.target, prefix="", query="")
        urls = dict.fromkeys(map(str, (root, *await find_replicas(options))))
        if options.dcgm_url:
            urls[options.dcgm_url] = None
        command = python_module("millrace", "observe", "--out", str(self._directory))
        command += [part for url in urls for part in ("--targets", url)]
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with (self._directory / LOG).open("a") as log:
                self._process = subprocess.Popen(command, stdout=log, stderr=log)
        except OSError as error:
            raise UserError(f"--observe {self._directory}: {error.strerror}") from None
        await self._wait_started(self._directory)
        return self

    async def _wait_started(self, directory: Path) -> None:
        """Until it samples, so that the first seconds of the run are seen too. Raises UserError
        with its own words if it does not come to that."""
        assert self._process is not None
        since, limit = self._began, time.monotonic() + START_LIMIT
        while read_meta(directory).get("ended", 0.0) < since:
            if self._process.poll() is not None or time.monotonic() > limit:
                self._process.kill()
                said = (directory / LOG).read_text().strip().rpartition("\n")[2]
                raise UserError(f"--observe {directory}: it did not start: {said or 'no word'}")
            await asyncio.sleep(0.05)

    async def __aexit__(self, *_: object) -> None:
        if self._process is None:
            return
        self.mark("after")
        self._process.terminate()
        await asyncio.to_thread(reap, [self._process], STOP_LIMIT)
        assert self._directory is not None
        report = self._directory / REPORT
        done = report.exists() and report.stat().st_mtime >= self._began
        where = report if done else f"no report; {self._directory / LOG} says why"
        click.echo(f"Observed: {where}", err=True)

    def mark(self, phase: str) -> None:
        """A phase of the run begins."""
        if self._directory is not None:
            mark(self._directory, time.time(), phase)
