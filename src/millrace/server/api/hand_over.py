"""kv_transfer_params: how a prompt is computed by one server and answered by another.

Their names are vLLM's, so a router that was written for its pairs works with these. A server that
is asked with do_remote_decode puts into its answer what the other one is to be asked with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from millrace.errors import RequestError
from millrace.protocol import Ready, RecordSource
from millrace.server.api.generation import Generation
from millrace.server.api.request_schema import GenerationRequest
from millrace.server.api.response_schema import KvTransferAnswer

PARAM = "kv_transfer_params"


class KvTransferParams(msgspec.Struct, frozen=True):
    """do_remote_decode: the prompt's record is kept for another engine, by the name
    remote_request_id, or one of the server's. do_remote_prefill: it is taken from there by that
    name; without remote_num_tokens while it is still computed. Others have no effect."""

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    remote_engine_id: str | None = None
    remote_request_id: str | None = None
    remote_host: str | None = None
    remote_port: int | None = None
    remote_num_tokens: int | None = None


class HandOver(msgspec.Struct, frozen=True):
    """What a request asks for. keep: its record, by this name; empty: by the request's id. source:
    where its record is."""

    keep: bool = False
    source: RecordSource | None = None
    name: str = ""

    def arguments(self, request_id: str) -> Mapping[str, Any]:
        """Of the engine's request."""
        name = self.name or request_id
        return {"hand_over": name if self.keep else "", "source": self.source}


def read_hand_over(body: GenerationRequest, outputs: int, ready: Ready) -> HandOver:
    """Raises RequestError for parameters that mean nothing here."""
    if not body.kv_transfer_params:
        return HandOver()
    try:
        given = msgspec.convert(body.kv_transfer_params, KvTransferParams)
    except msgspec.ValidationError as error:
        raise RequestError(f"{PARAM}: {error}", param=PARAM) from None
    if not (given.do_remote_decode or given.do_remote_prefill):
        return HandOver()
    if not ready.engine:
        raise RequestError(
            f"{PARAM} need a server started with --role prefill, decode or both", param=PARAM
        )
    if outputs > 1:
        raise RequestError(f"{PARAM} belong to one output; send one prompt and n 1", param=PARAM)
    keeps = given.do_remote_decode
    name = given.remote_request_id or "" if keeps and not given.do_remote_prefill else ""
    return HandOver(keeps, _source(given) if given.do_remote_prefill else None, name)


def _source(given: KvTransferParams) -> RecordSource:
    names = ("remote_host", "remote_port", "remote_engine_id", "remote_request_id")
    values = {name: getattr(given, name) for name in names}
    if missing := [name for name, value in values.items() if value is None]:
        raise RequestError(
            f"{PARAM}: {' and '.join(missing)} missing, which the server that computed the prompt "
            "puts into its answer",
            param=PARAM,
        )
    found = [*values.values(), given.remote_num_tokens or 0]
    return RecordSource(*found)


def transfer_answer(
    generations: Sequence[Generation], ready: Ready | None
) -> tuple[KvTransferAnswer | UnsetType | None, str | UnsetType]:
    """(kv_transfer_params, kv_transfer_error) of an answer; UNSET where nobody asked."""
    one = generations[0]
    if not one.request.hand_over or ready is None:
        return UNSET, UNSET
    if not one.record_tokens:
        return None, one.record_error or "the prompt was not computed"
    return KvTransferAnswer(
        remote_engine_id=ready.engine,
        remote_request_id=one.request.hand_over,
        remote_host=ready.transfer_host,
        remote_port=ready.transfer_port,
        remote_num_tokens=one.record_tokens,
    ), UNSET
