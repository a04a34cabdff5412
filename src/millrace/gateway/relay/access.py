"""Who may use the API, who may change the gateway, and which key replicas get."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import msgspec

from millrace.gateway.http.message import Request, header


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """api_key: what clients must bring one of, none for an open gateway. admin_key: for changes
    to the gateway itself; without one they are taken from this host alone. worker_api_key: what
    replicas ask for."""

    api_key: list[str] = []
    admin_key: str | None = None
    worker_api_key: str | None = None

    def allows_api(self, request: Request) -> bool:
        """Whether the client may use the API."""
        return not self.api_key or _has_key(request, self.api_key)

    def allows_admin(self, request: Request) -> bool:
        """Whether the client may change the gateway."""
        if self.admin_key is not None:
            return _has_key(request, (self.admin_key,))
        return request.peer in ("127.0.0.1", "::1", "::ffff:127.0.0.1")

    @property
    def upstream_authorization(self) -> bytes | None:
        """The Authorization that replicas get; None: the client's own."""
        if self.worker_api_key is not None:
            return b"Bearer " + self.worker_api_key.encode()
        return b"" if self.api_key else None


def _has_key(request: Request, keys: Sequence[str]) -> bool:
    scheme, _, given = header(request.headers, b"authorization").partition(b" ")
    held = given.strip() if scheme.lower() == b"bearer" else header(request.headers, b"x-api-key")
    # Every key is compared, so that the time says nothing about which one was near.
    return sum(hmac.compare_digest(held, key.encode()) for key in keys) > 0
