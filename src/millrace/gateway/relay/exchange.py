"""One request from the choice of a replica to the response's last byte.

It joins a client's connection to a replica's and decides what follows from a failure. It does not
know how replicas are chosen (candidates.py) or how streams are buffered and resumed
(resumption.py).

Before the first byte has gone to the client, a failure moves the request to another replica. A
stream that has begun is resumed on another replica after the last complete event. Where that is
impossible the client's connection is closed, so that the client cannot take a part for the whole.

A request at which two replicas fail, without an output token in between, is sent to no third one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable

from millrace.common.http_client import error_text
from millrace.gateway.http.message import (
    LocalReply,
    Request,
    ResponseHead,
    error_reply,
    header,
    request_bytes,
    response_head,
)
from millrace.gateway.http.request_info import read_request_info
from millrace.gateway.relay.fast_path import FastPath
from millrace.gateway.relay.hand_over import HandOver
from millrace.gateway.relay.idle_timeout import IdleTimeout
from millrace.gateway.relay.relay import Client, Relay
from millrace.gateway.relay.replica_connection import ReplicaConnection
from millrace.gateway.relay.resumption import Resumption
from millrace.gateway.relay.suspicion import Suspicion
from millrace.gateway.resume.stream_buffer import ERROR_EVENT, first_error
from millrace.gateway.routing.candidates import Candidates
from millrace.gateway.routing.load_account import LoadAccount
from millrace.gateway.routing.replicas import Replica
from millrace.gateway.routing.suspects import (
    MAX_REPLICAS_TO_FAIL,
    Failure,
    digest_of,
    suspect_reply,
)

_ENGINE_DEAD = b'"engine_dead"'  # the code of an error if the engine died with the request
_EXPLAIN = b"/cache/explain"
_BUSY = (429, 503)  # such a replica is skipped while there is another one
_HOLD_SECONDS = 0.05  # for the rest of a chunk that was cut
_RETRY_WHEN_HELD = 10  # seconds that a client is told to wait when no replica came
_WAIT_STEP = 0.05  # seconds between searches for a replica that can resume a stream


class Exchange:
    """One request. status: of the response, 0 before its first byte."""

    def __init__(self, relay: Relay, client: Client, request: Request) -> None:
        self._relay = relay
        self._client = client
        self.request = request
        self._loop = asyncio.get_running_loop()
        self.info = read_request_info(request, keep=relay.limits.max_kept_bytes > 0)
        self.began = time.perf_counter()
        self.spans = relay.tracer.begin(request)
        self.first_byte: float | None = None
        self.status = 0
        self.account = LoadAccount(relay.replicas)
        self.retries = 0
        self.replica: Replica | None = None
        self._candidates = Candidates(
            relay.replicas, relay.policy, self.info, relay.limits.max_requests_per_replica
        )
        self._failures = 0
        self._suspicion = Suspicion()
        self._copy_key: Hashable = None  # while it is among the copies of its kind
        self._sent_at = 0.0  # to the last replica
        self._traceparent = b""  # for it
        self._begun = False  # bytes of the response have gone to the client
        self._stale_failure = ""  # why an idle connection closed on which it had been sent
        self._busy_reply: LocalReply | None = None
        self._connection: ReplicaConnection | None = None
        self._opening: asyncio.Task[None] | None = None
        self._hand_over: HandOver | None = None
        self._target: Replica | None = None  # where the stream is to go on, if that can
        self._rebalanced = False
        self._beside: asyncio.Task[None] | None = None  # its prompt, computed for its replica
        self._hold_timer: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None  # queue timeout, or wait for a replica
        self._idle_timeout = IdleTimeout(
            self.account,
            relay.limits.request_timeout,
            lambda: client.paused,
            self._response_timed_out,
        )
        self._admitted = self._finished = False
        self._keep_alive = False
        self._delimited = True
        self._stream = Resumption(self.info, relay.buffer, relay.limits.max_resumptions)
        self._resume_deadline = 0.0
        self._hold_deadline = 0.0

    # --- from the client -----------------------------------------------------------------------

    def start(self) -> None:
        """Admit the request, queue it, hold it, or refuse it."""
        relay = self._relay
        relay.in_flight += 1
        none = self._candidates.refusal()
        held = relay.held
        waits = len(held) > 0 if none is None else none.status == 503
        if held.is_on and waits and not held.is_full:
            held.hold(self)
        else:
            self._enter(none)
        if not self._admitted and not self._finished:
            self.spans.waits()

    def has_room(self, most: int) -> bool:
        """Whether an available replica has fewer than `most` requests."""
        return self._candidates.has_room(most)

    def released(self) -> None:
        """A replica has come for which the request was held."""
        self._enter(self._candidates.refusal())

    def hold_timed_out(self) -> None:
        """No replica has come in time."""
        self._reply(self._held_too_long())

    def _held_too_long(self) -> LocalReply:
        seconds = self._relay.limits.hold_timeout
        outage = self._relay.replicas.describe_outage(self.info.model)
        message = f"no replica came within {seconds:g} s: {outage}"
        return error_reply(503, message, retry_after=_RETRY_WHEN_HELD)

    def _enter(self, none: LocalReply | None) -> None:
        """Go on to admission, behind a first copy of the request if there is one. none: the reply
        if no replica can take the request."""
        relay, info = self._relay, self.info
        none = none or self._suspect_refusal()
        if none is not None:
            self._reply(none)
        elif info.for_text and len(relay.replicas.all) > MAX_REPLICAS_TO_FAIL:
            self._copy_key = (self.request.path, info.cache_salt, self.request.body)
            relay.first_copies.enter(self._copy_key, self)
        else:
            self._submit()

    def go(self) -> None:
        """It need not wait for other copies of it any more."""
        refusal = self._suspect_refusal()
        if refusal is not None:
            self._reply(refusal)
        else:
            self._submit()

    def condemn(self, reason: str) -> None:
        """Replicas have failed on another copy of it, for which it was waiting."""
        self._reply(suspect_reply(reason))

    def _submit(self) -> None:
        relay, info = self._relay, self.info
        refusal = relay.admission.submit(self)
        if refusal is not None:
            wait = relay.admission.retry_after(info.service_class)
            self._reply(error_reply(429, f"{refusal}; try again later", retry_after=wait))
        elif not self._admitted and not self._finished:
            self._timer = self._loop.call_later(relay.limits.queue_timeout, self._queue_timed_out)

    def _suspect_refusal(self) -> LocalReply | None:
        """502 for a request at which two replicas failed lately. One failure leaves one more
        try."""
        suspects = self._relay.suspects
        suspect = suspects.find(self.request) if suspects else None
        if suspect is None:
            return None
        self._suspicion.has_failed_before(suspect.failures)
        return suspects.refusal(suspect) if suspect.refused else None

    def _is_suspect(self) -> bool:
        """Whether replicas have failed on it, or on a copy of it since it was sent."""
        suspects = self._relay.suspects
        return self._suspicion.failures > 0 or (
            len(suspects) > 0 and suspects.find(self.request) is not None
        )

    def has_capacity(self) -> bool:
        """Whether a replica could take the request now; true as well if no replica is left."""
        return self._candidates.has_capacity()

    def admitted(self) -> None:
        """The request is admitted: choose a replica and send."""
        self._admitted = True
        self.spans.admitted()
        if self._timer is not None:
            self._timer.cancel()
        self._idle_timeout.start()
        relay = self._relay
        if relay.replicas.has_roles and self.info.hand_over:
            self._hand_over = HandOver(relay, self.request, self.info)
            if self._hand_over.pays():
                self._beside = self._hand_over.compute_beside(self.spans, self._prompt_failed)
                if self._beside is not None:
                    self._attempt()
                    return
                self._opening = self._loop.create_task(self._compute_prompt(self._hand_over))
                return
        self._attempt()

    async def _compute_prompt(self, hand_over: HandOver) -> None:
        """Have one replica compute the prompt, for another to answer."""
        await hand_over.compute(self, self.spans)
        self._opening = None
        if not self._finished:
            self._attempt()

    def _prompt_failed(self, reason: str) -> None:
        """The prompt is not computed for the replica that waits for its record."""
        self._beside = None
        hand_over = self._hand_over
        if self._finished or hand_over is None or not hand_over.params:
            return
        if self.status or self.replica is None:  # the record came all the same, or nobody waits
            hand_over.give_up(reason)
        else:
            self._answer_whole(hand_over, reason)

    def cancel(self) -> None:
        """The client has gone; the replica notices when its connection closes."""
        self._relay.process_counters.count_event("disconnects")
        self._finish(499, reusable=False)

    def pause(self) -> None:
        """The client reads too slowly: stop reading from the replica."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """The client reads again."""
        self._idle_timeout.restart()
        if self._connection is not None:
            self._connection.resume()

    # --- towards the replica -------------------------------------------------------------------

    def _attempt(self) -> None:
        capable = self._stream.capable(self._candidates.untried())
        if self._hand_over is not None and capable:
            capable = self._hand_over.answerers(capable)
        if not capable:
            self._no_replica_left()
            return
        target, self._target = self._target, None
        known = target if target is not None and target in capable else None
        replica = self.replica = known or self._candidates.pick(capable)
        self._idle_timeout.restart()
        self.account.begin(replica, self.info, self._stream.output_tokens, self)
        self._traceparent = self.spans.sent_to(replica)
        idle = self._relay.pool.take(replica)
        if idle is not None:
            self._send(idle)
        else:
            self._opening = self._loop.create_task(self._open_connection(replica))

    async def _open_connection(self, replica: Replica) -> None:
        try:
            connection = await self._relay.pool.open(replica)
        except OSError as error:
            self._opening = None
            reason = f"cannot connect ({error or 'timed out'})"
            if self._stale_failure:  # the replica had the request, and is gone since
                reason = f"{self._stale_failure}, and {reason}"
            self._fail(reason, reached=bool(self._stale_failure))
            return
        self._opening = None
        self._send(connection)

    def _send(self, connection: ReplicaConnection) -> None:
        self._connection = connection
        path, body = self._stream.build_request(connection.replica.member.kind)
        if self._hand_over is not None:
            body = self._hand_over.answer_body(body)
        upstream = self._relay.upstream(connection.replica)
        data = request_bytes(self.request, upstream, body, path, self._traceparent)
        if self._client.paused:
            connection.pause()
        no_body = self.request.method == b"HEAD"
        self._sent_at = time.monotonic()
        connection.send(self, data, no_body=no_body, decode=self._stream.resuming)

    # --- from the replica ----------------------------------------------------------------------

    def head(self, head: ResponseHead, first: bytes) -> bool:
        """The response's head has come, and `first`, the start of its body. False: the request goes
        to another replica instead."""
        status = head.status
        if self._hand_over is not None and self._hand_over.broke(status, first):
            reason = f"{self.replica.target if self.replica else ''} answered {status}"
            self._answer_whole(self._hand_over, f"{reason} ({error_text(first)})")
            return False
        if status in _BUSY and not self._is_last_answer(status, head, first):
            return False
        if status == 404 and self._is_asked_everywhere and self._candidates.untried():
            self._skip_replica("knows nothing of that request")
            return False
        if self._stream.resuming:
            if status == 200:
                return True
            self._fail(
                f"answered {status} to a request to resume a stream",
                reached=status >= 500,
                reported=status >= 500,
            )
            return False
        error = first_error(first) if status == 200 and head.chunked else None
        if error is not None and error.by_server and self._candidates.untried():
            self.failed(f"began its stream with an error ({error.message})")
            return False
        if self._hand_over is not None and status == 200 and self.replica is not None:
            self._hand_over.answered(self.replica)
        self.status, self._delimited = status, head.delimited
        self.first_byte = time.perf_counter() - self.began
        self.spans.first_byte()
        self._relay.process_counters.observe_first_byte(self.first_byte)
        request = self.request
        self._keep_alive = head.delimited and request.keep_alive and request.version == "1.1"
        kind = header(head.headers, b"content-type")
        streams = status == 200 and head.chunked and kind.startswith(b"text/event-stream")
        encoded = header(head.headers, b"content-encoding") not in (b"", b"identity")
        if streams and self.info.resumable and not encoded and self._member_kind != "other":
            self._stream.start_buffering()
        elif streams and self.info.stream:
            self._relay.process_counters.count_event("unprotected")
        self._client.buffer_head(response_head(head, self._keep_alive, request.id))
        return True

    def _answer_whole(self, hand_over: HandOver, reason: str) -> None:
        """The record of the prompt did not get to the replica: any one does everything."""
        hand_over.give_up(reason)
        self.spans.failed(reason)
        if self._beside is not None:
            self._beside.cancel()
            self._beside = None
        self._release_replica(reusable=False)
        self._candidates.reset(keep_last=False)
        self._attempt()

    @property
    def _is_asked_everywhere(self) -> bool:
        """Whether only the replica that had another request can answer this one."""
        return self.request.path.startswith(_EXPLAIN)

    def _is_last_answer(self, status: int, head: ResponseHead, first: bytes) -> bool:
        """Whether the client gets this 429 or 503. False: another replica is tried."""
        died = "answered that its engine has died"
        engine_died = status == 503 and _ENGINE_DEAD in first
        if not self._candidates.untried():
            if engine_died and self.replica is not None:
                self._report(self.replica, died, reached=True, reported=True, lost=False)
            return True
        if engine_died:
            self.failed(died)
            return False
        if status == 429:
            wait = header(head.headers, b"retry-after").decode("latin-1")
            again = int(wait) if wait.isascii() and wait.isdigit() and len(wait) < 6 else 1
            self._busy_reply = error_reply(429, error_text(first), retry_after=again)
        self._skip_replica(f"answered {status}")
        return False

    def _show_harmless(self) -> None:
        """It has brought output."""
        if self._copy_key is not None:
            self._relay.first_copies.harmless(self._copy_key)

    def publish(self, replica: Replica) -> None:
        """Bring the counters of its replica up to date."""
        self.account.publish(replica)

    @property
    def resumptions(self) -> int:
        """How often its stream was resumed on another replica."""
        return self._stream.resumptions

    @property
    def _member_kind(self) -> str:
        return self.replica.member.kind if self.replica is not None else "other"

    def body(self, data: bytes) -> None:
        """Pass bytes on to the client: unchanged, or as the continuation rewrites them."""
        self.account.bytes += len(data)
        self.account.chunks += 1
        if ERROR_EVENT in data and self._handle_error_event(data):
            return
        passed = self._stream.feed(data)
        if passed:
            self._failures = 0
            if not self._begun:
                self._show_harmless()
            self._begun = True
            self._client.write(passed)
        if self._stream.failure is not None:
            self.failed(self._stream.failure)
        elif self._stream.holds_back and self._hold_timer is None:
            self._hold_timer = self._loop.call_later(
                _HOLD_SECONDS, self._release_held, self.account.chunks
            )

    def _release_held(self, chunks: int) -> None:
        """Pass on bytes that are still held back: their chunk is not completed at once."""
        self._hold_timer = None
        if self._finished or not self._stream.holds_back:
            return
        # Others have come since, or nothing is read because the client is slow: wait again.
        if self.account.chunks != chunks or self._client.paused:
            self._hold_timer = self._loop.call_later(
                _HOLD_SECONDS, self._release_held, self.account.chunks
            )
            return
        self._begun = True
        self._client.write(self._stream.give_up_buffer())

    def fast_path(self) -> FastPath | None:
        """The fast path for the pieces to come, from between two events; None if there is none."""
        write = self._client.writer
        if write is None or self._finished or self._connection is None:
            return None
        return self._stream.fast_path(self.account, write)

    def _handle_error_event(self, data: bytes) -> bool:
        """Whether the replica ended its stream with an error and the stream is resumed
        elsewhere."""
        before = self._stream.bytes_before_error(data)
        if before is None:
            return False
        if before:
            self._begun = True
            self._client.write(before)
        self.failed("ended its stream with an error")
        return True

    def complete(self, data: bytes, reusable: bool) -> None:
        """The response is complete. reusable: its connection can carry another request."""
        replica = self.replica
        assert replica is not None
        self.account.bytes += len(data)
        self.account.chunks += 1
        if ERROR_EVENT in data and self._handle_error_event(data):
            return
        last = self._stream.finish(data)
        if last is None:
            self.failed(self._stream.failure or "ended a stream before its end")
            return
        self._client.write(last)
        if self.status < 500:
            self._show_harmless()
        self._relay.replicas.record_answer(
            replica, self.status, self.request, suspect=self._is_suspect()
        )
        if self.info.stream and self.status == 200:
            self._relay.replicas.record_output(self.account.chunks)
        self._finish(self.status, reusable)
        self._client.finished(self._keep_alive)

    # --- failures ------------------------------------------------------------------------------

    def failed(self, reason: str, *, stale: bool = False) -> None:
        """The replica failed. stale: an idle connection closed before a byte of the response."""
        if stale and self.replica is not None and not self._finished:
            self._connection = None
            self._stale_failure = reason
            self._opening = self._loop.create_task(self._open_connection(self.replica))
        else:
            self._fail(reason)

    def lost(self, reason: str, *, removed: bool) -> None:
        """The replica is gone, or was removed, by the word of the health monitor."""
        self._fail(reason, reached=not removed, reported=not removed, lost=True)

    def move(self) -> None:
        """Its replica is drained: have another one go on with the stream, by its record."""
        self._leave("is drained", record=True)

    @property
    def output_tokens(self) -> int:
        """Of its answer, so far; chunks stand for tokens that nobody has counted."""
        return self._stream.output_tokens or self.account.chunks

    def rebalance(self, to: Replica) -> bool:
        """Have a replica with more room go on with the stream: by its record, or, where that costs
        more than it saves, by computing what there is so far. Whether it does."""
        model, replica = self.info.model, self.replica
        serves = model is None or not to.member.models or model in to.member.models
        if self._rebalanced or not self.info.stream or not serves or replica is None:
            return False
        length = self.info.prompt_tokens + self.output_tokens
        if not self._leave("is crowded", length >= self._relay.limits.move_record_tokens, to):
            return False
        self._rebalanced = True
        self._relay.process_counters.count_event("stream_rebalanced")
        return True

    def _leave(self, why: str, record: bool, to: Replica | None = None) -> bool:
        """Have another replica go on with the stream, that one if it can; with `record` by the
        record of what there is so far. Whether it is a stream that can go on elsewhere."""
        replica, stream = self.replica, self._stream
        movable = self.status == 200 and self._begun and stream.resumable and not stream.resuming
        if replica is None or self._finished or not movable or replica.member.kind != "millrace":
            return False
        if not stream.interrupt():
            return False
        self._release_replica(reusable=False)
        self._candidates.record_failure(replica, why)
        self._target = to
        if stream.final_bytes() is not None or not record:
            self._resume_elsewhere()
            return True
        self._hand_over = HandOver(self._relay, self.request, self.info)
        self._opening = self._loop.create_task(self._move_record(replica, self._hand_over))
        return True

    async def _move_record(self, replica: Replica, hand_over: HandOver) -> None:
        """Have the replica hand over the record of what it has, and go on elsewhere."""
        _, body = self._stream.build_request(replica.member.kind)
        await hand_over.compute_rest(replica, body, self._stream.output_tokens, self, self.spans)
        self._opening = None
        if not self._finished:
            self._relay.process_counters.count_event("stream_moved")
            self._resume_elsewhere(record=True)

    def _fail(
        self, reason: str, *, reached: bool = True, reported: bool = True, lost: bool = False
    ) -> None:
        """Leave the replica. reached: it had the request, which may be the cause. reported: the
        health monitor is told; lost: it knows of the replica."""
        replica = self.replica
        if replica is None or self._finished:
            return
        self._stale_failure = ""
        self._candidates.record_failure(replica, reason)
        self.spans.failed(reason)
        self._failures += 1
        if self.status and not self._begun:
            self._start_again()
        if self.status and not self._stream.resumable:
            self._report(replica, reason, reached, reported, lost)
            self._abort_response()
            return
        self._release_replica(reusable=False)
        if self.status and not self._stream.interrupt():
            self._report(replica, reason, reached, reported, lost)
            self._abort_response()
            return
        self._report(replica, reason, reached, reported, lost)
        if reached and self._suspicion.add(replica.burst, self._stream.output_tokens):
            if self._copy_key is not None:
                self._relay.first_copies.condemn(self._copy_key, f"{replica.target}: {reason}")
            self._give_up_suspect(f"{replica.target}: {reason}")
        elif self.status:
            self._resume_elsewhere()
        else:
            self._retry()

    def _start_again(self) -> None:
        """Forget a response of which the client has got nothing yet."""
        self._client.drop_head()
        self._stream.close()
        self._stream = Resumption(self.info, self._relay.buffer, self._relay.limits.max_resumptions)
        self.status, self.first_byte = 0, None

    def _report(
        self, replica: Replica, reason: str, reached: bool, reported: bool, lost: bool
    ) -> None:
        if reported:
            failure = Failure(reason, digest_of(self.request), reached, lost, self._sent_at)
            self._relay.replicas.report_failure(replica, failure)

    def _give_up_suspect(self, reason: str) -> None:
        """Two replicas failed on the request: it goes to no other one."""
        if self.status:
            self._abort_response()
        else:
            self._reply(suspect_reply(reason))

    def _skip_replica(self, reason: str) -> None:
        """The replica is healthy but has no capacity."""
        assert self.replica is not None
        self._candidates.record_failure(self.replica, reason)
        self.spans.failed(reason)
        self._release_replica(reusable=False)
        self._retry()

    def _retry(self) -> None:
        if self._failures > self._relay.limits.max_retries:
            self._no_replica_left()
            return
        self.retries += 1
        self._relay.process_counters.count_event("retries")
        self._attempt()

    def _resume_elsewhere(self, record: bool = False) -> None:
        """Resume the stream, which has been interrupted, on another replica. record: of what it has
        so far is one, unless that failed."""
        if self._hand_over is not None and not record:
            self._hand_over.forget()  # it is of the prompt alone
        self._relay.process_counters.count_event("resumed")
        ending = self._stream.final_bytes()
        if ending is not None:
            self._client.write(ending)
            self._finish(self.status, reusable=False)
            self._client.finished(self._keep_alive)
            return
        self._candidates.reset(keep_last=True)
        self._resume_deadline = self._loop.time() + self._relay.limits.resume_timeout
        self._attempt()

    # --- ends ----------------------------------------------------------------------------------

    def _no_replica_left(self) -> None:
        """No replica is left to try."""
        if self._stream.resuming:
            self._wait_for_replica()
        elif self._relay.held.is_on and self._candidates.is_outage():
            self._hold_again()
        else:
            self._reply(self._busy_reply or self._candidates.exhausted_reply())

    def _wait_for_replica(self) -> None:
        """A stream has begun and no replica can resume it now: wait until one comes back."""
        if self._loop.time() > self._resume_deadline:
            self._abort_response()
        else:
            self._attempt_later()

    def _hold_again(self) -> None:
        """The last replica went before the first byte came: wait until one comes, as the requests
        do that find none; but it is admitted already."""
        now = self._loop.time()
        self._hold_deadline = self._hold_deadline or now + self._relay.limits.hold_timeout
        if now > self._hold_deadline:
            self._reply(self._held_too_long())
        else:
            self._failures = 0
            self._attempt_later()

    def _attempt_later(self) -> None:
        self._candidates.reset(keep_last=False)
        self._idle_timeout.restart()
        self._timer = self._loop.call_later(_WAIT_STEP, self._attempt)

    def _queue_timed_out(self) -> None:
        relay = self._relay
        relay.admission.cancel_wait(self)
        seconds = relay.limits.queue_timeout
        message = f"the request waited {seconds:g} s in the queue; try again later"
        wait = relay.admission.retry_after(self.info.service_class)
        self._reply(error_reply(429, message, retry_after=wait))

    def _response_timed_out(self) -> None:
        limit = self._relay.limits.request_timeout
        if self.status:
            self.failed(f"sent no byte for {limit:g} s")
        else:
            target = self.replica.target if self.replica else "a replica"
            self._reply(error_reply(504, f"{target} sent no response within {limit:g} s"))

    def _reply(self, own: LocalReply) -> None:
        self._finish(own.status, reusable=False, counted=True)
        self._client.answer(own, self.request)

    def _abort_response(self) -> None:
        process_counters = self._relay.process_counters
        process_counters.count_event("cut_off")
        if self._stream.resumptions:
            process_counters.count_event("resume_failed")
        self._finish(self.status, reusable=False)
        if self._delimited:
            self._client.finished(keep_alive=False)
        else:
            # Without a marked end a clean close would look like the end of the body.
            self._client.close()

    def _release_replica(self, reusable: bool) -> None:
        """Release the replica and its connection."""
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(reusable)
        replica, self.replica = self.replica, None
        if replica is not None:
            self.account.end(replica, self)
            self.spans.left()

    def _finish(self, status: int, reusable: bool, counted: bool = False) -> None:
        """Release everything. counted: the status is counted elsewhere."""
        if self._finished:
            return
        self._finished = True
        relay = self._relay
        if self._beside is not None:
            self._beside.cancel()
            self._beside = None
        if self._copy_key is not None:
            relay.first_copies.leave(self._copy_key, self)
            self._copy_key = None
        served_by = self.replica
        self._release_replica(reusable)
        relay.in_flight -= 1
        self._idle_timeout.stop()
        if self._hold_timer is not None:
            self._hold_timer.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._stream.close()
        if not counted:
            relay.process_counters.count_status(status)
        relay.process_counters.count_event("relayed_requests")
        self.spans.ended(status, self.retries, self.resumptions)
        if self._admitted:
            relay.admission.release(self.info.service_class)
        else:
            relay.admission.cancel_wait(self)
            relay.held.cancel(self)
        if relay.log is not None:
            self.replica = served_by
            relay.log(self, status)
            self.replica = None
