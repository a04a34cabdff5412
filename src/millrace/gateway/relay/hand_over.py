"""A prompt that one replica computes and another answers, for one request.

The replica with role `prefill` gets the request with an answer of one token, and says by what the
other one takes the record of the prompt (kv_transfer_params, as vLLM speaks them). The client's own
request then goes to a replica with role `decode`, with that. A replica that says where its records
are (Millrace's do) is told the record's name instead, and both requests go out together: the record
moves while the prompt is computed. Where it would not pay, where there is
no pair, and where the hand-over fails, one replica does everything; a failure is counted and
logged. How a record moves is the replicas' business.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Raw

from millrace.common.http_client import connect, error_text
from millrace.gateway.http.message import Request, request_bytes
from millrace.gateway.http.request_info import RequestInfo
from millrace.gateway.relay.spans import RequestSpans
from millrace.gateway.routing.load_account import LoadAccount
from millrace.gateway.routing.policies import PrefixAware
from millrace.gateway.routing.replicas import InFlight, Replica

if TYPE_CHECKING:
    from millrace.gateway.relay.relay import Relay

logger = logging.getLogger(__name__)

PATHS = (b"/v1/completions", b"/v1/chat/completions")
PARAMS = "kv_transfer_params"
FAILED = b"kv_transfer_failed"  # the code of an error of a replica that got no record
_TRIES = 2  # replicas that may compute the prompt
_ASK = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
    "remote_block_ids": None, "remote_host": None, "remote_port": None,
}  # fmt: skip
_OF_THE_ANSWER = (
    "stream", "stream_options", "max_tokens", "max_completion_tokens", "min_tokens", "n",
    "logprobs", "top_logprobs", "resume_token_ids",
)  # fmt: skip
_WHOLE_PROMPT = (b'"prompt_logprobs"', b'"echo"', b'"kv_transfer_params"')


class _Computed(msgspec.Struct):
    """What is read of the first replica's answer."""

    kv_transfer_params: dict[str, Any] | None = None
    kv_transfer_error: str = ""


_decode = msgspec.json.Decoder(_Computed).decode


class _Prompt:
    """A prompt at the replica that computes it while another one waits for its record. Its
    failures come with its own answer."""

    def publish(self, replica: Replica) -> None:
        """Its answer has no chunks."""

    def lost(self, reason: str, *, removed: bool) -> None:
        """Its connection fails, too."""

    def move(self) -> None:
        """A prompt is not moved."""

    output_tokens = 0

    def rebalance(self, to: Replica) -> bool:
        """A prompt is not moved."""
        return False


