"""Who may use the API, who may change the gateway, and which key replicas get."""

from __future__ import annotations

import functools

import msgspec

from millrace.common.api_errors import ApiError, no_access
from millrace.common.api_keys import ApiKeys, checked_key, presented_key
from millrace.common.prefix_hash import SALT_HEADER, key_salt
from millrace.errors import ConfigError
from millrace.gateway.http.message import Request, header


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """api_key: what clients must bring one of, none for an open gateway. admin_key: for changes
    to the gateway itself; without one they are taken from this host alone. worker_api_key: what
    replicas ask for. cache_salt_by_api_key: requests of different keys share no cached prefixes."""

    api_key: list[str] = []
    admin_key: str | None = None
    worker_api_key: str | None = None
    cache_salt_by_api_key: bool = False

    def check(self) -> None:
        """Raise ConfigError for a key that is empty."""
        for key in self.api_key:
            checked_key(key, "--api-key")
        if self.admin_key is not None:
            checked_key(self.admin_key, "--admin-key")
        if self.worker_api_key is not None:
            checked_key(self.worker_api_key, "--worker-api-key")
        if self.cache_salt_by_api_key and not self.api_key:
            raise ConfigError(
                "--cache-salt-by-api-key needs --api-key: without keys all are the same"
            )

    def isolate(self, request: Request) -> None:
        """Have the request say whose cached prefixes it shares, where that depends on its key."""
        if self.cache_salt_by_api_key:
            name = SALT_HEADER.encode()
            rest = [pair for pair in request.headers if pair[0].lower() != name]
            request.headers = [*rest, (name, key_salt(_key(request)).encode())]

    def refusal(self, request: Request) -> ApiError:
        """What a request is told that has no key, or a wrong one."""
        return no_access(given=bool(_key(request)))

    def allows_api(self, request: Request) -> bool:
        """Whether the client may use the API."""
        return not self.api_key or _has_key(request, tuple(self.api_key))

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


def _has_key(request: Request, keys: tuple[str, ...]) -> bool:
    return _api_keys(keys).accept(_key(request))


def _key(request: Request) -> bytes:
    headers = request.headers
    return presented_key(header(headers, b"authorization"), header(headers, b"x-api-key"))


@functools.lru_cache(maxsize=16)
def _api_keys(keys: tuple[str, ...]) -> ApiKeys:
    return ApiKeys(keys)
