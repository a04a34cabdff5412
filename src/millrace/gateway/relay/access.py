"""Who may use the API, who may change the gateway, and which key replicas get."""

from __future__ import annotations

import functools
from ipaddress import ip_address
from urllib.parse import urlsplit

import msgspec

from millrace.common.api_errors import ApiError, no_access
from millrace.common.api_keys import ApiKeys, checked_key, presented_key
from millrace.common.prefix_hash import PROMPT_FIELDS, SALT_HEADER, key_salt
from millrace.errors import ConfigError
from millrace.gateway.http.message import Request, header
from millrace.response_ids import OWNER_HEADER

_FORWARDED = (
    *(b"forwarded", b"x-forwarded", b"x-real-ip", b"via", b"x-client-ip", b"x-cluster-client-ip"),
    *(b"true-client-ip", b"cf-connecting-ip", b"x-original-", b"x-envoy-", b"x-amzn-trace-id"),
)  # beginnings of headers that proxies add
_OWNER = OWNER_HEADER.encode()
# What is kept of a request, its response or why its prompt was not cached, is for its sender.
_OWNED = (*(path.encode() for path in PROMPT_FIELDS), b"/cache/explain")
_OPEN_PATHS = frozenset((b"/ping", b"/version", b"/openapi.json"))
_NO_ADMIN = (
    "this gateway takes no changes here: start it with --admin-key and send the key, or with "
    "--admin-port or --admin-uds and send changes there"
)


class Access(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """api_key: keys of which clients must send one; none for an open gateway. admin_key: for
    changes to the gateway; without one they must come to a listener of their own. worker_api_key:
    the key that replicas ask for. cache_salt_by_api_key: requests of different keys share no cached
    prefixes."""

    api_key: list[str] = []
    admin_key: str | None = None
    worker_api_key: str | None = None
    cache_salt_by_api_key: bool = False
    allowed_origins: list[str] = []

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
        """Have the request say whose cached prefixes it shares, where that depends on its key, and
        whose stored responses and reports it may read."""
        if self.cache_salt_by_api_key:
            name = SALT_HEADER.encode()
            rest = [pair for pair in request.headers if pair[0].lower() != name]
            request.headers = [*rest, (name, key_salt(_key(request)).encode())]
        if request.path.startswith(_OWNED):
            rest = [pair for pair in request.headers if pair[0].lower() != _OWNER]
            owner = [(_OWNER, key_salt(_key(request)).encode())] if self.api_key else []
            request.headers = [*rest, *owner]

    def owner(self, request: Request) -> str:
        """Whose files and batches a request may use; empty where there are no keys."""
        return key_salt(_key(request)) if self.api_key else ""

    def refusal(self, request: Request) -> ApiError:
        """What a request is told that has no key, or a wrong one."""
        return no_access(given=bool(_key(request)))

    def cors_headers(self, request: Request) -> tuple[tuple[str, str], ...]:
        """Headers that let scripts of an allowed page read a response; () for other clients."""
        if not self.allowed_origins:
            return ()
        origin = header(request.headers, b"origin").decode("latin-1")
        if not origin or not {"*", origin} & set(self.allowed_origins):
            return ()
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", "X-Request-Id"),
            ("Vary", "Origin"),
        )

    def allows_api(self, request: Request) -> bool:
        """Whether the client may use the API. Some paths need no key, as at a single server, nor
        do the preflights of browsers, which never have one."""
        if not self.api_key or request.path.partition(b"?")[0] in _OPEN_PATHS:
            return True
        if request.method == b"OPTIONS" and header(
            request.headers, b"access-control-request-method"
        ):
            return True
        return _has_key(request, tuple(self.api_key))

    def admin_refusal(self, request: Request) -> ApiError | None:
        """Why a request may not change the gateway; None if it may.

        The client's address is no evidence: behind a proxy on this host all clients have the same.
        So it needs the admin key, or must come to the admin port or the admin Unix socket. There a
        web page could still be the sender, and there, too, a proxy could be in front.
        """
        if self.admin_key is not None and request.via != "unix":
            if not _has_key(request, (self.admin_key,)):
                return ApiError(403, "changes need the admin key (Authorization: Bearer KEY)")
        elif request.via == "public":
            return ApiError(403, _NO_ADMIN)
        elif any(name.lower().startswith(_FORWARDED) for name, _ in request.headers):
            return ApiError(403, "changes must not come through a proxy; set --admin-key for that")
        elif request.via == "admin" and not is_loopback(_host_name(request)):
            return ApiError(403, "changes must be sent to a loopback address, by their Host header")
        return _web_page_refusal(request)

    @property
    def secrets(self) -> tuple[bytes, ...]:
        """Keys of clients, which no replica may see."""
        keys = self.api_key if self.admin_key is None else [*self.api_key, self.admin_key]
        return tuple(key.encode() for key in keys)

    @property
    def upstream_authorization(self) -> bytes | None:
        """The Authorization that replicas get; None: the client's own."""
        if self.worker_api_key is not None:
            return b"Bearer " + self.worker_api_key.encode()
        return b"" if self.api_key else None


def _web_page_refusal(request: Request) -> ApiError | None:
    """Refuse what a foreign web page can have a browser send: its Origin, or a body of a type that
    needs no permission."""
    origin = header(request.headers, b"origin").lower()
    site = header(request.headers, b"sec-fetch-site").lower()
    own = (b"http://" + _host(request), b"https://" + _host(request))
    if (origin and origin not in own) or site not in (b"", b"none", b"same-origin"):
        return ApiError(403, "changes must not come from a web page of another origin")
    kind = header(request.headers, b"content-type").partition(b";")[0].strip().lower()
    if kind != b"application/json" and (request.body or kind):
        return ApiError(415, "changes need a JSON body with Content-Type: application/json")
    return None


def _host(request: Request) -> bytes:
    return header(request.headers, b"host").strip().lower()


def is_loopback(name: str) -> bool:
    """Whether a host is `localhost` or a loopback address."""
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _host_name(request: Request) -> str:
    """The Host header without its port; empty if it is not valid."""
    try:
        return urlsplit("//" + _host(request).decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def _has_key(request: Request, keys: tuple[str, ...]) -> bool:
    return _api_keys(keys).accept(_key(request))


def _key(request: Request) -> bytes:
    headers = request.headers
    return presented_key(header(headers, b"authorization"), header(headers, b"x-api-key"))


@functools.lru_cache(maxsize=16)
def _api_keys(keys: tuple[str, ...]) -> ApiKeys:
    return ApiKeys(keys)
