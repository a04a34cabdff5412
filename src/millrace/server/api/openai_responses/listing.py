"""GET /v1/responses/ID/input_items: what a response was an answer to, page by page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from millrace.errors import RequestError
from millrace.server.api.openai_responses.items import Item, listed_item
from millrace.server.api.openai_responses.store import StoredResponse

_MOST = 100


class ItemList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of items. has_more: others follow."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def item_list(response: StoredResponse, query: Mapping[str, str]) -> ItemList:
    """The page that a query asks for: `limit`, `order` and `after`. Raises RequestError."""
    limit = query.get("limit", "20")
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= _MOST:
        raise RequestError(f"limit must be from 1 to {_MOST}, got {limit[:20]!r}", param="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be asc or desc, got {order[:20]!r}", param="order")
    items = _items(response)
    if order == "desc":
        items.reverse()
    after = query.get("after")
    if after is not None:
        items = items[_place(items, after) + 1 :]
    page = items[: int(limit)]
    return ItemList(
        data=[dict(item) for item in page],
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=len(items) > len(page),
    )


def _items(response: StoredResponse) -> list[Item]:
    own = response.id.partition("_")[2]
    given = (msgspec.json.decode(item) for item in response.input)
    return [listed_item(item, f"{own}{at:04x}") for at, item in enumerate(given)]


def _place(items: list[Item], id: str) -> int:
    for at, item in enumerate(items):
        if item["id"] == id:
            return at
    raise RequestError(f"after: there is no item {id[:100]!r}", param="after")
