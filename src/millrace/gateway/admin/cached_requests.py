"""GET /cache/explain without a request's id, at a gateway: the latest requests of all replicas.

Each replica has its own list, of requests that the gateway sent it for the client's key. The client
is named to it as the relay names it, so nobody reads of another's requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from urllib.parse import parse_qs

import msgspec

from millrace.common.http_client import fetch
from millrace.common.prefix_hash import SALT_HEADER
from millrace.gateway.http.message import LocalReply, Request, header, json_reply
from millrace.gateway.relay.access import Access
from millrace.gateway.routing.replicas import Member
from millrace.response_ids import OWNER_HEADER

PATH = b"/cache/explain"
_TIMEOUT = 2.0  # seconds for all replicas, which are asked at once
_PASSED = (OWNER_HEADER, SALT_HEADER)


class _List(msgspec.Struct, frozen=True):
    requests: list[msgspec.Raw]


_DECODER = msgspec.json.Decoder(_List)


def asks_for_all(request: Request) -> bool:
    """Whether a request wants the list, and not the explanation of one request."""
    path, _, query = request.path.partition(b"?")
    return path == PATH and not parse_qs(query.decode("latin-1")).get("request_id")


async def cached_requests(
    request: Request, members: Sequence[Member], access: Access
) -> LocalReply:
    """The lists of the replicas that answer, one behind the other."""
    headers = _headers(request, access)
    asked = [member for member in members if member.state != "down"]
    lists = await asyncio.gather(*(_of(member, headers) for member in asked))
    return json_reply(200, {"requests": [one for found in lists for one in found]})


async def _of(member: Member, headers: tuple[tuple[str, str], ...]) -> list[msgspec.Raw]:
    """None of a replica that is another server, or does not answer."""
    try:
        found = await fetch(member.target, PATH.decode(), headers=headers, timeout=_TIMEOUT)
        return _DECODER.decode(found.body).requests if found.status == 200 else []
    except (OSError, msgspec.DecodeError):
        return []


def _headers(request: Request, access: Access) -> tuple[tuple[str, str], ...]:
    """Who asks, as replicas are told."""
    access.isolate(request)
    known = {name: header(request.headers, name.lower().encode()) for name in _PASSED}
    authorization = access.upstream_authorization
    if authorization is None:
        authorization = header(request.headers, b"authorization")
    known["Authorization"] = authorization
    return tuple((name, value.decode("latin-1")) for name, value in known.items() if value)
