"""The server's side of an engine: requests go in, streams of deltas come out.

The client notices at once when the engine process ends or falls silent, and then fails every open
stream with one clear error. It outlives its engine: `restart` starts another one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Literal

import msgspec

from millrace.config import EngineArgs
from millrace.errors import UserError
from millrace.protocol import (
    Abort,
    AddRequest,
    Delta,
    EngineStats,
    Failed,
    FromEngine,
    Outputs,
    Ready,
    ResetPrefixCache,
    SetPaused,
    Shutdown,
)
from millrace.server.engine_link import request_record
from millrace.server.engine_link.link import EngineLink
from millrace.server.engine_link.process import ENGINE_PROGRAM
from millrace.server.engine_link.stream import Stream
from millrace.server.telemetry.cache_reports import CacheReports
from millrace.server.telemetry.metrics import RequestMetrics
from millrace.server.telemetry.prefix_report import PrefixReporter

logger = logging.getLogger(__name__)

# The engine's own watchdog reports where a step hangs, so the server waits longer than it does.
SILENCE_FACTOR, SILENCE_EXTRA = 1.25, 5.0


class EngineDeadError(Exception):
    """The engine process has ended or cannot go on; the message says why."""


class EngineClient:
    """One engine after another and the requests that are open in it.

    ready: the engine's Ready message, None before. on_ready: called with each. died: why the engine
    ended, None while it runs. stats: its latest figures. cache_reports: why prompts were not
    cached. prefix_reporter: hashes of the prompts that were sent to it.
    draining: new requests are refused. refusal: why they are although the server does not stop:
    paused or asleep; None while they are not. stream_interval: tokens that a stream's reader waits
    for.
    """

    def __init__(self, metrics: RequestMetrics, stream_interval: int = 1) -> None:
        self.ready: Ready | None = None
        self.on_ready: Callable[[Ready], None] = lambda _: None
        self.died: Exception | None = None
        self.stats = EngineStats()
        self.prefix_reporter = PrefixReporter()
        self.cache_reports = CacheReports()
        self.draining = False
        self.refusal: Literal["paused", "asleep"] | None = None
        self._metrics = metrics
        self._stream_interval = stream_interval
        self._streams: dict[str, Stream] = {}
        self._changed = asyncio.Event()  # set once the engine is ready or dead, again once dead
        self._silent_seconds = 0
        self._kill_reason: str | None = None
        self._silence_watch: asyncio.Task[None] | None = None  # once there is a process

    async def start(self, args: EngineArgs, program: Sequence[str] = ENGINE_PROGRAM) -> None:
        """Start the engine process; it loads while this returns."""
        self._args, self._program = args, program
        self.prefix_reporter.enabled = args.enable_prefix_caching
        self._link = EngineLink(self._on_message_from_engine, self._on_process_end)
        await self._link.start(args, program)
        self._silence_watch = asyncio.get_running_loop().create_task(self._watch_silence())

    async def restart(self) -> None:
        """Start another engine in place of one that has died; this one may die at once."""
        assert self.died is not None
        await self._link.stop()
        self._metrics.restarts += 1
        await self.start_engine()

    async def wait_ready(self) -> Ready:
        """Wait for the engine's first real step. Raises UserError or EngineDeadError."""
        await self._changed.wait()
        if self.died is not None:
            raise self.died
        assert self.ready is not None
        return self.ready

    async def wait_died(self) -> Exception:
        """Wait for the engine's unexpected end; returns the reason."""
        while self.died is None:
            self._changed.clear()
            await self._changed.wait()
        return self.died

    @property
    def healthy(self) -> bool:
        """Whether new requests are served."""
        loaded = self.ready is not None and self.died is None
        return loaded and not self.draining and self.refusal is None

    @property
    def role(self) -> Literal["prefill", "decode", "both"] | None:
        """Of the engine, in serving prompts and answers apart."""
        return self._args.role

    @property
    def open_requests(self) -> int:
        return len(self._streams)

    @property
    def open_tokens(self) -> int:
        """Tokens of open requests: their prompts, and what they have generated so far."""
        return sum(stream.prompt_len + stream.generated_tokens for stream in self._streams.values())

    def open(self, request: AddRequest, stream_interval: int | None = None) -> Stream:
        """Hand a request to the engine. Whoever opens a stream closes it.

        stream_interval: tokens that its reader waits for, if they are more than usual.
        """
        interval = max(self._stream_interval, stream_interval or 1)
        seen = request_record.current.get()
        if seen is not None and seen.background:
            request = msgspec.structs.replace(request, background=True)
        stream = Stream(request, self._metrics, interval)
        if seen is not None:
            seen.streams.append(stream)
        if self.died is not None:
            stream.engine_died(EngineDeadError(str(self.died)))
            return stream
        if self.refusal is not None:  # since the request was checked; it would not end
            stream.put(Delta(request.id, [], "abort"), monotonic())
            return stream
        self._streams[request.id] = stream
        self._link.send(request)
        return stream

    def close(self, stream: Stream) -> None:
        """Close a stream; if it has not ended, the engine aborts its request."""
        if self._streams.pop(stream.id, None) is not None and not stream.ended:
            stream.abandon()
            self._link.send(Abort([stream.id]))

    def record_prompt(self, streams: Sequence[Stream]) -> None:
        """Record a prompt whose outputs have all ended. streams: of all of its outputs."""
        if all(stream.finish_reason in ("stop", "length") for stream in streams):
            self._metrics.n.observe(len(streams))
            self._metrics.longest_output.observe(max(s.generated_tokens for s in streams))

    def fail_all(self, error: Exception) -> None:
        """Give every open request this error."""
        for stream in self._streams.values():
            stream.fail(error)

    def reset_prefix_cache(self) -> None:
        """Have the engine forget every cached prefix that no request uses."""
        if self.died is None:
            self._link.send(ResetPrefixCache())
            self.prefix_reporter.clear()

    def abort_all(self) -> None:
        """End every open request, each with the finish reason `abort`."""
        now = monotonic()
        open_ids = [stream.id for stream in self._streams.values() if not stream.ended]
        for request_id in open_ids:
            self._streams[request_id].put(Delta(request_id, [], "abort"), now)
        if open_ids:
            self._link.send(Abort(open_ids))

    def set_engine_paused(self, paused: bool) -> None:
        """Have the engine run no further step, or go on; its figures then say so."""
        if self.died is None:
            self._link.send(SetPaused(paused))

    async def end_engine(self) -> None:
        """End the engine's process, in order or by force, and keep the server: `start_engine`
        starts another. No request is open."""
        self.ready = None
        self._changed.clear()
        self._link.send(Shutdown())
        await self._link.stop()
        self.stats = EngineStats()
        self.prefix_reporter.clear()

    async def start_engine(self) -> None:
        """Start an engine in place of one that has ended; it loads while this returns."""
        self.ready = self.died = None
        self._silent_seconds = 0
        self._kill_reason = None
        self._changed.clear()
        self._link = EngineLink(self._on_message_from_engine, self._on_process_end)
        try:
            await self._link.start(self._args, self._program)
        except OSError as error:
            self._die(EngineDeadError(f"the engine could not be started: {error}"))

    async def stop(self) -> None:
        """End the engine, by force if it must be, and remove what `start` made."""
        self.draining = True
        if self._silence_watch is not None:
            self._silence_watch.cancel()
        self._link.send(Shutdown())
        await self._link.stop()

    def _on_message_from_engine(self, message: FromEngine) -> None:
        self._silent_seconds = 0
        if isinstance(message, Outputs):
            self.stats = _with_loads(message.stats, self.stats)
            self.prefix_reporter.moved(message.moved)
            now = monotonic()
            for delta in message.deltas:
                stream = self._streams.get(delta.id)
                if stream is not None:  # None: closed here while the delta was under way
                    stream.put(delta, now)
        elif isinstance(message, Ready):
            self.ready = message
            self.on_ready(message)
            self._changed.set()
        else:
            self._die(_failure(message))

    def _on_process_end(self, reason: str) -> None:
        self._die(EngineDeadError(self._kill_reason or reason))

    async def _watch_silence(self) -> None:
        """Kill an engine that sends nothing for longer than its own watchdog would allow.

        Seconds are counted one by one in this loop: time in which the server itself was stopped
        does not count.
        """
        limit = self._args.step_timeout
        if not limit:
            return
        while True:
            await asyncio.sleep(1.0)
            if self.ready is None or self.died is not None:
                continue
            self._silent_seconds += 1
            if self._silent_seconds > limit * SILENCE_FACTOR + SILENCE_EXTRA:
                self._kill_reason = (
                    f"the engine was silent for {self._silent_seconds} s and was killed"
                )
                self._link.kill()

    def _die(self, error: Exception) -> None:
        if self.died is not None:
            return
        self.died = error
        self.stats = EngineStats()
        self.prefix_reporter.clear()
        if not isinstance(error, UserError):  # that one the command reports, in one line
            logger.error("%s; %d requests were open", error, len(self._streams))
        for stream in self._streams.values():
            stream.engine_died(EngineDeadError(str(error)))
        self._streams.clear()
        self._changed.set()


def _with_loads(stats: EngineStats, before: EngineStats) -> EngineStats:
    """The figures with those that only some messages have: tokens by expert, and work."""
    kept: dict[str, Any] = {}
    if before.expert_tokens and not stats.expert_tokens:
        kept = {"expert_tokens": before.expert_tokens, "expert_ranks": before.expert_ranks}
    if before.work is not None and stats.work is None:
        kept["work"] = before.work
    return msgspec.structs.replace(stats, **kept) if kept else stats


def _failure(message: Failed) -> Exception:
    return UserError(message.message) if message.user_error else EngineDeadError(message.message)
