"""One request on its way through: from the pick to the response's last byte.

It joins a client's connection to a replica's, and decides what a failure comes to. Who is picked is
candidates.py's business, what of a stream is kept and gone on with is resumption.py's.

Until the first byte has gone to the client, a failure moves the request to another replica. A
stream that has begun is continued on another one from the last whole event (journal.py,
continuation.py). Where that cannot be, the client's connection is cut, so that it cannot take a
part for the whole.
"""

from __future__ import annotations

import asyncio
import time

from millrace.gateway.http.message import (
    Answer,
    Request,
    ResponseHead,
    error_answer,
    header,
    request_bytes,
    response_head,
)
from millrace.gateway.http.request_info import read_request_info
from millrace.gateway.relay.fast_path import FastPath
from millrace.gateway.relay.idle_timeout import IdleTimeout
from millrace.gateway.relay.relay import Client, Relay
from millrace.gateway.relay.replica_connection import ReplicaConnection
from millrace.gateway.relay.resumption import Resumption
from millrace.gateway.resume.stream_buffer import ERROR_EVENT
from millrace.gateway.routing.candidates import Search
from millrace.gateway.routing.load_account import LoadAccount
from millrace.gateway.routing.replicas import Replica

_BUSY = (429, 503)  # a replica that says so is passed over while there is another
_WAIT_STEP = 0.05  # seconds between looks for a replica that could go on with a stream


