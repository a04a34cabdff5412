"""Where a server is, and the URLs that say so. Nothing here opens a connection."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec

from millrace.errors import UserError

_HOST = re.compile(r"[\w.:%-]{1,255}")  # a name, or an address of either family


class Target(msgspec.Struct, frozen=True):
    """Where a server is: `prefix` is put before every path, `query` after it; `tls` for https.

    verify: whether the server's certificate is checked.
    """

    host: str
    port: int
    tls: bool = False
    prefix: str = ""
    query: str = ""
    verify: bool = True

    @property
    def authority(self) -> str:
        """host:port, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"


def parse_url(text: str) -> Target:
    """A Target from `http://host:port/prefix?query`; a bare `host:port` is taken as http.

    Raises UserError for any other scheme, a missing host, a port that is no number, or a user name.
    """
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
        host = parts.hostname or ""
        valid = parts.scheme in ("http", "https") and port != 0 and _HOST.fullmatch(host)
    except ValueError:
        valid = None
    if not valid:
        raise UserError(f"{text!r} is no URL of a server; use a form like http://127.0.0.1:8000")
    if parts.username or parts.fragment or any(c in text for c in " \r\n\t"):
        raise UserError(
            f"{parts.hostname}: a URL here has neither user name, fragment nor white space; "
            "give keys as headers"
        )
    tls = parts.scheme == "https"
    port = port or (443 if tls else 80)
    return Target(host, port, tls, parts.path.rstrip("/"), parts.query)


def parse_base_url(text: str) -> Target:
    """As `parse_url`, for a server of the OpenAI API: a final `/v1` may be there or not."""
    target = parse_url(text)
    return msgspec.structs.replace(target, prefix=target.prefix.removesuffix("/v1").rstrip("/"))
