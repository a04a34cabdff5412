"""How a stored response says which server keeps it, and for whom.

Ids of responses and of their items hold a tag of the server behind their prefix: gateways read it
to send a request to that server. What is stored is not known here.
"""

from __future__ import annotations

import re

TAG_DIGITS = 8  # hexadecimal
OWNER_HEADER = "x-response-owner"  # by which a gateway says whose request it is
PATH = "/v1/responses"

_ID = re.compile(rb"(?:resp|msg|rs|fc|ctc)_([0-9a-f]{%d})[0-9a-f]{16,}" % TAG_DIGITS)


def server_tag(id: bytes) -> str | None:
    """The tag in an id; None if it is not of this kind."""
    found = _ID.fullmatch(id)
    return found.group(1).decode() if found else None