class HandOver:
    """params: by what the second replica takes the record; empty: nothing is handed over.
    prefiller: the replica that computes the prompt."""

    def __init__(self, relay: Relay, request: Request, info: RequestInfo) -> None:
        self._relay, self._request, self._info = relay, request, info
        self.params: dict[str, Any] = {}
        self.prefiller: Replica | None = None
        self._holders: Sequence[Replica] = ()  # whose cached beginning of the prompt is moved

    # --- whether it pays, and where -----------------------------------------------------------

    def pays(self) -> bool:
        """Whether the request is one for two replicas, and there are such."""
        info, limits = self._info, self._relay.limits
        if info.prompt_tokens < limits.hand_over_prompt or not self._single():
            return False
        answer = info.max_tokens
        if answer == 1:
            return False
        available = self._relay.replicas.available((), info.model)
        known, holders = self._known(available)
        rest = info.prompt_tokens - known
        if rest < limits.hand_over_prompt:
            return known >= limits.hand_over_prompt and self._moves(available, holders)
        if answer is not None and rest < limits.hand_over_ratio * answer:
            return False
        return bool(self._prefillers(()))

    def _known(self, available: Sequence[Replica]) -> tuple[float, Sequence[Replica]]:
        """(tokens, replicas): of the prompt's beginning that is cached, and where."""
        policy = self._relay.policy
        if not isinstance(policy, PrefixAware):
            return 0.0, ()
        return policy.known(available, self._info)

    def _moves(self, available: Sequence[Replica], holders: Sequence[Replica]) -> bool:
        """Whether a prompt of which little is to be computed goes to a replica that does not have
        its beginning, because those that have it are busy: then that is moved there."""
        chosen = self._relay.policy.pick(whole(available), self._info)
        if chosen in holders:
            return False
        self._holders = [
            one
            for one in holders
            if one.member.role in ("prefill", "both") and self._answerers(available, one)
        ]
        return bool(self._holders)

    def _single(self) -> bool:
        """Whether it is one prompt with one answer, of an API that hands over, and computes no more
        than the answer."""
        info, request = self._info, self._request
        path = request.path.partition(b"?")[0]
        known = path in PATHS and info.single and not info.resume_token_ids
        return known and not any(name in request.body for name in _WHOLE_PROMPT)

    def _untried(self, tried: Sequence[Replica]) -> Sequence[Replica]:
        """Those that may compute the prompt, without those that have failed."""
        if self._holders:
            return [one for one in self._holders if one not in tried]
        return self._prefillers(tried)

    def _prefillers(self, tried: Sequence[Replica]) -> list[Replica]:
        """Those that may compute the prompt: there is another of their kind to answer it."""
        available = self._relay.replicas.available(tried, self._info.model)
        return [
            one
            for one in available
            if one.member.role in ("prefill", "both") and self._answerers(available, one)
        ]

    def _answerers(self, replicas: Sequence[Replica], prefiller: Replica) -> list[Replica]:
        checks = self._relay.pair_checks
        return [
            one
            for one in replicas
            if one is not prefiller
            and one.member.role in ("decode", "both")
            and one.member.kind == prefiller.member.kind
            and not checks.is_broken(prefiller, one)
        ]

    def answerers(self, replicas: Sequence[Replica]) -> Sequence[Replica]:
        """Those of the replicas that may answer the prompt; gives up the record if none may."""
        if self.prefiller is not None and self.params:
            if found := self._answerers(replicas, self.prefiller):
                return found
            self.give_up("no replica is left that could take it")
        return whole(replicas)

    # --- the prompt ---------------------------------------------------------------------------

    async def compute(self, exchange: InFlight, spans: RequestSpans) -> None:
        """Have the prompt computed; `params` is empty afterwards if that failed."""
        tried: list[Replica] = []
        while len(tried) < _TRIES and (found := self._untried(tried)):
            replica = self._relay.policy.pick(found, self._info)
            tried.append(replica)
            if not await self._have(replica, self._request.body, 0, exchange, spans):
                event = "prefix_moved" if self._holders else "handed_over"
                self._relay.process_counters.count_event(event)
                return

    async def compute_rest(
        self, replica: Replica, body: bytes, made: int, exchange: InFlight, spans: RequestSpans
    ) -> None:
        """Have a replica hand over the record of a stream that it has had. body: of the request
        that would resume it; made: tokens of its answer. `params` is empty if that failed."""
        await self._have(replica, body, made, exchange, spans)

    def compute_beside(
        self, spans: RequestSpans, failed: Callable[[str], None]
    ) -> asyncio.Task[None] | None:
        """Have the prompt computed by a replica that says where its records are, while another one
        waits for this record: it goes there part by part. failed: is told why it does not. None:
        there is no such replica, or only the beginning of the prompt is moved."""
        able = [one for one in self._untried(()) if one.member.records is not None]
        if self._holders or not able:
            return None
        replica = self.prefiller = self._relay.policy.pick(able, self._info)
        where, name = replica.member.records, f"record-{uuid.uuid4().hex}"
        assert where is not None
        self.params = {
            "do_remote_prefill": True, "do_remote_decode": False, "remote_request_id": name,
            "remote_engine_id": where.engine, "remote_host": where.host, "remote_port": where.port,
        }  # fmt: skip
        beside = self._compute_beside(replica, name, spans, failed)
        return asyncio.get_running_loop().create_task(beside)

    async def _compute_beside(
        self, replica: Replica, name: str, spans: RequestSpans, failed: Callable[[str], None]
    ) -> None:
        if reason := await self._have(replica, self._request.body, 0, _Prompt(), spans, name):
            failed(reason)
        else:
            self._relay.process_counters.count_event("handed_over")

    async def _have(
        self,
        replica: Replica,
        body: bytes,
        made: int,
        exchange: InFlight,
        spans: RequestSpans,
        name: str = "",
    ) -> str:
        """Have a replica hand over the record of a request. name: of the record, where another one
        waits for it already. Returns why it does not; empty: it does."""
        account = LoadAccount(self._relay.replicas)
        account.begin(replica, self._info, made, exchange)
        traceparent = spans.sent_to(replica, "prompt")
        try:
            async with asyncio.timeout(self._relay.limits.hand_over_timeout):
                params = await self._ask(replica, _prompt_body(body, name), traceparent)
        except (OSError, ValueError) as error:
            reason = f"{replica.target}: {error or 'no answer in time'}"
            spans.failed(reason, "prompt")
            if not name:
                self._note(reason)
            return reason
        finally:
            account.end(replica, exchange)
            spans.left("prompt")
        if not name:
            self.params, self.prefiller = params, replica
        return ""

    async def _ask(self, replica: Replica, body: bytes, traceparent: bytes) -> dict[str, Any]:
        """Raises OSError or ValueError, which say why there is no record."""
        upstream = self._relay.upstream(replica)
        connection = await connect(replica.target)
        try:
            data = request_bytes(self._request, upstream, body, traceparent=traceparent)
            response = await connection.send(data)
        finally:
            connection.close()
        if response.error is not None:
            raise ConnectionError(response.error)
        if response.status != 200:
            raise ValueError(f"answered {response.status} ({error_text(response.body)})")
        answer = _decode(response.body)
        if not answer.kv_transfer_params:
            raise ValueError(
                f"handed nothing over ({answer.kv_transfer_error or 'it says no why'})"
            )
        return answer.kv_transfer_params

    # --- the answer ---------------------------------------------------------------------------

    def answer_body(self, body: bytes) -> bytes:
        """The body for the second replica."""
        if not self.params:
            return body
        field = msgspec.json.encode({PARAMS: self.params})[:-1]
        return field + b"," + body[body.index(b"{") + 1 :]

    def broke(self, status: int, first: bytes) -> bool:
        """Whether this answer means that the second replica got no record. first: of its body."""
        if not self.params or status < 500:
            return False
        return FAILED in first or status == 500

    def answered(self, replica: Replica) -> None:
        """The second replica has begun its answer. Millrace's fails without the record; whether
        others had it, their counters tell."""
        if self.params and self.prefiller is not None and replica.member.kind != "millrace":
            self._relay.pair_checks.handed_over(self.prefiller, replica)

    def forget(self) -> None:
        """The record is not of use any more."""
        self.params = {}

    def give_up(self, reason: str) -> None:
        """The record did not get there: one replica does everything."""
        self.params = {}
        self._note(reason)

    def _note(self, reason: str) -> None:
        self._relay.process_counters.count_event("hand_over_failed")
        logger.warning("a prompt is not handed over: %s", reason)


def _prompt_body(body: bytes, name: str = "") -> bytes:
    """A request's body, with an answer of one more token than it resumes with, kept here. name: by
    which its record is taken; empty: the replica gives it one."""
    fields = msgspec.json.decode(body, type=dict[str, Raw])
    kept = {name: value for name, value in fields.items() if name not in _OF_THE_ANSWER}
    made = msgspec.json.decode(fields.get("resume_token_ids", b"[]"), type=list[int] | None)
    if made:
        kept["resume_token_ids"] = fields["resume_token_ids"]
    ask = {**_ASK, "remote_request_id": name} if name else _ASK
    own = {"stream": False, "max_tokens": len(made or ()) + 1, PARAMS: ask}
    return msgspec.json.encode({**kept, **own})


def whole(replicas: Sequence[Replica]) -> Sequence[Replica]:
    """Those that answer prompts of their own: not those for prompts alone, while there are
    others."""
    return [one for one in replicas if one.member.role != "prefill"] or replicas