class Exchange:
    """One request. ask: its facts. status: of the response, 0 before its first byte."""

    def __init__(self, relay: Relay, client: Client, request: Request) -> None:
        self._relay = relay
        self._client = client
        self.request = request
        self._loop = asyncio.get_running_loop()
        self.info = read_request_info(request, keep=relay.limits.max_kept > 0)
        self.began = time.perf_counter()
        self.first_byte: float | None = None
        self.status = 0
        self.account = LoadAccount(relay.replicas)
        self.retries = 0
        self.replica: Replica | None = None
        self._search = Search(relay.replicas, relay.policy, self.info, relay.limits.per_replica)
        self._failures = 0
        self._upstream: ReplicaConnection | None = None
        self._opening: asyncio.Task[None] | None = None
        self._waiter: asyncio.TimerHandle | None = None  # for a place, or for a replica
        self._idle_timeout = IdleTimeout(
            self.account, relay.limits.timeout, lambda: client.paused, self._brought_nothing
        )
        self._placed = self._ended = False
        self._keep_alive = False
        self._delimited = True
        self._stream = Resumption(self.info, relay.buffer, relay.limits.moves)
        self._wait_until = 0.0

    # --- from the client -----------------------------------------------------------------------

    def start(self) -> None:
        """Find the request a place."""
        relay, info = self._relay, self.info
        relay.in_flight += 1
        none = self._search.refusal()
        if none is not None:
            self._answer(none)
            return
        refusal = relay.admission.enter(self)
        if refusal is not None:
            wait = relay.admission.retry_after(info.service)
            self._answer(error_answer(429, f"{refusal}; try again later", retry_after=wait))
        elif not self._placed and not self._ended:
            self._waiter = self._loop.call_later(relay.limits.queue_timeout, self._waited_too_long)

    def has_room(self) -> bool:
        """Whether a replica could take the request now; also when none is left to wait for."""
        return self._search.has_room()

    def admitted(self) -> None:
        """The request has a place: pick a replica and send."""
        self._placed = True
        if self._waiter is not None:
            self._waiter.cancel()
        self._idle_timeout.watch()
        self._attempt()

    def cancel(self) -> None:
        """The client has gone: the replica learns it by its connection closing."""
        self._relay.part.event("disconnects")
        self._end(499, reusable=False)

    def pause(self) -> None:
        """The client takes no more for now."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        """The client takes bytes again."""
        self._idle_timeout.restart()
        if self._upstream is not None:
            self._upstream.resume()

    # --- towards the replica -------------------------------------------------------------------

    def _attempt(self) -> None:
        able = self._stream.able(self._search.untried())
        if not able:
            self._give_up()
            return
        replica = self.replica = self._search.pick(able)
        self._idle_timeout.restart()
        self.account.begin(replica, self.info, self._stream.made, self)
        idle = self._relay.pool.take(replica)
        if idle is not None:
            self._send(idle)
        else:
            self._opening = self._loop.create_task(self._open(replica))

    async def _open(self, replica: Replica) -> None:
        try:
            side = await self._relay.pool.open(replica)
        except OSError as error:
            self._opening = None
            self.failed(f"cannot connect ({error or 'timed out'})")
            return
        self._opening = None
        self._send(side)

    def _send(self, side: ReplicaConnection) -> None:
        self._upstream = side
        path, body = self._stream.question(side.replica.member.kind)
        data = request_bytes(
            self.request, body, path=path, authorization=self._relay.access.upstream
        )
        if self._client.paused:
            side.pause()
        headless = self.request.method == b"HEAD"
        side.send(self, data, headless=headless, decode=self._stream.moving)

    # --- from the replica ----------------------------------------------------------------------

    def head(self, head: ResponseHead, first: bytes) -> bool:
        """The response's head has come, and `first`, how its body begins. False: the request goes
        to another replica instead."""
        status = head.status
        if status in _BUSY and self._search.untried():
            self._pass_over(f"answered {status}")
            return False
        if self._stream.moving:
            if status == 200:
                return True
            self.failed(f"answered {status} to a request to go on", lost=status < 500)
            return False
        if status == 200 and head.chunked and ERROR_EVENT in first[:64] and self._search.untried():
            self.failed("began its stream with an error")
            return False
        self.status, self._delimited = status, head.delimited
        self.first_byte = time.perf_counter() - self.began
        self._relay.part.first_byte(self.first_byte)
        request = self.request
        self._keep_alive = head.delimited and request.keep_alive and request.version == "1.1"
        kind = header(head.headers, b"content-type")
        streams = status == 200 and head.chunked and kind.startswith(b"text/event-stream")
        if streams and self.info.resumable and self._member_kind != "other":
            self._stream.keep()
        elif streams and self.info.stream:
            self._relay.part.event("unprotected")
        self._client.hold(response_head(head, self._keep_alive, request.id))
        return True

    def publish(self, replica: Replica) -> None:
        """Bring the counters of the replica that carries it up to date."""
        self.account.publish(replica)

    @property
    def moves(self) -> int:
        """How often its stream has gone to another replica."""
        return self._stream.moves

    @property
    def _member_kind(self) -> str:
        return self.replica.member.kind if self.replica is not None else "other"

    def body(self, data: bytes) -> None:
        """Pass bytes on to the client: as they are, or as the continuation words them."""
        self.account.bytes += len(data)
        self.account.chunks += 1
        if ERROR_EVENT in data and self._error_came(data):
            return
        passed = self._stream.take(data)
        if passed:
            self._failures = 0
            self._client.write(passed)
        if self._stream.trouble is not None:
            self.failed(self._stream.trouble)

    def fast_path(self) -> FastPath | None:
        """The short way for the pieces to come, from between two events. None: there is none."""
        write = self._client.writer
        if write is None or self._ended or self._upstream is None:
            return None
        return self._stream.fast_path(self.account, write)

    def _error_came(self, data: bytes) -> bool:
        """Whether the replica ended its stream with an error, and the rest comes from elsewhere."""
        before = self._stream.before_error(data)
        if before is None:
            return False
        if before:
            self._client.write(before)
        self.failed("ended its stream with an error")
        return True

    def complete(self, data: bytes, reusable: bool) -> None:
        """The response is whole with these bytes. reusable: its connection can carry another."""
        replica = self.replica
        assert replica is not None
        self.account.bytes += len(data)
        self.account.chunks += 1
        if ERROR_EVENT in data and self._error_came(data):
            return
        last = self._stream.finish(data)
        if last is None:
            self.failed(self._stream.trouble or "ended a stream before its end")
            return
        self._client.write(last)
        self._relay.replicas.answered(replica, self.status)
        if self.info.stream and self.status == 200:
            self._relay.replicas.learn_output(self.account.chunks)
        self._end(self.status, reusable)
        self._client.finished(self._keep_alive)

    # --- failures ------------------------------------------------------------------------------

    def failed(self, reason: str, *, stale: bool = False, lost: bool = False) -> None:
        """The replica failed. stale: on a connection that had been idle, without a byte. lost: the
        keeper found it out, so it need not be told."""
        replica = self.replica
        if replica is None or self._ended:
            return
        if stale:
            self._upstream = None
            self._opening = self._loop.create_task(self._open(replica))
            return
        if not lost:
            self._relay.replicas.failed(replica, reason)
        self._search.failed(replica, reason)
        self._failures += 1
        if not self.status:
            self._leave(reusable=False)
            self._retry()
        elif self._stream.possible:
            self._leave(reusable=False)
            self._move()
        else:
            self._cut_off()

    def _pass_over(self, reason: str) -> None:
        """The replica is well but has no room."""
        assert self.replica is not None
        self._search.failed(self.replica, reason)
        self._leave(reusable=False)
        self._retry()

    def _retry(self) -> None:
        if self._failures > self._relay.limits.retries:
            self._give_up()
            return
        self.retries += 1
        self._relay.part.event("retries")
        self._attempt()

    def _move(self) -> None:
        """Go on with the stream on another replica."""
        if not self._stream.leave():
            self._cut_off()
            return
        self._relay.part.event("resumed")
        ending = self._stream.ending()
        if ending is not None:
            self._client.write(ending)
            self._end(self.status, reusable=False)
            self._client.finished(self._keep_alive)
            return
        self._search.again(but_last=True)
        self._wait_until = self._loop.time() + self._relay.limits.resume_wait
        self._attempt()

    # --- ends ----------------------------------------------------------------------------------

    def _give_up(self) -> None:
        """No replica is left to try."""
        if self._stream.moving:
            self._wait_for_a_replica()
        else:
            self._answer(self._search.nobody())

    def _wait_for_a_replica(self) -> None:
        """A stream has begun and nobody can go on with it now: somebody may come back."""
        if self._loop.time() > self._wait_until:
            self._cut_off()
        else:
            self._search.again(but_last=False)
            self._idle_timeout.restart()
            self._waiter = self._loop.call_later(_WAIT_STEP, self._attempt)

    def _waited_too_long(self) -> None:
        relay = self._relay
        relay.admission.leave_queue(self)
        seconds = relay.limits.queue_timeout
        message = f"no place became free within {seconds:g} s; try again later"
        wait = relay.admission.retry_after(self.info.service)
        self._answer(error_answer(429, message, retry_after=wait))

    def _brought_nothing(self) -> None:
        limit = self._relay.limits.timeout
        if self.status:
            self.failed(f"brought no byte for {limit:g} s")
        else:
            target = self.replica.target if self.replica else "a replica"
            self._answer(error_answer(504, f"{target} brought no answer within {limit:g} s"))

    def _answer(self, own: Answer) -> None:
        self._end(own.status, reusable=False, counted=True)
        self._client.answer(own, self.request)

    def _cut_off(self) -> None:
        part = self._relay.part
        part.event("cut_off")
        if self._stream.moves:
            part.event("resume_failed")
        self._end(self.status, reusable=False)
        if self._delimited:
            self._client.finished(keep_alive=False)
        else:
            # Without a marked end a plain close would look like the end of the body.
            self._client.close()

    def _leave(self, reusable: bool) -> None:
        """Let go of the replica and of its connection."""
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.release(reusable)
        replica, self.replica = self.replica, None
        if replica is not None:
            self.account.end(replica, self)

    def _end(self, status: int, reusable: bool, counted: bool = False) -> None:
        """Let go of everything. counted: the answer counts itself."""
        if self._ended:
            return
        self._ended = True
        relay = self._relay
        served_by = self.replica
        self._leave(reusable)
        relay.in_flight -= 1
        self._idle_timeout.stop()
        if self._waiter is not None:
            self._waiter.cancel()
        self._stream.close()
        if not counted:
            relay.part.answered(status)
        relay.part.event("relayed_requests")
        if relay.log is not None:
            self.replica = served_by
            relay.log(self, status)
            self.replica = None
        if self._placed:
            relay.admission.leave(self.info.service)
        else:
            relay.admission.leave_queue(self)
