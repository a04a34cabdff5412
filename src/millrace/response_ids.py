"""How a stored response says which server keeps it, and for whom.

Ids of responses and of their items hold a tag of the server behind their prefix: gateways read it
to send a request to that server. What is stored is not known here.
"""

from __future__ import annotations

import re

TAG_DIGITS = 8  # hexadecimal
OWNER_HEADER = "x-response-owner"  # by which a gateway says whose request it is
PATH = "/v1/responses"

_ID = rb"(?:resp|msg|rs|fc|ctc)_([0-9a-f]{%d})[0-9a-f]{16,}" % TAG_DIGITS
_WHOLE = re.compile(_ID)
_FIELD = re.compile(rb'"id"\s*:\s*"' + _ID + b'"')


def tag_of_id(id: bytes) -> str:
    """The tag in an id; empty if it is of another kind."""
    return _tag(_WHOLE.fullmatch(id))


def tag_of_items(items: bytes) -> str:
    """The tag in the first id of items given as JSON; empty if none has one."""
    return _tag(_FIELD.search(items))


def _tag(found: re.Match[bytes] | None) -> str:
    return found.group(1).decode() if found else ""
