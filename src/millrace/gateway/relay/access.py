"""Who may use the API and who may change the gateway; what replicas are told of the client."""

from __future__ import annotations

import hmac

import msgspec

from millrace.gateway.http.message import Request, header


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """api_keys: what clients must bring one of, none for an open gateway. admin_key: for changes
    to the gateway itself; without one they are taken from this host alone. worker_key: what
    replicas ask for."""

    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    worker_key: str | None = None

    def admits(self, request: Request) -> bool:
        """Whether the client may use the API."""
        return not self.api_keys or _bears(request, self.api_keys)

    def administers(self, request: Request) -> bool:
        """Whether the client may change the gateway."""
        if self.admin_key is not None:
            return _bears(request, (self.admin_key,))
        return request.peer in ("127.0.0.1", "::1", "::ffff:127.0.0.1")

    @property
    def upstream(self) -> bytes | None:
        """The Authorization that replicas get; None: the client's own."""
        if self.worker_key is not None:
            return b"Bearer " + self.worker_key.encode()
        return b"" if self.api_keys else None


def _bears(request: Request, keys: tuple[str, ...]) -> bool:
    scheme, _, given = header(request.headers, b"authorization").partition(b" ")
    held = given.strip() if scheme.lower() == b"bearer" else header(request.headers, b"x-api-key")
    # Every key is compared, so that the time says nothing about which one was near.
    return sum(hmac.compare_digest(held, key.encode()) for key in keys) > 0
